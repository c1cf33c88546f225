"""Quarantine: a request that was a suspect at two failures is refused for a time.

A request that kills backends, sent repeatedly, would otherwise end one replica after the other until all are given up.
After the first failure the request runs alone, so that the second failure identifies it; an answer clears it. Of the
crowds that ran out of memory together with it only the first counts: alone it may fit. The
records are bounded in number and expire, since the request may be harmless with another version, model or limit.

Pure: time comes in as an argument.
"""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from backends.diagnosis.suspects import MEMORY
from backends.domain.failure import CallFailure, Cause
from gateway.api.errors import Code, GatewayError
from gateway.api.json_codec import dumps

CAPACITY = 1024  # records
TTL = 900.0  # seconds
REFUSED_FROM = 2  # failures


@dataclass(frozen=True, slots=True)
class Record:
    model: str
    failures: int
    at: float  # when the last of them happened
    cause: Cause
    tokens: int  # of the prompt, as the backend counted, or estimated
    incident: tuple[str, int]  # backend and generation of the last failure; two copies in flight there count once


class Fingerprint:
    """Digest of a request's parameters: equal for the same request under another id, API key or stream setting.

    Computed once, on first use: it costs as much as serialising the body.
    """

    __slots__ = ("_digest", "_model", "_params")

    def __init__(self, model: str, params: Mapping[str, Any]) -> None:
        self._model = model
        self._params = params
        self._digest = b""

    def __call__(self) -> bytes:
        if not self._digest:
            self._digest = blake2b(dumps(self._params), digest_size=16, key=self._model.encode()[:64]).digest()
        return self._digest


class Quarantine:
    def __init__(self, *, capacity: int = CAPACITY, ttl: float = TTL) -> None:
        self._records: OrderedDict[bytes, Record] = OrderedDict()
        self._capacity = capacity
        self._ttl = ttl

    def __len__(self) -> int:
        return len(self._records)

    def note(self, body: bytes, failure: CallFailure, *, model: str, tokens: int, now: float) -> None:
        """The request with fingerprint ``body`` was a suspect at ``failure``."""
        before = self._fresh(body, now)
        incident = (failure.verdict.backend, failure.verdict.generation)
        if before is not None and before.incident == incident:
            return
        counts = before is None or failure.alone or failure.verdict.cause not in MEMORY
        failures = (0 if before is None else before.failures) + counts
        self._records[body] = Record(model, failures, now, failure.verdict.cause, tokens, incident)
        self._records.move_to_end(body)
        while len(self._records) > self._capacity:
            self._records.popitem(last=False)

    def suspected(self, body: bytes, now: float) -> bool:
        """The request was a suspect at a failure, so it must run alone."""
        return self._fresh(body, now) is not None

    def suspected_of_shortage(self, body: bytes, now: float) -> bool:
        """Of memory, at the latest of its failures."""
        record = self._fresh(body, now)
        return record is not None and record.cause in MEMORY

    def clear(self, body: bytes) -> bool:
        """Remove the record: the request was answered, or an operator cleared it. False if there was none."""
        return self._records.pop(body, None) is not None

    def refusal(self, body: bytes, now: float, *, largest: int) -> GatewayError | None:
        """Why a request with this fingerprint is refused, or None if it is admitted. ``largest``: tokens of the largest
        prompt that the model has answered, 0 = none."""
        record = self._fresh(body, now)
        if record is None or record.failures < REFUSED_FROM:
            return None
        expiry = f"the same request is accepted again in {round(self._ttl - (now - record.at))} s"
        if record.cause in MEMORY:
            message = (
                f"this request, of {record.tokens} tokens, is the likely cause of {record.failures} backends of model "
                f"{record.model!r} running out of memory; the largest answered one had {largest}; "
                f"send a shorter prompt ({expiry})"
            )
            return GatewayError(Code.CONTEXT_LENGTH_EXCEEDED, message, param="messages", model=record.model)
        message = (
            f"this request is the likely cause of {record.failures} failures of model {record.model!r} "
            f"({record.cause.value}): it was in flight at each of them, and a suspect; change the request ({expiry})"
        )
        return GatewayError(Code.INVALID_REQUEST, message, model=record.model)

    def entries(self, now: float) -> list[dict[str, object]]:
        """The records as ``/api/quarantine`` shows them, latest first."""
        fresh = [(body, record) for body in tuple(self._records) if (record := self._fresh(body, now)) is not None]
        return [
            {
                "fingerprint": body.hex(),
                "model": record.model,
                "failures": record.failures,
                "cause": record.cause.value,
                "tokens": record.tokens,
                "refused": record.failures >= REFUSED_FROM,
                "expires_in": round(self._ttl - (now - record.at)),
            }
            for body, record in reversed(fresh)
        ]

    def _fresh(self, body: bytes, now: float) -> Record | None:
        record = self._records.get(body)
        if record is not None and now - record.at >= self._ttl:
            del self._records[body]
            return None
        return record

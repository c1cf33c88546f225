"""Bodies that have ended backends: a request that was alone in flight at two failures is not let in again.

One poison request, sent again and again, would otherwise end replica after replica until all have given up. The memory
is bounded and expires: what was poison may be harmless after another version, model or limit.

Pure: time comes in as an argument.
"""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from backends.failure import Cause, Failure
from gateway.errors import Code, GatewayError
from gateway.jsonio import dumps

CAPACITY = 1024  # bodies
TTL = 900.0  # seconds
DEADLY = 2  # failures
OUT_OF_MEMORY = frozenset({Cause.OOM, Cause.RESOURCE_LIMIT})


@dataclass(frozen=True, slots=True)
class Record:
    failures: int
    at: float  # the last of them
    cause: Cause
    prompt_chars: int


def fingerprint(model: str, params: Mapping[str, Any]) -> bytes:
    """Of what would be sent: the same request under another id, key or stream setting is the same poison."""
    return blake2b(dumps(params), digest_size=16, key=model.encode()[:64]).digest()


class Quarantine:
    def __init__(self, *, capacity: int = CAPACITY, ttl: float = TTL) -> None:
        self._records: OrderedDict[bytes, Record] = OrderedDict()
        self._capacity = capacity
        self._ttl = ttl

    def __len__(self) -> int:
        return len(self._records)

    def note(self, body: bytes, failure: Failure, *, prompt_chars: int, now: float) -> None:
        """``body``, a fingerprint, was alone in flight when ``failure`` happened."""
        before = self._fresh(body, now)
        self._records[body] = Record((before.failures if before else 0) + 1, now, failure.cause, prompt_chars)
        self._records.move_to_end(body)
        while len(self._records) > self._capacity:
            self._records.popitem(last=False)

    def refusal(self, body: bytes, *, model: str, now: float) -> GatewayError | None:
        """Why a request with this fingerprint is not let in, or None when it is."""
        record = self._fresh(body, now)
        if record is None or record.failures < DEADLY:
            return None
        left = round(self._ttl - (now - record.at))
        if record.cause in OUT_OF_MEMORY:
            message = (
                f"this request, of about {record.prompt_chars} characters, ran {record.failures} backends of model "
                f"{model!r} out of memory; send a shorter prompt (the same one is let in again in {left} s)"
            )
            return GatewayError(Code.CONTEXT_LENGTH_EXCEEDED, message, param="messages", model=model)
        message = (
            f"this request was alone in flight when {record.failures} backends of model {model!r} failed "
            f"({record.cause.value}); change it (the same one is let in again in {left} s)"
        )
        return GatewayError(Code.INVALID_REQUEST, message, model=model)

    def _fresh(self, body: bytes, now: float) -> Record | None:
        record = self._records.get(body)
        if record is not None and now - record.at >= self._ttl:
            del self._records[body]
            return None
        return record

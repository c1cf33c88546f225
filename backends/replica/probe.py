"""Probes of a backend: ``/health``, the list of its models, and the canary, one token of real work."""

import asyncio
import json
from dataclasses import replace

from backends.diagnosis import model_list
from backends.diagnosis.engine import EngineIdentity
from backends.diagnosis.error_answers import AnswerVerdict, judge_answer
from backends.domain.failure import NO_CODES, Blame, Cause, Codes
from backends.domain.state import Health
from backends.upstream.exchange import NOT_SENT, Dialer, ExchangeError, Fault, Head, Request
from backends.upstream.fetch import fetch

LIST_TIMEOUT = 15.0  # seconds: mlx_lm.server looks through the whole cache of the hub for its list
LOOK_INTERVAL = 5.0  # seconds between two connections while a canary waits
LOST_AFTER = 3  # of them in a row that failed


async def health(
    dialer: Dialer, *, model: str | None = None, within: float, identity: EngineIdentity | None = None
) -> Health:
    """Any HTTP answer but 503 counts as OK: servers that are not mlx_lm.server may have no ``/health`` at all.

    ``model``: if the server is another mlx-gateway, its status of this model counts. ``identity`` learns from the
    answer.
    """
    try:
        head, body = await fetch(dialer, health_request(), timeout=within)
    except ExchangeError as error:
        return _of_fault(error.fault)
    if identity is not None:
        identity.note_get(head, body)
    if head.status == 503:
        return Health.UNAVAILABLE
    return Health.OK if model is None else _of_model(body, model)


def _of_fault(fault: Fault) -> Health:
    match fault:
        case Fault.EXHAUSTED:
            return Health.UNKNOWN
        case Fault.REFUSED | Fault.UNREACHABLE:
            return Health.REFUSED
        case _:
            return Health.SILENT


def _of_model(body: bytes, model: str) -> Health:
    """OK also where the body is none of an mlx-gateway."""
    try:
        said = json.loads(body)["models"][model]["status"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return Health.OK
    return next((health for health in (Health.UNAVAILABLE, Health.LOADING) if said == health.value), Health.OK)


async def canary(
    dialer: Dialer, identity: EngineIdentity, *, within: float, codes: Codes = NO_CODES
) -> AnswerVerdict | None:
    """None: the server generated a token. Else the verdict on the answer.

    Raises ExchangeError: there was no answer. A server without a chat endpoint, or a model whose template rejects the
    message, is asked for a plain completion.
    """
    verdict = None
    for chat in (True, False):
        head, body = await fetch(dialer, canary_request(identity.model, chat=chat), timeout=within)
        identity.note_answer(head, body)
        if _is_answer(head, body):
            return None
        verdict = judge_answer(head.status, body, is_mlx=identity.is_mlx, codes=codes) or _no_completion(head)
        verdict = _told_through(head, verdict)
        if verdict.cause not in (Cause.BAD_REQUEST, Cause.NONE):
            return verdict
    return verdict


async def patient_canary(
    dialer: Dialer, identity: EngineIdentity, *, within: float, codes: Codes = NO_CODES, look: float = LOOK_INTERVAL
) -> AnswerVerdict | None:
    """A canary for a server that may load its model for minutes. Raises ExchangeError also once it could
    not be connected to ``LOST_AFTER`` times in a row: the machine may have gone to sleep, which ends no connection."""
    asking = asyncio.ensure_future(canary(dialer, identity, within=within, codes=codes))
    lost = 0
    try:
        while not asking.done():
            await asyncio.wait({asking}, timeout=look)
            error = None if asking.done() else await _unconnected(dialer, within=look)
            lost = lost + 1 if error is not None else 0
            if error is not None and lost == LOST_AFTER:
                raise error
        return asking.result()
    finally:
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)


async def _unconnected(dialer: Dialer, *, within: float) -> ExchangeError | None:
    """An answer is not expected: some servers give none while they load."""
    try:
        await fetch(dialer, health_request(), timeout=within)
    except ExchangeError as error:
        return error if error.fault in NOT_SENT and error.fault is not Fault.EXHAUSTED else None
    return None


async def models(dialer: Dialer, identity: EngineIdentity, *, within: float) -> frozenset[str] | None:
    """The names that it lists; None: it has no list, not for our key, ends each such connection (mlx_lm.server without
    a cache of the hub), or gives no answer while it is busy with another request. ``within``: for an answer of
    ``/health``. Raises ExchangeError where nothing could be sent, or the server does not answer anything yet."""
    try:
        return await _listed(dialer, identity)
    except ExchangeError as error:
        if error.fault is Fault.STALLED:
            return None
        if error.fault in NOT_SENT or await health(dialer, within=within) is Health.SILENT:
            raise
    try:
        return await _listed(dialer, identity)
    except ExchangeError:
        return None


async def _listed(dialer: Dialer, identity: EngineIdentity) -> frozenset[str] | None:
    """Raises ExchangeError."""
    head, body = await fetch(dialer, Request("GET", "/v1/models"), timeout=LIST_TIMEOUT)
    identity.note_get(head, body)
    return model_list.listed(body) if head.status == 200 else None


def _told_through(head: Head, verdict: AnswerVerdict) -> AnswerVerdict:
    """The proxy is named: it may have given the answer itself."""
    return replace(verdict, message=f"{verdict.message} ({head.through.strip()})") if head.via else verdict


def _no_completion(head: Head) -> AnswerVerdict:
    return AnswerVerdict(Cause.NONE, Blame.BACKEND, f"an answer with status {head.status} without a completion")


def _is_answer(head: Head, body: bytes) -> bool:
    return head.status == 200 and b'"choices"' in body


def health_request() -> Request:
    return Request("GET", "/health")


def canary_request(model: str, *, chat: bool = True) -> Request:
    """One token, greedy: the only proof that generation works. The port opens, and ``/health`` says 200, before the
    model is loaded (mlx-lm 0.31.3 and later)."""
    body: dict[str, object] = {"model": model, "max_tokens": 1, "temperature": 0, "stream": False}
    if chat:
        body["messages"] = [{"role": "user", "content": "hi"}]
    else:
        body["prompt"] = "hi"
    path = "/v1/chat/completions" if chat else "/v1/completions"
    return Request("POST", path, json.dumps(body).encode(), ((b"content-type", b"application/json"),))

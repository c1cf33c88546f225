"""Failures and refusals as the client is told of them, and the one table of error codes and causes. Pure.

``backends`` knows causes only. Where it has to read the error answer of a gateway upstream, the codes' meanings are
handed to it as a value (``CODES``).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from types import MappingProxyType

from backends.diagnosis.suspects import MEMORY
from backends.domain.failure import Aftermath, Blame, CallFailure, Cause, CodeMeaning, Codes, Failure, Reason, Sent
from backends.domain.refusal import Refusal, Why
from backends.domain.snapshot import Snapshot
from backends.domain.state import State
from gateway.api.errors import Code, GatewayError


class GaveUp(Enum):
    """Why a failed request is not tried again."""

    NO_REPLICA = auto()  # none is left that could take it
    TRIES = auto()  # it has failed often enough
    TIME = auto()  # its own time is over
    RETRIES = auto()  # too many other requests are being tried again
    TURN = auto()  # it was to run alone, and no replica was idle for it within its patience


@dataclass(frozen=True, slots=True)
class Row:
    """``told_for``: the causes that a client is told of by this code. ``means``: the code, where a gateway upstream
    gives it."""

    means: CodeMeaning
    told_for: tuple[Cause, ...] = ()


_BAD_REQUEST = Row(CodeMeaning(Cause.BAD_REQUEST, Blame.REQUEST))
_TURNED_AWAY = Row(CodeMeaning(Cause.UNREACHABLE, sent=Sent.NOTHING))
_NOT_STARTED = (
    Cause.LOAD_FAILURE,
    Cause.MODEL_NOT_FOUND,
    Cause.DOWNLOAD,
    Cause.DISK_FULL,
    Cause.PORT_IN_USE,
    Cause.DEPENDENCY,
    Cause.START_TIMEOUT,
    Cause.UNREACHABLE,
)

# Codes and causes, in both directions. The codes that are missing are never said of a model's answer.
TABLE: Mapping[Code, Row] = {
    Code.BACKEND_OOM: Row(CodeMeaning(Cause.OOM), (Cause.OOM, Cause.RESOURCE_LIMIT)),
    Code.BACKEND_GPU_ERROR: Row(CodeMeaning(Cause.GPU_FAULT), (Cause.GPU_TIMEOUT, Cause.GPU_VICTIM, Cause.GPU_FAULT)),
    Code.BACKEND_CRASHED: Row(CodeMeaning(Cause.NATIVE_CRASH), (Cause.NATIVE_CRASH, Cause.KILLED, Cause.DISTRIBUTED)),
    Code.BACKEND_WEDGED: Row(CodeMeaning(Cause.WEDGE), (Cause.WEDGE,)),
    Code.BACKEND_STALLED: Row(CodeMeaning(Cause.STALLED), (Cause.STALLED,)),
    Code.STREAM_TRUNCATED: Row(CodeMeaning(Cause.NATIVE_CRASH)),
    Code.MODEL_LOADING: _TURNED_AWAY,
    Code.MODEL_UNAVAILABLE: Row(_TURNED_AWAY.means, _NOT_STARTED),
    Code.INSUFFICIENT_MEMORY: Row(CodeMeaning(Cause.OOM, Blame.MACHINE, Sent.NOTHING)),
    Code.OVERLOADED: _TURNED_AWAY,
    Code.SHUTTING_DOWN: _TURNED_AWAY,
    Code.TOOL_CALL_MALFORMED: Row(CodeMeaning(Cause.NONE, Blame.REQUEST)),
    Code.TOOL_CALL_TRUNCATED: _BAD_REQUEST,
    Code.GENERATION_FAILED: Row(CodeMeaning(Cause.NONE, Blame.REQUEST)),
    Code.CONTEXT_LENGTH_EXCEEDED: _BAD_REQUEST,
    Code.INVALID_REQUEST: Row(_BAD_REQUEST.means, (Cause.BAD_REQUEST,)),
    # A key or a name that is wrong upstream is the operator's to correct, not the client's.
    Code.MODEL_NOT_FOUND: Row(CodeMeaning(Cause.MODEL_NOT_FOUND, Blame.OPERATOR, Sent.NOTHING)),
    Code.INVALID_API_KEY: Row(CodeMeaning(Cause.UNREACHABLE, Blame.OPERATOR, Sent.NOTHING)),
    Code.NOT_FOUND: _BAD_REQUEST,
    Code.METHOD_NOT_ALLOWED: _BAD_REQUEST,
    Code.UNSUPPORTED_MEDIA_TYPE: _BAD_REQUEST,
    Code.REQUEST_TOO_LARGE: _BAD_REQUEST,
    Code.INTERNAL_ERROR: Row(CodeMeaning(Cause.UNREACHABLE)),
}
CODES: Codes = MappingProxyType({code.value: row.means for code, row in TABLE.items()})
CODE_OF_CAUSE: Mapping[Cause, Code] = {cause: code for code, row in TABLE.items() for cause in row.told_for}
_CODE_OF_REASON: Mapping[Reason, Code] = {
    Reason.BUSY: Code.OVERLOADED,
    Reason.OCCUPIED: Code.OVERLOADED,
    Reason.NO_ROOM: Code.BACKEND_OOM,
    Reason.NO_MEMORY: Code.INSUFFICIENT_MEMORY,
    Reason.TOO_LARGE: Code.REQUEST_TOO_LARGE,
    Reason.PROMPT_CACHED: Code.GENERATION_FAILED,
    Reason.LOST_CALL: Code.TOOL_CALL_MALFORMED,
    Reason.CUT_CALL: Code.TOOL_CALL_TRUNCATED,
}

_TRIED_TWICE = frozenset({Code.TOOL_CALL_MALFORMED})
LOOK_AGAIN = 5.0  # seconds; each request has it looked for
UNKNOWN_ETA = 59.0  # seconds; the longest Retry-After: a person has to act first
GUARDED = (
    "no replica was idle, which this prompt needs: the server may have all of it in its prompt cache, from a longer or "
    "an earlier one; change it (one more word is enough), or send it again later"
)
UNBATCHABLE = "no replica was idle, which a request needs that cannot share a batch: send it without seed, or later"
MAX_EVIDENCE = 300  # characters of backend output in a message


def code_of(failure: CallFailure) -> Code:
    """For a request that was in flight when it happened."""
    verdict, said = failure.verdict, failure.upstream.code
    if said is not None and said in CODES and verdict.blame is not Blame.OPERATOR:
        return Code(said)
    if verdict.reason is not None and (code := _CODE_OF_REASON.get(verdict.reason)) is not None:
        return code
    if failure.truncated:
        return Code.STREAM_TRUNCATED
    if verdict.blame is Blame.REQUEST:
        return Code.INVALID_REQUEST if verdict.cause is Cause.BAD_REQUEST else Code.GENERATION_FAILED
    if verdict.blame is Blame.GATEWAY:
        return Code.MODEL_UNAVAILABLE
    return CODE_OF_CAUSE.get(verdict.cause, Code.BACKEND_CRASHED)


def of_failure(
    failure: CallFailure,
    *,
    model: str,
    suspect: bool,
    eta: float | None,
    show_output: bool,
    has_content: bool,
    gave_up: GaveUp = GaveUp.NO_REPLICA,
    prompt: str = "",
) -> GatewayError:
    """``eta``: seconds until the model can probably answer again. ``has_content``: the client has a part of it.
    ``prompt``: its size in words; "" = not known."""
    verdict, said = failure.verdict, failure.upstream
    suspect = suspect and verdict.reason is not Reason.EMPTY_PROMPT
    code, message = code_of(failure), _told(verdict, show_output)
    if verdict.blame is not Blame.REQUEST:
        message += ". " + _advice(failure, prompt, suspect=suspect, has_content=has_content, gave_up=gave_up)
    return GatewayError(
        code=code,
        message=message,
        param=said.param,
        model=model,
        backend=verdict.backend or None,
        retry_after=said.retry_after if said.retry_after is not None else eta,
        should_retry=_should_retry(verdict, code, suspect=suspect),
    )


def _should_retry(verdict: Failure, code: Code, *, suspect: bool) -> bool | None:
    if suspect or verdict.reason is Reason.PROMPT_CACHED or code in _TRIED_TWICE:
        return False
    return True if verdict.reason is Reason.NO_ROOM else None


def _told(failure: Failure, show_output: bool) -> str:
    if show_output and failure.evidence and failure.evidence[0][:80] not in failure.message:
        return f'{failure.message} (its output: "{failure.evidence[0][:MAX_EVIDENCE]}")'
    return failure.message


def _advice(call: CallFailure, prompt: str, *, suspect: bool, has_content: bool, gave_up: GaveUp) -> str:
    failure = call.verdict
    if failure.cause in MEMORY and (call.suspect or suspect):
        return _of_memory(call, f", of {prompt}," if prompt else "", has_content=has_content, gave_up=gave_up)
    if suspect:
        return "This request may be the cause: do not send it again unchanged"
    if failure.reason is Reason.EMPTY_PROMPT:
        return "Its prompt cache has ended with it: send the request again"
    if has_content:
        return "The answer is incomplete: discard it and send the request again"
    if failure.blame is Blame.OPERATOR and failure.cause in (Cause.UNREACHABLE, Cause.MODEL_NOT_FOUND):
        return "The operator of the gateway has to look at that server, its key and its model names"
    if failure.blame is Blame.OPERATOR:
        return "Only the operator of the gateway can mend that"
    if failure.cause is Cause.UNREACHABLE and failure.aftermath is Aftermath.UNKNOWN:
        return "Check that the server runs and can be reached; send the request again"
    return _NOT_AGAIN[gave_up]


def _of_memory(call: CallFailure, prompt: str, *, has_content: bool, gave_up: GaveUp) -> str:
    """Of a suspect."""
    if call.alone:
        return f"This request{prompt} was alone on it: send a shorter prompt or ask for fewer tokens"
    if call.crowd <= 1:
        return f"This request{prompt} may be the cause: send a shorter prompt or ask for fewer tokens"
    others = f", {call.beside} on others that share its memory" if call.beside else ""
    crowd = f"Requests in flight: {call.inflight}{others}; this one{prompt} was among the largest, and may fit alone"
    if has_content:
        return f"{crowd}. The answer is incomplete: discard it and send the request again, which will run alone"
    if gave_up is GaveUp.TURN:
        return f"{crowd}; no replica was idle for it in time: send the request again later, which will run alone"
    return f"{crowd}: send the request again, which will run alone"


_NOT_AGAIN: Mapping[GaveUp, str] = {
    GaveUp.NO_REPLICA: "No other replica could take over: send the request again",
    GaveUp.TRIES: "It was not the first to fail with this request: send the request again later",
    GaveUp.TIME: "The time for this request is over (timeouts.total): ask for fewer tokens, or send it again",
    GaveUp.TURN: "No replica was idle, which it needed to run alone: send the request again later",
    GaveUp.RETRIES: "Too many requests are being tried again at the moment: send the request again",
}


def of_refusal(
    refusal: Refusal, snapshots: Sequence[Snapshot], *, model: str, show_output: bool = False, guarded: bool = False
) -> GatewayError:
    """No replica was there to take the request. ``guarded``: its prompt may be in a prompt cache whole."""
    retry_after = soonest(snapshots)
    match refusal.why:
        case Why.QUEUE_FULL:
            code = Code.OVERLOADED
            message = (
                f"model {model!r} is busy{_abandoned(snapshots)} and {refusal.queued} requests wait already "
                "(max_queue); send it again later"
            )
        case Why.DISPLACED:
            code = Code.OVERLOADED
            message = (
                f"model {model!r} is busy, and a more urgent request took the place of this one in its full queue "
                f"(max_queue) after {refusal.waited:.0f} s; send it again later"
            )
        case Why.QUEUE_TIMEOUT:
            code = Code.OVERLOADED
            unbatchable = GUARDED if guarded else UNBATCHABLE
            message = (
                f"model {model!r} was busy{_abandoned(snapshots)} for the {refusal.waited:.0f} s that this request "
                "waited (queue_timeout); " + (unbatchable if refusal.unbatchable else "send it again later")
            )
        case Why.LOADING:
            code, what, remedy = Code.MODEL_LOADING, "it is still starting", "send it again later"
            if short := _short_of_memory(snapshots):
                code, what, remedy = Code.INSUFFICIENT_MEMORY, f"it {short}", _FREE_MEMORY
            message = (
                f"model {model!r} is not ready after the {refusal.waited:.0f} s that this request waited: {what}; "
                + remedy
            )
        case Why.UNAVAILABLE:
            return _of_unavailable(snapshots, model, retry_after, show_output=show_output, patience=refusal.patience)
    return GatewayError(code=code, message=message, model=model, retry_after=retry_after)


_FREE_MEMORY = "it is loaded as soon as that is free: end what holds it, or send the request again later"


def _short_of_memory(snapshots: Sequence[Snapshot]) -> str:
    """What a replica that waits for memory has to tell, if no other is being loaded; else ""."""
    loading = [s for s in snapshots if s.loading is not None or s.state is State.STARTING]
    if not loading or not all(s.short_of_memory for s in loading):
        return ""
    return loading[0].loading.phase if loading[0].loading is not None else ""


def _abandoned(snapshots: Sequence[Snapshot]) -> str:
    count = sum(snapshot.abandoned for snapshot in snapshots)
    return f" (also with {count} requests whose clients have left)" if count else ""


def _of_unavailable(
    snapshots: Sequence[Snapshot], model: str, retry_after: float | None, *, show_output: bool, patience: float
) -> GatewayError:
    code, message = _unavailable(snapshots, model, show_output=show_output)
    if any(s.recovers and s.state is not State.READY for s in snapshots):
        message += (
            f". This request may wait {max(0.0, patience):.0f} s (queue_timeout, timeouts.total and the client's own "
            "timeout, whichever is least): send it again later"
        )
    if any(_is_looked_for(s) for s in snapshots):
        retry_after = min(LOOK_AGAIN, LOOK_AGAIN if retry_after is None else retry_after)
    elif retry_after is None and snapshots and all(s.given_up for s in snapshots):  # a person has to act first
        return GatewayError(code=code, message=message, model=model, should_retry=False, http_status=424)
    return GatewayError(
        code=code, message=message, model=model, retry_after=UNKNOWN_ETA if retry_after is None else retry_after
    )


def _is_looked_for(s: Snapshot) -> bool:
    """What is missing may appear: a disk that is mounted later, a download elsewhere."""
    down = s.given_up or s.state is State.BACKOFF
    return down and s.last_failure is not None and s.last_failure.cause is Cause.MODEL_NOT_FOUND


def _unavailable(snapshots: Sequence[Snapshot], model: str, *, show_output: bool) -> tuple[Code, str]:
    if waits := _short_of_memory(snapshots):
        return Code.INSUFFICIENT_MEMORY, f"model {model!r} is not loaded: it {waits}; {_FREE_MEMORY}"
    short = [s.last_failure for s in snapshots if s.last_failure is not None and not s.given_up]
    short = [failure for failure in short if failure.reason is Reason.NO_MEMORY]
    if short and len(short) == len(snapshots):
        return Code.INSUFFICIENT_MEMORY, f"model {model!r} cannot be loaded: {short[0].message}"
    return (
        Code.MODEL_UNAVAILABLE,
        f"no replica of model {model!r} can answer: {_reasons(snapshots, show_output=show_output)}",
    )


def soonest(snapshots: Sequence[Snapshot]) -> float | None:
    """Seconds until the first of them can probably answer; None = not known."""
    return min((s.eta for s in snapshots if s.eta is not None), default=None)


def _reasons(snapshots: Sequence[Snapshot], *, show_output: bool) -> str:
    return "; ".join(_reason(snapshot, show_output=show_output) for snapshot in snapshots) or "it has none"


def _reason(s: Snapshot, *, show_output: bool) -> str:
    last = f" after {s.last_failure.cause.value}: {_told(s.last_failure, show_output)}" if s.last_failure else ""
    match s.state:
        case _ if s.given_up:
            again = " once that has changed" if s.retry_in is None else _in(s.retry_in)
            return f"{s.id} {s.note or 'gave up'}{last}; it starts again by itself{again}"
        case State.BACKOFF | State.STOPPING if s.state is State.BACKOFF or s.eta is not None:
            often = " has failed again and again; it" if s.crash_looping else ""
            ready = f" and should be ready{_in(s.eta)}" if s.eta is not None and s.eta_known else ""
            return f"{s.id}{often} starts again{_in(s.retry_in)}{ready}{last}"
        case State.UNREACHABLE:
            return f"{s.id} is unreachable{last}"
        case State.WAITING_FOR_MEMORY if s.note:
            return f"{s.id} {s.note}{last}"
        case _:
            return f"{s.id} is {s.state.value}{last}"


def _in(seconds: float | None) -> str:
    return "" if seconds is None else f" in about {max(1, round(seconds))} s"

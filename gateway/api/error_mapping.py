"""Failures and refusals as the client is told of them. Pure."""

from collections.abc import Mapping, Sequence

from backends.domain.failure import Aftermath, Blame, Cause, Failure
from backends.domain.refusal import Refusal, Why
from backends.domain.snapshot import Snapshot
from backends.domain.state import State
from gateway.api.errors import Code, GatewayError

# The error code that a client gets for each cause; None where no error of the backend is to be told.
CODE_OF: Mapping[Cause, str | None] = {
    Cause.OOM: "backend_oom",
    Cause.RESOURCE_LIMIT: "backend_oom",
    Cause.GPU_TIMEOUT: "backend_gpu_error",
    Cause.GPU_VICTIM: "backend_gpu_error",
    Cause.GPU_FAULT: "backend_gpu_error",
    Cause.NATIVE_CRASH: "backend_crashed",
    Cause.KILLED: "backend_crashed",
    Cause.DISTRIBUTED: "backend_crashed",
    Cause.WEDGE: "backend_wedged",
    Cause.STALLED: "backend_stalled",
    Cause.LOAD_FAILURE: "model_unavailable",
    Cause.MODEL_NOT_FOUND: "model_unavailable",
    Cause.DOWNLOAD: "model_unavailable",
    Cause.DISK_FULL: "model_unavailable",
    Cause.PORT_IN_USE: "model_unavailable",
    Cause.DEPENDENCY: "model_unavailable",
    Cause.START_TIMEOUT: "model_unavailable",
    Cause.UNREACHABLE: "model_unavailable",
    Cause.BAD_REQUEST: "invalid_request",
    Cause.CLIENT_GONE: None,
    Cause.NONE: None,
}

UNKNOWN_ETA = 59.0  # seconds; it takes a person, and until then nobody should hammer
MAX_EVIDENCE = 300  # characters of backend output in a message


def code_of(failure: Failure) -> Code:
    """For a request that was in flight when it happened."""
    # A key or a name that is wrong upstream is the operator's to mend, not the client's.
    if failure.code is not None and failure.code in set(Code) and failure.blame is not Blame.OPERATOR:
        return Code(failure.code)
    if failure.truncated:
        return Code.STREAM_TRUNCATED
    if failure.blame is Blame.REQUEST:
        return Code.INVALID_REQUEST if failure.cause is Cause.BAD_REQUEST else Code.GENERATION_FAILED
    if failure.blame is Blame.GATEWAY:
        return Code.MODEL_UNAVAILABLE
    if failure.cause is Cause.STALLED:
        return Code.BACKEND_STALLED
    named = CODE_OF[failure.cause]
    return Code(named) if named else Code.BACKEND_CRASHED


def of_failure(
    failure: Failure, *, model: str, suspect: bool, eta: float | None, show_output: bool, has_content: bool
) -> GatewayError:
    """``eta``: seconds until the model can probably answer again. ``has_content``: the client has a part of it."""
    message = _told(failure, show_output)
    if failure.blame is not Blame.REQUEST:
        message += ". " + _advice(failure, suspect=suspect, has_content=has_content)
    return GatewayError(
        code=code_of(failure),
        message=message,
        param=failure.param,
        model=model,
        backend=failure.backend or None,
        retry_after=failure.retry_after if failure.retry_after is not None else eta,
        should_retry=False if suspect else None,
    )


def _told(failure: Failure, show_output: bool) -> str:
    if show_output and failure.evidence and failure.evidence[0][:80] not in failure.message:
        return f'{failure.message} (its output: "{failure.evidence[0][:MAX_EVIDENCE]}")'
    return failure.message


def _advice(failure: Failure, *, suspect: bool, has_content: bool) -> str:
    if suspect and failure.cause in (Cause.OOM, Cause.RESOURCE_LIMIT):
        return "This request was alone on it: send a shorter prompt or ask for fewer tokens"
    if suspect:
        return "This request may be the cause: do not send it again unchanged"
    if has_content:
        return "The answer is incomplete: discard it and send the request again"
    if failure.blame is Blame.OPERATOR:
        return "The operator of the gateway has to look at that server, its key and its model names"
    if failure.cause is Cause.UNREACHABLE and failure.aftermath is Aftermath.UNKNOWN:
        return "Check that the server runs and can be reached; send the request again"
    return "No other replica could take over: send the request again"


def of_refusal(
    refusal: Refusal, snapshots: Sequence[Snapshot], *, model: str, show_output: bool = False
) -> GatewayError:
    """No replica was there to take the request."""
    retry_after = soonest(snapshots)
    match refusal.why:
        case Why.QUEUE_FULL:
            code = Code.OVERLOADED
            message = (
                f"model {model!r} is busy and {refusal.queued} requests wait already (max_queue); send it again later"
            )
        case Why.QUEUE_TIMEOUT:
            code = Code.OVERLOADED
            message = (
                f"model {model!r} was busy for the {refusal.waited:.0f} s that this request waited (queue_timeout); "
                "send it again later"
            )
        case Why.LOADING:
            code = Code.MODEL_LOADING
            message = (
                f"model {model!r} is still starting after the {refusal.waited:.0f} s that this request waited; "
                "send it again later"
            )
        case Why.UNAVAILABLE:
            code, message = _unavailable(snapshots, model, show_output=show_output)
    if refusal.why is Why.UNAVAILABLE and retry_after is None:
        retry_after = UNKNOWN_ETA
    return GatewayError(code=code, message=message, model=model, retry_after=retry_after)


def _unavailable(snapshots: Sequence[Snapshot], model: str, *, show_output: bool) -> tuple[Code, str]:
    short = [s.last_failure for s in snapshots if s.last_failure is not None and s.state is not State.FAILED]
    short = [failure for failure in short if failure.code == Code.INSUFFICIENT_MEMORY.value]
    if short and len(short) == len(snapshots):
        return Code.INSUFFICIENT_MEMORY, f"model {model!r} cannot be loaded: {short[0].message}"
    return (
        Code.MODEL_UNAVAILABLE,
        f"no replica of model {model!r} can answer: {_reasons(snapshots, show_output=show_output)}",
    )


def soonest(snapshots: Sequence[Snapshot]) -> float | None:
    """Seconds until the first of them can probably answer; None when nobody knows."""
    return min((s.eta for s in snapshots if s.eta is not None), default=None)


def _reasons(snapshots: Sequence[Snapshot], *, show_output: bool) -> str:
    return "; ".join(_reason(snapshot, show_output=show_output) for snapshot in snapshots) or "it has none"


def _reason(s: Snapshot, *, show_output: bool) -> str:
    last = f" after {s.last_failure.cause.value}: {_told(s.last_failure, show_output)}" if s.last_failure else ""
    match s.state:
        case State.FAILED:
            return f"{s.id} {s.note or 'gave up'}{last}; mend that, then start it again"
        case State.BACKOFF | State.STOPPING if s.state is State.BACKOFF or s.eta is not None:
            return f"{s.id} starts again{_in(s.eta)}{last}"
        case State.UNREACHABLE:
            return f"{s.id} is unreachable{last}"
        case _:
            return f"{s.id} is {s.state.value}{last}"


def _in(eta: float | None) -> str:
    return "" if eta is None else f" and should be ready in about {max(1, round(eta))} s"

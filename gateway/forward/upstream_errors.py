"""The errors that a backend reports itself, in an answer or in its stream, as a CallFailure. Pure."""

from backends.admission.lease import Lease
from backends.diagnosis.error_answers import AnswerVerdict, judge_event
from backends.domain.failure import (
    Aftermath,
    Blame,
    CallFailure,
    Cause,
    CodeMeaning,
    Failure,
    Reason,
    UpstreamReport,
)
from backends.upstream.exchange import Head
from gateway.api.error_mapping import CODES
from gateway.api.kinds import Kind
from gateway.request import ParsedRequest
from gateway.stream.error_shapes import UpstreamError


def of_answer(lease: Lease, answer: AnswerVerdict, head: Head) -> CallFailure:
    """An answer with an error status. What another gateway says of retrying is taken over."""
    hide = lease.spec.secrets.hide
    after = head.get(b"retry-after")
    retry_after = float(after) if answer.retry_after is None and after.isdigit() else answer.retry_after
    verdict = Failure(
        cause=answer.cause,
        aftermath=Aftermath.WEDGED if answer.cause is Cause.WEDGE else Aftermath.ALIVE,
        message=f"{lease.spec.id} answered with status {head.status}{head.through}: {hide(answer.message).rstrip('.')}",
        blame=answer.blame,
        backend=lease.spec.id,
        generation=lease.generation,
        reason=answer.reason,
    )
    no_retry = head.get(b"x-should-retry") == b"false" and answer.blame is not Blame.REQUEST
    param = None if answer.param is None else hide(answer.param)
    report = UpstreamReport(answer.code, param, retry_after, no_retry)
    return CallFailure(verdict, sent=answer.sent, doubtful=answer.doubtful, upstream=report)


def of_event(lease: Lease, error: UpstreamError) -> CallFailure:
    """An error event in a stream, of another gateway or of any other server."""
    means, doubtful = CODES.get(error.code or ""), False
    code = error.code if means is not None else None
    if means is None:
        said = judge_event(error.message, error.code)
        means, doubtful = CodeMeaning(said.cause, said.blame, said.sent), said.doubtful
    verdict = Failure(
        cause=means.cause,
        aftermath=Aftermath.ALIVE,
        message=f"{lease.spec.id}: {lease.spec.secrets.hide(error.message).rstrip('.')}",
        blame=means.blame,
        backend=lease.spec.id,
        generation=lease.generation,
    )
    return CallFailure(verdict, sent=means.sent, doubtful=doubtful, upstream=UpstreamReport(code))


def of_lost_call(lease: Lease, parsed: ParsedRequest, *, cut: bool, what: str = "") -> CallFailure:
    """A tool call that an answer claims, or began, and does not have. ``cut``: its limit on tokens ended it."""
    if cut:
        reason, param = Reason.CUT_CALL, _limit_of(parsed)
        limit = f"{param} ({parsed.max_tokens})" if parsed.max_tokens else "the server's default max_tokens"
        message = f"a tool call of the model was cut off by {limit}, and is not in the answer; send a larger {param}"
    elif parsed.kind is Kind.COMPLETION:
        reason, param = Reason.LOST_CALL, None
        message = (
            f"{what}: the server took text of the model for one, and completions have no place for it; "
            "use chat completions, or another prompt"
        )
    else:
        reason, param = Reason.LOST_CALL, None
        message = (
            f"{what or 'a tool call of the model is not in the answer'}: the server could not read what the model "
            "wrote; check that it knows the tool format of this model, or ask again with another temperature or seed"
        )
    verdict = Failure(
        Cause.NONE,
        Aftermath.ALIVE,
        f"{lease.spec.id}: {message}",
        Blame.REQUEST,
        lease.spec.id,
        lease.generation,
        reason=reason,
    )
    return CallFailure(verdict, doubtful=True, upstream=UpstreamReport(param=param))


def _limit_of(parsed: ParsedRequest) -> str:
    """As the client named it."""
    return "max_completion_tokens" if "max_completion_tokens" in parsed.normalized else "max_tokens"

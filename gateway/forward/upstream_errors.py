"""The errors that a backend reports itself, in an answer or in its stream, as a CallFailure. Pure."""

from backends.admission.lease import Lease
from backends.diagnosis.error_answers import AnswerVerdict, judge_event
from backends.domain.failure import Aftermath, Blame, CallFailure, Cause, CodeMeaning, Failure, UpstreamReport
from backends.upstream.exchange import Head
from gateway.api.error_mapping import CODES
from gateway.stream.interpreter import UpstreamError


def of_answer(lease: Lease, answer: AnswerVerdict, head: Head) -> CallFailure:
    """An answer with an error status. What another gateway says of retrying is taken over."""
    hide = lease.spec.secrets.hide
    after = head.get(b"retry-after")
    retry_after = float(after) if answer.retry_after is None and after.isdigit() else answer.retry_after
    verdict = Failure(
        cause=answer.cause,
        aftermath=Aftermath.WEDGED if answer.cause is Cause.WEDGE else Aftermath.ALIVE,
        message=f"{lease.spec.id} answered with status {head.status}{head.through}: {hide(answer.message)}",
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
        message=f"{lease.spec.id}: {lease.spec.secrets.hide(error.message)}",
        blame=means.blame,
        backend=lease.spec.id,
        generation=lease.generation,
    )
    return CallFailure(verdict, sent=means.sent, doubtful=doubtful, upstream=UpstreamReport(code))

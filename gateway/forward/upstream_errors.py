"""The errors that a backend reports itself, in an answer or in its stream, as a CallFailure. Pure."""

from backends.admission.lease import Lease
from backends.diagnosis.error_answers import AnswerVerdict
from backends.domain.failure import Aftermath, Blame, CallFailure, Cause, Failure, UpstreamReport
from backends.upstream.exchange import Head
from gateway.api.error_mapping import CODES
from gateway.api.errors import Code
from gateway.stream.interpreter import UpstreamError


def of_answer(lease: Lease, answer: AnswerVerdict, head: Head) -> CallFailure:
    """An answer with an error status. What another gateway says of retrying is taken over."""
    after = head.get(b"retry-after")
    retry_after = float(after) if answer.retry_after is None and after.isdigit() else answer.retry_after
    verdict = Failure(
        cause=answer.cause,
        aftermath=Aftermath.WEDGED if answer.cause is Cause.WEDGE else Aftermath.ALIVE,
        message=f"{lease.spec.id} answered with status {head.status}: {answer.message}",
        blame=answer.blame,
        backend=lease.spec.id,
        generation=lease.generation,
        reason=answer.reason,
    )
    no_retry = head.get(b"x-should-retry") == b"false" and answer.blame is not Blame.REQUEST
    report = UpstreamReport(answer.code, answer.param, retry_after, no_retry)
    return CallFailure(verdict, sent=answer.sent, upstream=report)


def of_event(lease: Lease, error: UpstreamError) -> CallFailure:
    """An error event in a stream, of another gateway or of any other server."""
    code = error.code if error.code is not None and error.code in CODES else Code.GENERATION_FAILED.value
    means = CODES[code]
    verdict = Failure(
        cause=means.cause,
        aftermath=Aftermath.ALIVE,
        message=f"{lease.spec.id}: {error.message}",
        blame=means.blame,
        backend=lease.spec.id,
        generation=lease.generation,
    )
    return CallFailure(verdict, sent=means.sent, upstream=UpstreamReport(code))

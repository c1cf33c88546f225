"""What a backend says of itself, in an answer or in its stream, as a Failure. Pure."""

from backends.admission.lease import Lease
from backends.diagnosis.error_answers import CODES, AnswerVerdict
from backends.domain.failure import Aftermath, Blame, Cause, Failure, Sent
from backends.upstream.exchange import Head
from gateway.api.errors import Code
from gateway.stream.interpreter import UpstreamError

# What another gateway answers when it has not begun to generate.
TURNED_AWAY = frozenset(
    {
        Code.OVERLOADED,
        Code.MODEL_LOADING,
        Code.MODEL_UNAVAILABLE,
        Code.SHUTTING_DOWN,
        Code.INSUFFICIENT_MEMORY,
        Code.INVALID_API_KEY,
        Code.MODEL_NOT_FOUND,
    }
)


def of_answer(lease: Lease, answer: AnswerVerdict, head: Head) -> Failure:
    """An answer with an error status. What another gateway says of retrying is taken over."""
    after = head.get(b"retry-after")
    retry_after = float(after) if answer.retry_after is None and after.isdigit() else answer.retry_after
    return Failure(
        cause=answer.cause,
        aftermath=Aftermath.WEDGED if answer.cause is Cause.WEDGE else Aftermath.ALIVE,
        sent=Sent.NOTHING if answer.code in TURNED_AWAY else Sent.MAYBE,
        message=f"{lease.spec.id} answered with status {head.status}: {answer.message}",
        blame=answer.blame,
        backend=lease.spec.id,
        generation=lease.generation,
        code=answer.code,
        param=answer.param,
        retry_after=retry_after,
        no_retry=head.get(b"x-should-retry") == b"false" and answer.blame is not Blame.REQUEST,
    )


def of_event(lease: Lease, error: UpstreamError) -> Failure:
    """An error event in a stream, of another gateway or of any other server."""
    known = error.code if error.code in CODES else None
    cause, blame = CODES[known] if known else (Cause.NONE, Blame.REQUEST)
    return Failure(
        cause=cause,
        aftermath=Aftermath.ALIVE,
        sent=Sent.NOTHING if known in TURNED_AWAY else Sent.MAYBE,
        message=f"{lease.spec.id}: {error.message}",
        blame=blame,
        backend=lease.spec.id,
        generation=lease.generation,
        code=known or Code.GENERATION_FAILED.value,
    )

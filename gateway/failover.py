"""The whole retry policy. (failure, what the client has seen, what was tried) -> try another replica, or say so.

Pure.
"""

from dataclasses import dataclass

from backends.failure import Blame, Cause, Failure, Sent
from gateway.relay import Seen

MAX_ATTEMPTS = 2  # generations of one request; an attempt that cannot have reached its backend does not count
MAX_TRIES = 6  # all the same: no request wanders for ever
VICTIM_PAUSE = 2.0  # seconds; a GPU reset hits all processes on that GPU, so the sibling is being hit too

# The same request would do the same to the next replica: context times prefill step does not fit, too many buffers.
DETERMINISTIC = frozenset({Cause.OOM, Cause.RESOURCE_LIMIT})


@dataclass(frozen=True, slots=True)
class Situation:
    """``generations``: attempts that may have reached a backend, this one included; ``tries``: all of them.
    ``left``: seconds until the request's total deadline, None without one. ``alone``: it was alone at each failure."""

    failure: Failure
    seen: Seen
    generations: int
    tries: int
    left: float | None = None
    alone: bool = True


@dataclass(frozen=True, slots=True)
class TryNext:
    pause: float = 0.0  # seconds


@dataclass(frozen=True, slots=True)
class Surface:
    """Tell the client. ``suspect``: this request may itself be the cause, so nobody should send it again."""

    suspect: bool = False


def alone(failure: Failure) -> bool:
    """The request was the only one in flight, as far as is known, and can have reached the backend."""
    return failure.companions == 0 and failure.sent is Sent.MAYBE


def decide(now: Situation) -> TryNext | Surface:
    failure = now.failure
    if failure.blame is Blame.REQUEST:
        return Surface()
    if failure.suspect or (failure.cause in DETERMINISTIC and alone(failure)):
        return Surface(suspect=True)
    if now.seen in (Seen.SPEAKING, Seen.DONE):
        return Surface()
    if now.tries >= MAX_TRIES:
        return Surface()
    if failure.sent is Sent.MAYBE and now.generations >= MAX_ATTEMPTS:
        blamed = failure.blame is Blame.BACKEND and not failure.truncated
        return Surface(suspect=blamed and now.alone and alone(failure))
    pause = VICTIM_PAUSE if failure.cause is Cause.GPU_VICTIM else 0.0
    if now.left is not None and now.left <= pause:
        return Surface()
    return TryNext(pause)

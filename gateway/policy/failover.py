"""The whole retry policy. (failure, what the client has seen, what was tried) -> try another instance, or say so.

Where memory ran out under a crowd each of its suspects may fit alone: it is tried again apart from all others that use
the memory, after the bystanders. One that was alone is not: it would do the same again. A request that was no suspect
and fails so a second time has an attempt apart as well, beyond ``MAX_ATTEMPTS``: it may have been in the wrong company
twice.

Pure.
"""

from dataclasses import dataclass

from backends.admission.slot_request import Isolation
from backends.diagnosis.suspects import MEMORY
from backends.domain.failure import Aftermath, Blame, CallFailure, Cause, Reason, Sent
from gateway.stream.relay import Seen
from gateway.stream.resume import CATCH_UP_LIMIT

MAX_ATTEMPTS = 2  # generations of one request; an attempt that cannot have reached its backend does not count
CROWD_PAUSE = 1.0  # seconds; by then all of a crowd are queued: the bystanders go first, and the smallest suspect next
MAX_TRIES = 6  # of all kinds, so that the attempts of a request are bounded
VICTIM_PAUSE = 2.0  # seconds; a GPU reset hits all processes on that GPU, so it hits the sibling too


@dataclass(frozen=True, slots=True)
class Situation:
    """``generations``: attempts that may have reached a backend, this one included; ``tries``: all of them.
    ``left``: seconds until the request's total deadline, None without one. ``suspected``: it was at each failure.
    ``replay``: seconds that another replica would take to come as far as the client has been brought, from where it
    could go on; None = it could not, or that was tried already. ``isolation``: of this attempt."""

    failure: CallFailure
    seen: Seen
    generations: int
    tries: int
    left: float | None = None
    suspected: bool = False
    replay: float | None = None
    isolation: Isolation = Isolation.SHARED


@dataclass(frozen=True, slots=True)
class TryNext:
    """``isolation``: at least. ``elsewhere``: only where other memory is used. ``counts``: against the retry budget.
    ``same``: on the same replica too, where no other is ready."""

    pause: float = 0.0  # seconds
    isolation: Isolation = Isolation.SHARED
    elsewhere: bool = False
    counts: bool = False
    same: bool = False


@dataclass(frozen=True, slots=True)
class Resume:
    """Go on with the answer in its middle, on another instance of the same model; the rest as for ``TryNext``."""

    pause: float = 0.0  # seconds
    isolation: Isolation = Isolation.SHARED
    counts: bool = False


@dataclass(frozen=True, slots=True)
class Surface:
    """Tell the client. ``suspect``: this request may itself be the cause, so it should not be sent again."""

    suspect: bool = False


def decide(now: Situation) -> TryNext | Resume | Surface:
    failure = now.failure
    if failure.verdict.reason is Reason.PROMPT_CACHED and now.tries < MAX_TRIES:
        return TryNext()  # another replica may have it cached in part; the attempt was made so that it can do no harm
    if failure.verdict.blame is Blame.REQUEST and not (failure.doubtful and now.seen in (Seen.WAITING, Seen.OPEN)):
        return Surface()
    if failure.upstream.no_retry:
        return Surface(suspect=True)
    # The same request would do the same to every replica that shares the memory.
    too_much = failure.alone and failure.verdict.cause in MEMORY
    apart = _may_fit_apart(now)
    pause, isolation = _pause(failure, apart=apart), _isolation(failure, apart=apart)
    in_time = now.left is None or now.left > pause
    if now.seen is Seen.SPEAKING and (apart or _may_go_on(now, too_much=too_much)) and _can_catch_up(now, pause):
        return Resume(pause, isolation, counts=not apart and _adds_load(failure))
    if now.seen in (Seen.SPEAKING, Seen.DONE):
        return Surface(suspect=too_much or (now.suspected and bool(now.isolation) and not is_crowd(failure)))
    if now.tries >= MAX_TRIES:
        return Surface(suspect=too_much)
    if failure.sent is Sent.MAYBE and now.generations >= MAX_ATTEMPTS and not apart:
        return Surface(suspect=too_much or (now.suspected and not is_crowd(failure)))
    if not in_time:
        return Surface(suspect=too_much)
    lost_call = failure.verdict.reason in (Reason.LOST_CALL, Reason.CUT_CALL)  # sampled anew it may differ
    return TryNext(
        pause,
        isolation,
        elsewhere=too_much,
        counts=not apart and _adds_load(failure),
        same=lost_call or failure.doubtful,
    )


def is_crowd(failure: CallFailure) -> bool:
    """Memory ran out with this request in flight among others, each of which may fit alone."""
    of_backend = failure.verdict.blame is Blame.BACKEND and failure.verdict.cause in MEMORY
    return of_backend and failure.sent is Sent.MAYBE and failure.crowd > 1


def _may_fit_apart(now: Situation) -> bool:
    """As long as that was not tried. It adds no load: such requests run one by one."""
    return (
        is_crowd(now.failure)
        and now.isolation is not Isolation.APART
        and (now.failure.suspect or now.generations >= MAX_ATTEMPTS)
    )


def _may_go_on(now: Situation, *, too_much: bool) -> bool:
    """A suspect once, alone: that tells whether it was the cause."""
    return not too_much and not (now.failure.suspect and now.isolation)


def _isolation(failure: CallFailure, *, apart: bool) -> Isolation:
    if apart:
        return Isolation.APART
    return Isolation.ALONE if failure.suspect else Isolation.SHARED


def _pause(failure: CallFailure, *, apart: bool) -> float:
    if failure.verdict.cause is Cause.GPU_VICTIM:
        return VICTIM_PAUSE
    return CROWD_PAUSE if apart else 0.0


def _can_catch_up(now: Situation, pause: float) -> bool:
    """Before the client's patience, or its deadline, is over."""
    if now.replay is None or now.tries >= MAX_TRIES:
        return False
    return pause + now.replay < (CATCH_UP_LIMIT if now.left is None else min(CATCH_UP_LIMIT, now.left))


def _adds_load(failure: CallFailure) -> bool:
    """A running process may still work on the request; one that has ended, or is being ended, does not, and suspects of
    its end run one by one. What was moved from a replica that another request occupies goes where there is room, or
    waits."""
    if failure.verdict.reason in (Reason.OCCUPIED, Reason.NO_ROOM):
        return False
    return failure.sent is Sent.MAYBE and failure.verdict.aftermath is Aftermath.ALIVE

"""Restart policy: when a failed replica is started again, and when it is given up.

A *life* is one process, or one launch that failed. A life that answered a client's request is followed by the next one
after ``min_backoff``, whatever was before. Lives that never answered make the back-off longer, with jitter; too many of
them within ``window``, and the replica is crash looping: it is tried once per ``max_backoff``. Given up is only what
has never been ready and fails in the same hopeless way each time.

Pure: time and chance come in as arguments.
"""

from dataclasses import dataclass, replace

from backends.domain.failure import Blame, Cause, Failure, Reason
from backends.domain.spec import RestartPolicy

# The same launch would fail in the same way, and load gigabytes each time. ``DEPENDENCY`` includes flags that the
# program does not know.
_HOPELESS = frozenset({Cause.LOAD_FAILURE, Cause.MODEL_NOT_FOUND, Cause.DEPENDENCY, Cause.DISTRIBUTED})


@dataclass(frozen=True, slots=True)
class History:
    """Of the lives since the last good one. ``failures``: when those within the window ended, oldest first. ``streak``:
    number of all of them. ``looping``: there were too many within the window. ``alike``: the latest of them in a row
    that were hopeless and had the same ``cause``. ``failed_at``: when the last life failed, good or not."""

    failures: tuple[float, ...] = ()
    streak: int = 0
    looping: bool = False
    cause: Cause = Cause.NONE
    alike: int = 0
    failed_at: float | None = None

    @property
    def forgiven(self) -> "History":
        return History(failed_at=self.failed_at)

    def failed_lately(self, policy: RestartPolicy, now: float) -> bool:
        return self.failed_at is not None and now - self.failed_at < policy.window


@dataclass(frozen=True, slots=True)
class Retry:
    delay: float  # seconds


@dataclass(frozen=True, slots=True)
class GiveUp:
    """``again``: seconds until it is tried once more, although nothing is seen to have changed; None = not before."""

    reason: str
    again: float | None = None


def was_good(policy: RestartPolicy, *, answered: bool, ready_for: float) -> bool:
    """A life shows that the replica works if it answered a request of a client in full. The token for the readiness
    probe does not: a replica that dies at each first request generates that one too. Nor does a part of an answer. One
    that nobody asked was good if it was ready for ``max_backoff`` seconds: the longest back-off would gain no more."""
    return answered or ready_for >= policy.max_backoff


def record(history: History, policy: RestartPolicy, failure: Failure, *, now: float, good: bool) -> History:
    """The history with one more life, which failed at ``now``. A failure that says nothing of the model only makes the
    back-off longer; one for which others hold the memory does not even that: the next start waits for the memory."""
    if good:
        return History(failed_at=now)
    if failure.reason is Reason.CROWDED_OUT:
        return history
    history = replace(history, streak=history.streak + 1)
    if passes(failure):
        return history
    history = replace(history, failed_at=now)
    if failure.shared:
        return history
    recent = (*(at for at in history.failures if now - at < policy.window), now)
    cause = failure.cause if hopeless(failure) else Cause.NONE
    alike = 0 if cause is Cause.NONE else history.alike + 1 if cause is history.cause else 1
    looping = history.looping or len(recent) >= policy.max_failures
    return replace(history, failures=recent, looping=looping, cause=cause, alike=alike)


def passes(failure: Failure) -> bool:
    """The gateway was short of something: neither a sign about the model nor one that lasts."""
    return failure.reason is Reason.EXHAUSTED


def hopeless(failure: Failure) -> bool:
    """It fails in the same way until a person, or another program, changes what it rests on. A full disk, a port that
    is taken, a kill or a shortage of memory may pass."""
    return failure.cause in _HOPELESS and failure.blame is not Blame.MACHINE


def decide(history: History, policy: RestartPolicy, failure: Failure, *, proven: bool, chance: float) -> Retry | GiveUp:
    """``history``: with this failure. ``proven``: the replica has been ready before. ``chance``: uniform in [0, 1)."""
    if not proven and hopeless(failure) and history.alike >= policy.max_failures:
        # No file shows whether another host of a distributed model is back.
        unseen = failure.cause is Cause.DISTRIBUTED
        why = f"it has never been ready, and has failed {history.alike} times in a row in the same way"
        return GiveUp(why, policy.max_backoff if unseen else None)
    if not history.streak or failure.reason is Reason.CROWDED_OUT:
        return Retry(policy.min_backoff)
    doubled = min(policy.max_backoff, policy.min_backoff * 2.0 ** min(history.streak - 1, 30))
    delay = policy.max_backoff if history.looping else doubled
    return Retry(min(policy.max_backoff, delay * (0.75 + 0.5 * chance)))

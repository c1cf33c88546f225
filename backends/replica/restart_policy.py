"""Restart policy: when a failed replica is started again, and when it is given up.

Exponential back-off with jitter; a reset of the back-off after good service; the longest back-off for one that fails
again and again. Given up is only what has never been ready and fails in the same hopeless way each time.

Pure: time and chance come in as arguments.
"""

from dataclasses import dataclass

from backends.domain.failure import Blame, Cause, Failure, Reason
from backends.domain.spec import RestartPolicy

# The same launch would fail in the same way, and load gigabytes each time. ``DEPENDENCY`` includes flags that the
# program does not know.
_HOPELESS = frozenset({Cause.LOAD_FAILURE, Cause.MODEL_NOT_FOUND, Cause.DEPENDENCY, Cause.DISTRIBUTED})

GPU_RESET_PAUSE = 2.0  # seconds until a GPU has recovered from a reset


@dataclass(frozen=True, slots=True)
class History:
    """``failures``: times of the failures within the window, oldest first. ``streak``: failures since good service.
    ``looping``: there were too many within the window, and no good service since. ``alike``: the latest failures in a
    row that were hopeless and had the same ``cause``."""

    failures: tuple[float, ...] = ()
    streak: int = 0
    looping: bool = False
    cause: Cause = Cause.NONE
    alike: int = 0

    def recent(self, policy: RestartPolicy, now: float) -> tuple[float, ...]:
        """The failures within the window that ends now."""
        return tuple(at for at in self.failures if now - at < policy.window)


@dataclass(frozen=True, slots=True)
class Retry:
    delay: float  # seconds


@dataclass(frozen=True, slots=True)
class GiveUp:
    """``again``: seconds until it is tried once more, although nothing is seen to have changed; None = not before."""

    reason: str
    again: float | None = None


def record(history: History, policy: RestartPolicy, failure: Failure, *, now: float, served: float) -> History:
    """The history with one more failure at ``now``, of an instance that had been ready for ``served`` seconds. One that
    passes only makes the back-off longer.

    An instance that was ready for at least ``max_backoff`` shows that the back-off was long enough: the streak starts
    again at 1.
    """
    good = served >= policy.max_backoff
    streak = 1 if good else history.streak + 1
    recent, looping = history.recent(policy, now), history.looping and not good
    if passes(failure):
        return History(recent, streak, looping, history.cause, history.alike)
    recent = (*recent, now)
    cause = failure.cause if hopeless(failure) else Cause.NONE
    alike = 0 if cause is Cause.NONE else history.alike + 1 if cause is history.cause else 1
    return History(recent, streak, looping or len(recent) >= policy.max_failures, cause, alike)


def passes(failure: Failure) -> bool:
    """The gateway was short of something: neither a sign about the model nor one that lasts."""
    return failure.reason is Reason.EXHAUSTED


def hopeless(failure: Failure) -> bool:
    """It fails in the same way until a person, or another program, changes what it rests on. A full disk, a port that
    is taken, a kill or a shortage of memory may pass."""
    return failure.cause in _HOPELESS and failure.blame is not Blame.MACHINE


def decide(history: History, policy: RestartPolicy, failure: Failure, *, proven: bool, chance: float) -> Retry | GiveUp:
    """``proven``: the replica has been ready before. ``chance``: uniform in [0, 1)."""
    if failure.shared:
        return Retry(max(GPU_RESET_PAUSE, policy.min_backoff) * (1 + chance))
    if not proven and hopeless(failure) and history.alike >= policy.max_failures:
        # No file shows whether another host of a distributed model is back.
        unseen = failure.cause is Cause.DISTRIBUTED
        why = f"it has never been ready, and has failed {history.alike} times in a row in the same way"
        return GiveUp(why, policy.max_backoff if unseen else None)
    doubled = min(policy.max_backoff, policy.min_backoff * 2.0 ** min(history.streak - 1, 30))
    delay = policy.max_backoff if history.looping else doubled
    return Retry(min(policy.max_backoff, delay * (0.75 + 0.5 * chance)))

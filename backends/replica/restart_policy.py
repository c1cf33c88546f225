"""Restart policy: when a failed replica is started again, and when it is given up.

Exponential back-off with jitter, a limit on failures within a sliding window, a reset of the back-off after good
service.

Pure: time and chance come in as arguments.
"""

from dataclasses import dataclass

from backends.domain.failure import Blame, Cause, Failure, Reason
from backends.domain.spec import RestartPolicy

# Only the operator can fix these: the same launch would fail in the same way, and load gigabytes each time.
NEEDS_OPERATOR = frozenset({Cause.LOAD_FAILURE, Cause.MODEL_NOT_FOUND, Cause.DEPENDENCY, Cause.DISK_FULL})

GPU_RESET_PAUSE = 2.0  # seconds until a GPU has recovered from a reset


@dataclass(frozen=True, slots=True)
class History:
    """``failures``: times of the failures within the window, oldest first. ``streak``: failures since good service."""

    failures: tuple[float, ...] = ()
    streak: int = 0

    def recent(self, policy: RestartPolicy, now: float) -> tuple[float, ...]:
        """The failures within the window that ends now."""
        return tuple(at for at in self.failures if now - at < policy.window)


@dataclass(frozen=True, slots=True)
class Retry:
    delay: float  # seconds


@dataclass(frozen=True, slots=True)
class GiveUp:
    reason: str


def record(
    history: History, policy: RestartPolicy, failure: Failure | None = None, *, now: float, served: float
) -> History:
    """The history with one more failure at ``now``, of an instance that had been ready for ``served`` seconds. One that
    passes only makes the back-off longer.

    An instance that was ready for at least ``max_backoff`` shows that the back-off was long enough: the streak starts
    again at 1.
    """
    streak = 0 if served >= policy.max_backoff else history.streak
    counted = () if failure is not None and passes(failure) else (now,)
    return History((*history.recent(policy, now), *counted), streak + 1)


def passes(failure: Failure) -> bool:
    """The gateway was short of something: neither a sign about the model nor one that lasts."""
    return failure.reason is Reason.EXHAUSTED


def stays(failure: Failure) -> bool:
    """It fails in the same way until a person, or another program, changes the files that it rests on. A full disk, a
    port that is taken or a shortage of memory may pass unseen."""
    return failure.cause in NEEDS_OPERATOR - {Cause.DISK_FULL} and failure.blame is not Blame.MACHINE


def decide(history: History, policy: RestartPolicy, failure: Failure, *, proven: bool, chance: float) -> Retry | GiveUp:
    """``proven``: the replica was ready since the operator last started it. ``chance``: uniform in [0, 1)."""
    if failure.shared:
        return Retry(max(GPU_RESET_PAUSE, policy.min_backoff) * (1 + chance))
    if failure.cause in NEEDS_OPERATOR and failure.blame is not Blame.MACHINE and not proven:
        return GiveUp("it has never been ready, and starting it again would not help")
    if len(history.failures) >= policy.max_failures and not passes(failure):
        return GiveUp(f"{len(history.failures)} failures within {policy.window:g} s")
    delay = min(policy.max_backoff, policy.min_backoff * 2.0 ** min(history.streak - 1, 30))
    return Retry(min(policy.max_backoff, delay * (0.75 + 0.5 * chance)))

"""Failures that are one and the same: a reset of the GPU hits every process on it, ours among others.

The first that is told of one counts as its own failure; what its siblings tell within a few seconds does not: nobody is
given up for what happened to all, and their restarts wait until the GPU has come to rest. Pure.
"""

from backends.domain.failure import Cause, Failure

SHARED = frozenset({Cause.GPU_VICTIM, Cause.GPU_TIMEOUT, Cause.GPU_FAULT})
WITHIN = 10.0  # seconds


class Incidents:
    """Of this machine."""

    def __init__(self) -> None:
        self._backend = ""
        self._at = 0.0

    def is_part_of_another(self, failure: Failure, now: float) -> bool:
        """Whether it belongs to what a sibling has just failed of; else it may be the first of its kind."""
        if failure.cause not in SHARED:
            return False
        if self._backend and now - self._at < WITHIN:
            return failure.backend != self._backend
        self._backend, self._at = failure.backend, now
        return False

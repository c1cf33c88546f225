"""Slow start of one replica after a failure: a cold process may crash again under full load.

Begins with one slot; one more for each answered request, and one more every ``RAMP / (limit - 1)`` seconds. The only
replica of a model, whose requests all wait for it, has one only after a failure that load explains.

Pure: time is an argument.
"""

import math
from dataclasses import dataclass

from backends.domain.failure import Cause

# What fewer requests at a time may avoid.
_BY_LOAD = frozenset({Cause.OOM, Cause.RESOURCE_LIMIT, Cause.GPU_TIMEOUT, Cause.GPU_VICTIM, Cause.GPU_FAULT})

RAMP = 30.0  # seconds until all slots are open again, even without requests


def is_due(cause: Cause, *, unanswered: int, accompanied: bool) -> bool:
    """After a failure by ``cause``. ``unanswered``: processes in a row that failed before they answered; the first may
    have been killed in the middle of its first answer. ``accompanied``: another replica of the model takes requests
    meanwhile."""
    return accompanied or unanswered > 1 or cause in _BY_LOAD


@dataclass(slots=True)
class SlowStart:
    """``began``: event loop time; -inf = long ago."""

    began: float = -math.inf
    answered: int = 0

    def begin(self, now: float) -> None:
        self.began, self.answered = now, 0

    def allowance(self, limit: int, now: float) -> int:
        """Requests that may be in flight at once."""
        elapsed = now - self.began
        if elapsed >= RAMP:
            return limit
        return min(limit, 1 + self.answered + int((limit - 1) * max(0.0, elapsed) / RAMP))

    def next_step(self, limit: int, now: float) -> float | None:
        """Seconds until time alone opens one more slot; None when all ``limit`` slots are open."""
        if self.allowance(limit, now) >= limit:
            return None
        step = RAMP / (limit - 1)
        return step - max(0.0, now - self.began) % step

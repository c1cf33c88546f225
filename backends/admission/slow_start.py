"""Slow start of one replica after any failure: a cold process that gets its whole share at once goes down with it.

One request is let in, one more for each that was answered, and one more every few seconds in any case.

Pure: time comes in as an argument.
"""

import math
from dataclasses import dataclass

RAMP = 30.0  # seconds until a backend has its whole share again, even if nobody asks


@dataclass(slots=True)
class SlowStart:
    """``began``: the event loop's time; -inf = long ago."""

    began: float = -math.inf
    answered: int = 0

    def begin(self, now: float) -> None:
        self.began, self.answered = now, 0

    def allowance(self, limit: int, now: float) -> int:
        """How many requests at once."""
        elapsed = max(0.0, now - self.began)
        if elapsed >= RAMP:
            return limit
        return min(limit, 1 + self.answered + int((limit - 1) * elapsed / RAMP))

    def next_step(self, limit: int, now: float) -> float | None:
        """Seconds until time alone lets one more in; None when it has its whole share."""
        if self.allowance(limit, now) >= limit:
            return None
        step = RAMP / (limit - 1)
        return step - max(0.0, now - self.began) % step

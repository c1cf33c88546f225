"""The memory that a replica's batch may take, as running out of it has shown: additive up, multiplicative down.

What the formulas leave out (other programs, fragmentation, a kernel that needs more) shows only when memory runs out.
Where that happened to a crowd, the next one gets less; while requests are answered the limit grows again in small
steps, until it is what the share allows. Where no share is known, it is the only limit there is, and appears with the
first failure.

Pure: time is an argument.
"""

import math
from dataclasses import dataclass

SHRINK = 0.7  # of what the batch was taken to need as memory ran out
STEP = 0.05  # of the same, by which the limit grows
PERIOD = 30.0  # seconds with answers, for each step


@dataclass(slots=True)
class RoomLimit:
    """Bytes."""

    limit: int | None = None  # None = memory has not run out, or long ago
    _step: int = 0
    _grown_at: float = -math.inf

    def ran_out(self, need: int, now: float) -> None:
        """Memory ran out with several requests in flight, whose batch was taken to need ``need`` bytes."""
        most = need if self.limit is None else min(need, self.limit)
        self.limit, self._step, self._grown_at = round(SHRINK * most), max(1, int(STEP * most)), now

    def answered(self, now: float) -> None:
        """A request was answered."""
        if self.limit is not None and now - self._grown_at >= PERIOD:
            self.limit, self._grown_at = self.limit + self._step, now

    def of(self, room: int | None) -> int | None:
        """``room``: as the share allows; None = not known."""
        if self.limit is None or room is None:
            return self.limit if room is None else room
        if self.limit >= room:
            self.limit = None
            return room
        return self.limit

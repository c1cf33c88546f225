"""The memory that a replica's batch may take, as running out of it has shown: additive up, multiplicative down.

What the formulas leave out (other programs, fragmentation, a kernel that needs more) shows only when memory runs out.
Where that happened to a crowd, the next one gets less; while requests are answered the limit grows again in small
steps, until it is what the share allows: within an hour of answers, however small the crowd was that ran out. Where no
share is known, it is the only limit there is, and appears with the first failure.

Pure: time is an argument.
"""

import math
from dataclasses import dataclass

SHRINK = 0.7  # of what the batch was taken to need as memory ran out
STEP = 0.05  # of the same, by which the limit grows
SHARE_STEP = 1 / 120  # of what the share allows, by which it grows at least: a crowd of two short requests shows little
PERIOD = 30.0  # seconds with answers, for each step


@dataclass(slots=True)
class RoomLimit:
    """Bytes."""

    limit: int | None = None  # None = memory has not run out, or long ago
    _step: int = 0
    _grown_at: float = -math.inf
    _share: int = 0  # the most that the share has allowed since; it may be less for a while

    def ran_out(self, need: int, now: float) -> None:
        """Memory ran out with several requests in flight, whose batch was taken to need ``need`` bytes."""
        most = need if self.limit is None else min(need, self.limit)
        self.limit, self._step = max(1, round(SHRINK * most)), max(1, int(STEP * most))
        self._grown_at, self._share = now, 0

    def is_due(self, now: float) -> bool:
        """It grows with the next answer."""
        return self.limit is not None and now - self._grown_at >= PERIOD

    def answered(self, room: int | None, now: float) -> None:
        """A request was answered. ``room``: as for ``of``."""
        if self.limit is None or not self.is_due(now):
            return
        self._share, self._grown_at = max(self._share, room or 0), now
        self.limit += max(self._step, math.ceil(SHARE_STEP * self._share))
        if self._share and self.limit >= self._share:
            self.limit = None

    def of(self, room: int | None) -> int | None:
        """``room``: as the share allows; None = not known."""
        if self.limit is None or room is None:
            return self.limit if room is None else room
        return min(self.limit, room)

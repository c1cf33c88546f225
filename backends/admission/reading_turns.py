"""Whose turn it is on one replica: that of a long prompt, which is read with no other beside it, or that of all others.

A batch costs as many times its longest prompt as it has members, so a long prompt and short ones that are read together
take the time of as many long ones. They take turns, which is phase-fair, as some reader-writer locks are
(B. Brandenburg and J. Anderson, 2009): neither side waits for more than one turn of the other.

    a long prompt is read    no other request is admitted
    it was read              who has come until then is admitted, together
    a long one waits         who comes later waits for the end of its reading
    its turn begins          when no prompt is being read, and the answers of the others have ended or have had their
                             share of time: beside a long prompt an answer gets one token per prefill step

A slice of a long prompt is one turn. Where one cannot be sliced, others need not wait for all of it: after ``LIMIT``
seconds they join, a few at a time.

Pure: time is an argument.
"""

import math
from dataclasses import dataclass

LIMIT = 10.0  # seconds of one turn of a long prompt
JOINERS = 2  # requests that may be read beside it then
SHARE = 0.75  # of the last turn of a long prompt: seconds that the answers of the others get before the next
LONGEST_SHARE = 3.0  # seconds


@dataclass(frozen=True, slots=True)
class Batch:
    """What is in flight on one instance. ``reading``: prompts but for the long ones, ``reading_left``: seconds until
    they are read, as expected; ``longs``: long prompts that are being read, ``long_since``: since when, ``long_left``:
    seconds until then. ``decoding``: answers that have begun. ``longest``: tokens of the longest prompt."""

    reading: int = 0
    reading_left: float = 0.0
    longs: int = 0
    long_since: float = math.inf
    long_left: float = 0.0
    decoding: int = 0
    longest: int = 0

    @property
    def members(self) -> int:
        return self.reading + self.longs + self.decoding


class ReadingTurns:
    """Of one replica. Times are in seconds, of one clock."""

    def __init__(self) -> None:
        self._ended = -math.inf  # of the last turn of a long prompt
        self._lasted = 0.0

    def ended(self, began: float, now: float) -> None:
        """A long prompt, which was admitted at ``began``, was read or given up."""
        self._ended, self._lasted = now, now - began

    @property
    def share_ends(self) -> float:
        """Until when answers keep the next long prompt waiting."""
        return self._ended + min(LONGEST_SHARE, SHARE * self._lasted)

    def admits(self, batch: Batch, now: float, *, came: float, long_came: float = math.inf) -> bool:
        """A request that is not long, and has come at ``came``. ``long_came``: when the first long one has that waits
        for this replica."""
        if batch.longs:
            return now >= batch.long_since + LIMIT and batch.reading < JOINERS
        return came < long_came or (came <= self._ended and now < self.share_ends)

    def admits_long(self, batch: Batch, now: float, *, others_came: float = math.inf) -> bool:
        """``others_came``: when the first one of those that wait and are not long has come."""
        if batch.longs or batch.reading:
            return False
        return now >= self.share_ends or (not batch.decoding and others_came > self._ended)

    def wait(self, batch: Batch, now: float) -> float:
        """Seconds until a long prompt is admitted, as expected."""
        share = self.share_ends - now if batch.decoding and not batch.longs else 0.0
        return max(0.0, share, batch.reading_left, batch.long_left)

    def changes_at(self, batch: Batch, now: float) -> float | None:
        """When the answers above may become others by time alone; None = never."""
        times = (self.share_ends, batch.long_since + LIMIT)
        return min((at for at in times if now < at < math.inf), default=None)

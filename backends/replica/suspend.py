"""Detects gaps in our own execution (system sleep, SIGSTOP), so that they are not counted as backend silence.

After such a gap the clocks have advanced, and every backend seems to have been silent for the whole gap.

Pure: no I/O, no clock.
"""

from collections.abc import Callable


class SuspendDetector:
    """``tick`` is called every ``interval`` seconds or more often; a gap longer by ``tolerance`` is a
    suspension."""

    def __init__(self, now: float, *, interval: float, tolerance: float = 3.0) -> None:
        self._longest = interval + tolerance
        self._last = now
        self._since = now

    def tick(self, now: float) -> None:
        if now - self._last > self._longest:
            self._since = now
        self._last = now

    def cap(self, seconds: float, now: float) -> float:
        """The part of the last ``seconds`` since the last gap."""
        return min(seconds, now - self._since)


class WakingClock:
    """``clock`` without such gaps: of a gap only ``interval`` seconds pass. Must be read at least that often."""

    def __init__(self, clock: Callable[[], float], *, interval: float, tolerance: float = 3.0) -> None:
        self._clock = clock
        self._interval = interval
        self._longest = interval + tolerance
        self._last = self._now = clock()

    def __call__(self) -> float:
        now = self._clock()
        passed = now - self._last
        self._last = now
        self._now += passed if passed <= self._longest else self._interval
        return self._now

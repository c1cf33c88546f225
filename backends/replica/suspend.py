"""Since when we have been here to hear anything.

A Mac that slept, or a gateway that was stopped, comes back to clocks that have moved on and to backends that seem to
have been silent all the while. Nothing may be held against them that happened in our own absence. Pure.
"""


class SuspendDetector:
    """``tick`` is called about every ``interval`` seconds; a gap of more than ``tolerance`` on top is an absence."""

    def __init__(self, now: float, *, interval: float, tolerance: float = 3.0) -> None:
        self._longest = interval + tolerance
        self._last = now
        self._since = now

    def tick(self, now: float) -> None:
        if now - self._last > self._longest:
            self._since = now
        self._last = now

    def cap(self, seconds: float, now: float) -> float:
        """As much of the last ``seconds`` as we were here for."""
        return min(seconds, now - self._since)

"""How long a request may take to arrive. Pure: takes ``now`` (seconds of any clock), returns deadlines.

Three bounds on a body, since each alone can be evaded: on the pause between two pieces (one byte a minute), on the mean
rate (a byte a second is no upload), and on the whole.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Bounds:
    """Seconds, except ``body_rate``."""

    head: float = 30.0  # from the connection, or from the end of the last answer, to a whole head
    excess_head: float = 5.0  # the same for a connection beyond the limit
    body_pause: float = 60.0  # between two pieces of a body
    body_grace: float = 30.0  # for a body of any size, beside what body_rate gives
    body_rate: float = 1024.0  # bytes per second at least
    body_total: float = 600.0
    linger: float = 30.0  # for what a client still sends after its answer
    linger_pause: float = 5.0  # between two pieces of that
    stuck: float = 120.0  # for a client that does not read its answer; requests to models end sooner


class BodyClock:
    """The arrival of one body."""

    __slots__ = ("_began", "_bounds", "_last", "_size")

    def __init__(self, bounds: Bounds, now: float) -> None:
        self._bounds = bounds
        self._began = self._last = now
        self._size = 0

    def receive(self, size: int, now: float) -> None:
        self._size += size
        self._last = now

    @property
    def deadline(self) -> float:
        b = self._bounds
        by_rate = self._began + b.body_grace + self._size / b.body_rate
        return min(self._last + b.body_pause, by_rate, self._began + b.body_total)

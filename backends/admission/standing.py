"""Where a queued request stands: how many are served before it, and in how many seconds it is its turn.

Pure: time is an argument. What is served is noted in constant time; the places of all are worked out when one is asked
for, at most once a second.
"""

from collections import deque
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from backends.domain.priority import Priority

T = TypeVar("T")

SERVED = 16  # requests of a class that its rate is learned from
FRESH = 1.0  # seconds


class Turns:
    """How often queued requests of one class are served: the mean of the last pauses between two of them."""

    def __init__(self) -> None:
        self._pauses: deque[float] = deque(maxlen=SERVED)
        self._last = 0.0  # when one was served, or the first of those that wait has come

    def begin(self, now: float) -> None:
        """From now on requests are queued; before, there were none."""
        self._last = now

    def served(self, now: float) -> None:
        self._pauses.append(now - self._last)
        self._last = now

    def eta(self, before: int, now: float) -> float | None:
        """Seconds until one that has ``before`` others of its class before it is served; None = none was served yet."""
        if not self._pauses:
            return None
        return max(0.0, (before + 1) * sum(self._pauses) / len(self._pauses) - (now - self._last))


class Standings(Generic[T]):
    """``line``: gives the queued requests with their classes, in the order in which they will be served."""

    def __init__(self, line: Callable[[float], Iterable[tuple[T, Priority]]]) -> None:
        self._line = line
        self._turns = {priority: Turns() for priority in Priority}
        self._places: dict[T, tuple[int, int]] = {}  # (all before it, those of its class)
        self._worked_out_at = -FRESH

    def begin(self, priority: Priority, now: float) -> None:
        self._turns[priority].begin(now)

    def served(self, priority: Priority, now: float) -> None:
        self._turns[priority].served(now)

    def of(self, item: T, now: float) -> tuple[int, int] | None:
        """(queued requests before it, those of its class among them); None: it has come in the last second."""
        if now - self._worked_out_at >= FRESH:
            self._work_out(now)
        return self._places.get(item)

    def eta(self, priority: Priority, before: int, now: float) -> float | None:
        """Seconds until one is served that has ``before`` others of its class before it; None = not known."""
        return self._turns[priority].eta(before, now)

    def _work_out(self, now: float) -> None:
        self._places, self._worked_out_at = {}, now
        count = dict.fromkeys(Priority, 0)
        for before, (item, priority) in enumerate(self._line(now)):
            self._places[item] = before, count[priority]
            count[priority] += 1

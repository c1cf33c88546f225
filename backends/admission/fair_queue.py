"""Whose turn it is among queued requests of several classes: weighted fair queueing, with ageing.

Each class has a *virtual time*, which grows by 1/weight with each of its requests that is served; next is the class
whose time would be the least after that (weighted fair queueing: A. Demers, S. Keshav, S. Shenker, 1989). A class in
which nobody was queued begins at the virtual time of the others, so that it has saved nothing up. Within a class the
order is that of arrival; requests that were set aside stay before the rest of their class, which may be served first.

Ageing: where slots become free slowly, one turn in twenty may be minutes away. So a class that has waited ``AGEING``
seconds for a turn, and was passed over ``PASSED_OVER`` times, is next.

Pure: time is an argument. Each step takes constant time, but for ``order``.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Generic, TypeVar

from backends.domain.priority import Priority

T = TypeVar("T")

WEIGHTS: Mapping[Priority, int] = {Priority.INTERACTIVE: 16, Priority.AGENT: 4, Priority.BACKGROUND: 1}
AGEING = 10.0  # seconds
PASSED_OVER = 4  # turns of other classes


@dataclass(slots=True)
class _Turns:
    """Of one class. ``since``: time of its last turn, or from which on it was queued."""

    priority: Priority
    virtual: float = 0.0
    since: float = 0.0
    passed_over: int = 0

    def is_due(self, now: float) -> bool:
        return self.passed_over >= PASSED_OVER and now - self.since >= AGEING

    def key(self, now: float) -> tuple[bool, float, Priority]:
        """The least is next. Among those that are due the one that has waited longest."""
        due = self.is_due(now)
        return not due, self.since if due else self.virtual + 1 / WEIGHTS[self.priority], self.priority


@dataclass(slots=True)
class _Schedule:
    """Which class is next, without its requests."""

    turns: Mapping[Priority, _Turns] = field(default_factory=lambda: {p: _Turns(p) for p in Priority})

    def begin(self, priority: Priority, others: Iterable[Priority], now: float) -> None:
        """The first request of that class is queued. ``others``: the classes that are queued already; none = what was
        before is forgotten."""
        mine, virtual = self.turns[priority], [self.turns[other].virtual for other in others]
        if not virtual:
            for turns in self.turns.values():
                turns.virtual = 0.0
        mine.virtual = max(mine.virtual, min(virtual, default=0.0))
        mine.since, mine.passed_over = now, 0

    def ranked(self, queued: Iterable[Priority], now: float) -> list[Priority]:
        return sorted(queued, key=lambda priority: self.turns[priority].key(now))

    def served(self, priority: Priority, queued: Iterable[Priority], now: float) -> None:
        mine = self.turns[priority]
        mine.virtual += 1 / WEIGHTS[priority]
        mine.since, mine.passed_over = now, 0
        for other in queued:
            if other is not priority:
                self.turns[other].passed_over += 1

    def copy(self) -> "_Schedule":
        return _Schedule({priority: replace(turns) for priority, turns in self.turns.items()})


@dataclass(slots=True)
class Line(Generic[T]):
    """The requests of one class, in their order. ``aside``: those that were set aside; ``rest``: after them."""

    aside: dict[T, None] = field(default_factory=dict)
    rest: dict[T, None] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.aside) + len(self.rest)

    def __iter__(self) -> Iterator[T]:
        return chain(self.aside, self.rest)

    @property
    def last(self) -> T:
        return next(reversed(self.rest or self.aside))


class FairQueue(Generic[T]):
    """Queued requests by class."""

    def __init__(self) -> None:
        self._lines: dict[Priority, Line[T]] = {priority: Line() for priority in Priority}
        self._schedule = _Schedule()

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def __iter__(self) -> Iterator[T]:
        """By class."""
        return (item for line in self._lines.values() for item in line)

    @property
    def any_aside(self) -> bool:
        return any(line.aside for line in self._lines.values())

    @property
    def aside(self) -> Iterator[T]:
        """All that were set aside, the most urgent class first."""
        return (item for line in self._lines.values() for item in line.aside)

    def of_class(self, priority: Priority) -> int:
        """How many are queued."""
        return len(self._lines[priority])

    def join(self, item: T, priority: Priority, now: float) -> None:
        line = self._lines[priority]
        if not line:
            self._schedule.begin(priority, self._queued(), now)
        line.rest[item] = None

    def set_aside(self, item: T, priority: Priority) -> None:
        """It cannot be served now, and others of its class may be; without a turn."""
        line = self._lines[priority]
        del line.rest[item]
        line.aside[item] = None

    def leave(self, item: T, priority: Priority) -> None:
        """Without a turn."""
        line = self._lines[priority]
        line.rest.pop(item, None)
        line.aside.pop(item, None)

    def served(self, item: T, priority: Priority, now: float) -> None:
        """It leaves, and its class has had a turn."""
        self._schedule.served(priority, self._queued(), now)
        self.leave(item, priority)

    def heads(self, now: float) -> list[T]:
        """The first of each class that was not set aside, in the order of their turns."""
        return [next(iter(line.rest)) for line in self.lines(now) if line.rest]

    def lines(self, now: float) -> list[Line[T]]:
        """The requests of each class, in the order of their turns."""
        return [self._lines[priority] for priority in self._schedule.ranked(self._queued(), now)]

    def last_below(self, priority: Priority) -> T | None:
        """The one that came last of the least urgent class, if that is less urgent than ``priority``."""
        lowest = next((other for other in reversed(Priority) if self._lines[other]), priority)
        return self._lines[lowest].last if lowest > priority else None

    def order(self, now: float) -> Iterator[T]:
        """All, in the order in which they would be served if nobody came and time stood still."""
        schedule = self._schedule.copy()
        lines = {priority: iter(line) for priority, line in self._lines.items()}
        left = {priority: len(line) for priority, line in self._lines.items() if line}
        while left:
            priority = schedule.ranked(left, now)[0]
            schedule.served(priority, left, now)
            left[priority] -= 1
            if not left[priority]:
                del left[priority]
            yield next(lines[priority])

    def _queued(self) -> list[Priority]:
        return [priority for priority, line in self._lines.items() if line]

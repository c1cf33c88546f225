"""How many slots, and how much of the memory, the less urgent classes may have together, so that some is free when a
more urgent request comes.

A request that is in flight cannot be put off any more, and slows all down that share its batch, or the processor with
its replica: so what is not urgent is held back before it is admitted, most while more urgent requests come one after
the other, and not at all where there are none: a model that only works for programs uses all its slots.

Pure: time is an argument.
"""

import math
from collections.abc import Mapping

from backends.domain.priority import Priority

RECENT = 60.0  # seconds; a person reads an answer and asks the next question
EXPECTED = 3600.0  # seconds; a person may come back
HELD_UP = 10.0  # seconds; so long at most a background request waits for a moment without more urgent ones

# Of all slots, for the requests of a class and of less urgent ones together.
WHILE_RECENT: Mapping[Priority, float] = {Priority.INTERACTIVE: 1.0, Priority.AGENT: 0.75, Priority.BACKGROUND: 1 / 64}
WHILE_EXPECTED: Mapping[Priority, float] = {Priority.INTERACTIVE: 1.0, Priority.AGENT: 1.0, Priority.BACKGROUND: 0.75}


class SlotShares:
    """Of one model."""

    def __init__(self) -> None:
        self._seen: dict[Priority, float] = {}  # when the last request of each class came
        self._began: dict[Priority, float] = {}  # when the last one was admitted

    def note(self, priority: Priority, now: float) -> None:
        """A request of that class has come."""
        self._seen[priority] = now

    def begins(self, priority: Priority, now: float) -> None:
        """A request of that class is admitted."""
        self._began[priority] = now

    def may_begin(self, priority: Priority, now: float, *, beside: int) -> bool:
        """Whether one more may begin beside ``beside`` more urgent requests: its prompt would be read with theirs."""
        contends = beside > 0 and self.gathers(priority, now)
        return not contends or now - self._began.get(priority, -HELD_UP) >= HELD_UP

    def most(self, priority: Priority, slots: int, now: float) -> int:
        """Requests of that class and of less urgent ones that may be in flight together, one at least. ``slots``: of
        all replicas of the model."""
        return max(1, int(slots * self.of(priority, now)))

    def of(self, priority: Priority, now: float) -> float:
        """The share of that class and of less urgent ones."""
        ago = self._ago(priority, now)
        if ago >= EXPECTED:
            return 1.0
        return (WHILE_RECENT if ago < RECENT else WHILE_EXPECTED)[priority]

    def gathers(self, priority: Priority, now: float) -> bool:
        """Requests of that class are to share one replica, so that the others stay quick for the more urgent ones that
        come. Not agents: each has a long conversation in the prompt cache of its replica."""
        return priority is Priority.BACKGROUND and self._ago(priority, now) < RECENT

    def _ago(self, priority: Priority, now: float) -> float:
        """Seconds since the last request of a more urgent class came."""
        return now - max((at for other, at in self._seen.items() if other < priority), default=-math.inf)

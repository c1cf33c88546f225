"""Room in memory: which model may be loaded, when, and which has to go for it.

    enter -> the budget has room, and nobody else is loading -> go ahead
          -> it has none: idle models leave, the least recently used first; busy ones finish what they have
          -> it can have none, whoever leaves -> why, with the numbers, at once

One loads at a time, since a load takes more than what stays; others go beside it only where there is room for twice
what they need. A model that was told to leave is really gone, and its memory is back, before the next begins.

Nobody leaves who has requests in flight or in line, unless others have waited so long that it is their turn; nobody for
a second replica, nor for a model that has only failed so far. Eager models stay.

The awkward bit: what is measured is not what will be. A model that has been let in is counted with what it will need
from then on, though it has not taken it yet.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping
from typing import Protocol

from backends.domain.failure import Aftermath, Blame, Cause, Failure
from backends.domain.spec import BackendSpec, Launch
from backends.domain.state import State
from backends.memory import units
from backends.memory.high_water import HighWaterMarks
from backends.memory.residency import Residency

log = logging.getLogger(__name__)

LOOK_EVERY = 0.25  # seconds, where nothing tells of a change
SETTLE = 1.5  # seconds in which the machine's memory is measured again before a model is refused
RESIDENCY = 2.0  # seconds that a busy model stays at least
PATIENCE = 5.0  # seconds that others wait before a busy model takes no more requests


class Resident(Protocol):
    """A supervised backend, as the one who gives out the room sees it."""

    spec: BackendSpec
    launch: Launch
    residency: Residency

    @property
    def id(self) -> str: ...

    @property
    def state(self) -> State: ...

    @property
    def clients(self) -> int:
        """Requests in flight."""
        ...

    @property
    def waiting(self) -> int:
        """Requests in line for its model."""
        ...

    @property
    def unlucky(self) -> bool:
        """All its loads so far have failed."""
        ...

    @property
    def memory(self) -> int:
        """Bytes that its process takes now."""
        ...

    def reopen(self) -> None:
        """Take requests again."""
        ...

    def sleep(self) -> None:
        """Leave, and come back at once where requests are in line."""
        ...


class MemoryScheduler:
    """``budget``: bytes for all models, or None = what ``available`` says that the machine can give now. ``estimates``:
    by model, what a replica will take, in bytes, as far as it can be told before it was seen; None = nobody knows."""

    def __init__(
        self,
        *,
        clock: Callable[[], float],
        available: Callable[[], int],
        budget: int | None = None,
        estimates: Mapping[str, Callable[[], int | None]] | None = None,
        peaks: HighWaterMarks | None = None,
    ) -> None:
        self.peaks = peaks or HighWaterMarks()
        self._clock = clock
        self._available = available
        self._budget = budget
        self._estimates = estimates or {}
        self._residents: dict[str, Resident] = {}
        self._granted: dict[str, int] = {}  # by id, bytes: those whose process is up, or about to be
        self._loading: set[str] = set()
        self._line: list[Resident] = []
        self._news = asyncio.Event()

    def join(self, resident: Resident) -> None:
        self._residents[resident.id] = resident

    def needs(self, resident: Resident) -> tuple[int, int]:
        """Bytes that it will take: what the operator says, else what was seen, else what was estimated, 0 = nobody
        knows. And what it cannot do without: the most that was seen has prompt caches in it."""
        if resident.spec.memory is not None:
            return resident.spec.memory, resident.spec.memory
        seen = self.peaks.get(resident.launch)
        estimate = self._estimates.get(resident.spec.model)
        estimated = (estimate() if estimate is not None else None) or 0
        return (estimated, estimated) if seen is None else (seen, min(seen, estimated or seen))

    async def enter(self, resident: Resident, wanted: Callable[[], bool]) -> Failure | None:
        """Comes back when it may be loaded, the room being its own until ``left``, or with the reason why it may not.
        ``wanted``: turns false when somebody has told it to stop, which ends a wait, and only that."""
        self._line.append(resident)
        try:
            return await self._enter(resident, wanted)
        finally:
            self._line.remove(resident)
            resident.residency.phase = ""
            if not self._line:
                for other in self._residents.values():
                    if other.residency.closed:
                        other.reopen()  # nobody waits for it to go any more
            self.changed()

    def settled(self, name: str) -> None:
        """It is loaded, or has failed."""
        self._loading.discard(name)
        self.changed()

    def left(self, name: str) -> None:
        """Its process is gone."""
        self._granted.pop(name, None)
        self.settled(name)

    def changed(self) -> None:
        """Something is idle, ready or gone that was not."""
        self._news.set()

    # -- deciding ------------------------------------------------------------------------------------------------------

    async def _enter(self, resident: Resident, wanted: Callable[[], bool]) -> Failure | None:
        began = self._clock()
        need, least = self.needs(resident)
        while True:
            if not self._demanded(resident):
                return _needless(f"{resident.id} is not loaded: nobody waits for it any more")
            free = self.free()
            if least <= self._most(resident, free) < need:
                need = least  # what was seen once need not be what it takes today
            if need <= free and self._may_begin(resident, need, free):
                self._granted[resident.id] = need
                self._loading.add(resident.id)
                return None
            if not wanted():
                return _needless(f"{resident.id} was told to stop before it was loaded")
            if need > free and not self._loading and self._is_next(resident):
                refused = self._make_room(resident, need, free, self._clock() - began)
                if refused:
                    return _no_room(refused)
            else:
                resident.residency.phase = "waits for its turn to load"
            self._news.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), LOOK_EVERY)

    def free(self) -> int:
        """Bytes that may still be given out."""
        if self._budget is not None:
            return self._budget - sum(self._charge(name) for name in self._granted)
        still_to_take = sum(max(0, need - self._residents[name].memory) for name, need in self._granted.items())
        return self._available() - still_to_take

    def _charge(self, name: str) -> int:
        return max(self._granted.get(name, 0), self._residents[name].memory)

    def _demanded(self, resident: Resident) -> bool:
        return resident.spec.pinned or resident.residency.asked or resident.waiting > 0

    def _may_begin(self, resident: Resident, need: int, free: int) -> bool:
        return 2 * need <= free or (not self._loading and self._is_next(resident))

    def _is_next(self, resident: Resident) -> bool:
        """Those that have to stay go first: they need nobody's patience."""
        first = next((each for each in self._line if each.spec.pinned), self._line[0])
        return resident is first or resident.spec.pinned

    def _make_room(self, resident: Resident, need: int, free: int, waited: float) -> str:
        """Sends idle models away, or says why there will be no room."""
        movable = self._movable(resident)
        leaving = [other for other in movable if other.state is State.STOPPING]
        if self._most(resident, free) < need and not leaving:
            resident.residency.phase = "waits for memory"
            return self._refusal(resident, need, free) if self._budget is not None or waited >= SETTLE else ""
        resident.residency.phase = "waits for other models to leave"
        if leaving:
            return ""  # one at a time, and what it had is to be counted first
        ready = [other for other in movable if other.state is State.READY]
        idle = [other for other in ready if not other.clients and (not other.waiting or other.residency.closed)]
        if idle:
            victim = min(idle, key=lambda other: other.residency.used)
            log.info("backend gives way", extra={"backend": victim.id, "to": resident.id, "needs": units.memory(need)})
            victim.sleep()
        elif ready and waited >= PATIENCE:
            busy = min(ready, key=lambda other: other.residency.since)
            if self._clock() - busy.residency.since >= RESIDENCY:
                busy.residency.closed = True
        return ""

    def _movable(self, resident: Resident) -> list[Resident]:
        """Whose memory it could have: nobody's, for a second replica, or for a model that only fails."""
        others = [self._residents[name] for name in self._granted]
        if resident.unlucky or any(other.spec.model == resident.spec.model for other in others):
            return []
        return [other for other in others if not other.spec.pinned]

    def _most(self, resident: Resident, free: int) -> int:
        """Bytes that it could have, were all gone that can go."""
        return free + sum(self._charge(other.id) for other in self._movable(resident))

    def _refusal(self, resident: Resident, need: int, free: int) -> str:
        budget, left = self._budget, units.memory(max(0, free))
        whole = "what the machine can give now" if budget is None else f"the budget of {units.memory(budget)}"
        held = ", ".join(f"{name} {units.memory(self._charge(name))}" for name in self._granted) or "nothing"
        return (
            f"{resident.id} needs about {units.memory(need)}, and {left} of {whole} are left "
            f"(loaded: {held}); use a smaller model, raise memory.budget, or correct the model's memory:"
        )


def _no_room(message: str) -> Failure:
    code = "insufficient_memory"
    return Failure(Cause.LOAD_FAILURE, Aftermath.NOT_LAUNCHED, message, blame=Blame.MACHINE, code=code)


def _needless(message: str) -> Failure:
    return Failure(Cause.NONE, Aftermath.NOT_LAUNCHED, message, blame=Blame.GATEWAY)

"""The memory scheduler: replicas that ask for memory wait in line, and each gets what ``eviction.decide`` says.

Caveat: the present footprint of a model is less than what it will need. A granted model is charged its need as soon as
it is granted.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping
from typing import Protocol

from backends.domain.failure import Aftermath, Blame, Cause, Failure, Reason
from backends.domain.spec import BackendSpec, Launch
from backends.domain.state import State
from backends.memory import units
from backends.memory.eviction import (
    WAITS_FOR_OTHERS,
    Claim,
    Decision,
    Evict,
    Grant,
    Holding,
    Memory,
    Refuse,
    Wait,
    Withdraw,
    decide,
)
from backends.memory.high_water import HighWaterMarks

log = logging.getLogger(__name__)

DECISION_INTERVAL = 0.25  # seconds between two decisions without an event: free memory changes by itself


class Resident(Protocol):
    """A supervised replica, as the scheduler sees it."""

    spec: BackendSpec
    launch: Launch

    @property
    def id(self) -> str: ...

    @property
    def state(self) -> State: ...

    @property
    def clients(self) -> int:
        """Client requests in flight."""
        ...

    @property
    def demand(self) -> int:
        """Requests queued for its model."""
        ...

    @property
    def wanted(self) -> bool:
        """The pending load is still needed."""
        ...

    @property
    def pressing(self) -> bool:
        """Queued requests, an operator or the configuration need it now."""
        ...

    @property
    def failing(self) -> bool:
        """Has failed lately, and was never ready."""
        ...

    @property
    def evicting(self) -> bool:
        """Being drained so that another replica can load."""
        ...

    @property
    def memory(self) -> int:
        """Footprint of its process now, in bytes."""
        ...

    @property
    def used_at(self) -> float: ...

    @property
    def ready_at(self) -> float: ...

    def evict(self) -> None:
        """Drain, then unload; admit no request meanwhile. A load is ended."""
        ...

    def keep(self) -> None:
        """Cancel an eviction, unless the process is being ended already."""
        ...


class MemoryScheduler:
    """``budget``: bytes for all models; None = the machine's memory, as ``available`` returns it. ``estimates``: by
    model, the estimated need of a replica in bytes, for models that were never measured; None = not known."""

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
        self._granted: dict[str, int] = {}  # id -> bytes, of replicas whose process runs or is about to
        self._waiting: dict[str, Resident] = {}  # by id, in the order of arrival
        self._evicted: set[str] = set()  # ids told to unload; the eviction is cancelled when no replica waits any more
        self._left_at = float("-inf")  # when a process last ended
        self._changed = asyncio.Event()

    def join(self, resident: Resident) -> None:
        self._residents[resident.id] = resident

    def needs(self, resident: Resident) -> tuple[int, int]:
        """(need, least) in bytes. Need: as configured, else the high-water mark, else the estimate; 0 = not known.
        Least: the minimum to run; a high-water mark has prompt caches in it."""
        if resident.spec.memory is not None:
            return resident.spec.memory, resident.spec.memory
        seen = self.peaks.get(resident.launch)
        estimate = self._estimates.get(resident.spec.model)
        estimated = (estimate() if estimate is not None else None) or 0
        return (estimated, estimated) if seen is None else (seen, min(seen, estimated or seen))

    async def enter(self, resident: Resident, waits: Callable[[str], None]) -> Failure | None:
        """None when the replica may load: the memory is granted to it until ``left``. A Failure when it may not.
        ``waits`` is called with what it waits for, each time that changes."""
        self._waiting[resident.id] = resident
        try:
            return await self._enter(resident, waits)
        finally:
            del self._waiting[resident.id]
            if not self._waiting:
                for name in self._evicted:
                    self._residents[name].keep()
                self._evicted.clear()
            self.changed()

    def left(self, name: str) -> None:
        """The process of replica ``name`` has ended."""
        self._granted.pop(name, None)
        self._evicted.discard(name)
        self._left_at = self._clock()
        self.changed()

    def changed(self) -> None:
        """A replica has become idle, become ready or ended, or the demand for one has changed: decide again."""
        self._changed.set()

    def has_room(self, resident: Resident) -> bool:
        """``resident`` could load now, without an eviction and before no other."""
        need, least = self.needs(resident)
        return not self._waiting and isinstance(self._decide(resident, need, least, 0.0), Grant)

    def free(self) -> int:
        """Bytes that may still be granted."""
        if self._budget is not None:
            return self._budget - sum(self._charge(name) for name in self._granted)
        still_to_take = sum(max(0, need - self._residents[name].memory) for name, need in self._granted.items())
        return self._available() - still_to_take

    async def _enter(self, resident: Resident, waits: Callable[[str], None]) -> Failure | None:
        began, reported = self._clock(), ""
        need, least = self.needs(resident)
        while True:
            match self._decide(resident, need, least, self._clock() - began):
                case Grant(size=size):
                    self._granted[resident.id] = size
                    return None
                case Withdraw():
                    return _needless(f"{resident.id} is not loaded: no request waits for it, or it was told to stop")
                case Refuse(message=message):
                    return _no_memory(message)
                case Evict(id=victim):
                    fields = {"backend": victim, "for": resident.id, "needs": units.memory(need)}
                    log.info("backend evicted", extra=fields)
                    self._evicted.add(victim)
                    self._residents[victim].evict()
                    what = WAITS_FOR_OTHERS
                case Wait(what=what):
                    pass
            if what != reported:
                reported = what
                waits(what)
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), DECISION_INTERVAL)

    def _decide(self, resident: Resident, need: int, least: int, waited: float) -> Decision:
        spec = resident.spec
        claim = Claim(
            id=resident.id,
            model=spec.model,
            pinned=spec.pinned,
            need=need,
            least=least,
            waited=waited,
            wanted=resident.wanted,
            pressing=resident.pressing,
            failing=resident.failing,
        )
        holdings = [self._holding(self._residents[name]) for name in self._granted]
        memory = Memory(self.free(), self._budget, settled=self._clock() - self._left_at)
        its_turn = not self._waiting or self._is_next(resident)
        return decide(claim, holdings, memory, its_turn=its_turn, now=self._clock())

    def _holding(self, resident: Resident) -> Holding:
        return Holding(
            id=resident.id,
            model=resident.spec.model,
            charge=self._charge(resident.id),
            state=resident.state,
            evictable=not resident.spec.pinned,
            evicting=resident.evicting,
            inflight=resident.clients,
            demand=resident.demand > 0,
            pressing=resident.pressing,
            used_at=resident.used_at,
            ready_at=resident.ready_at,
        )

    def _charge(self, name: str) -> int:
        return max(self._granted.get(name, 0), self._residents[name].memory)

    def _is_next(self, resident: Resident) -> bool:
        """Pinned models first, then those that are needed now; within each kind, in the order of arrival."""
        first = min(self._waiting.values(), key=lambda other: (not other.spec.pinned, not other.pressing))
        return resident.spec.pinned or resident is first


def _no_memory(message: str) -> Failure:
    return Failure(Cause.LOAD_FAILURE, Aftermath.NOT_LAUNCHED, message, blame=Blame.MACHINE, reason=Reason.NO_MEMORY)


def _needless(message: str) -> Failure:
    return Failure(Cause.NONE, Aftermath.NOT_LAUNCHED, message, blame=Blame.GATEWAY)

"""Memory for models: which replica may be loaded, when, and which is evicted for it.

    enter -> ``decide`` -> Grant    enough memory is free, and it is the replica's turn
                        -> Evict    an idle model, least recently used first; a busy one is drained first
                        -> Wait     until other replicas have loaded, ended or drained
                        -> Refuse   not enough memory even with all evictable models evicted; with the numbers
                        -> Withdraw no request needs the replica any more, or it was told to stop

One load at a time, because a load takes more than the loaded model; a second load runs beside it only where twice its
need is free. The process of an evicted model has ended, and its memory is free again, before the next load begins.

A model with requests in flight or queued is evicted only when another replica has waited ``MIN_WAIT_TO_EVICT_BUSY``
and the model has been ready for ``MIN_RESIDENCY``. A second replica of a model evicts no model, nor does a model that
has only failed so far. Pinned models are never evicted.

Caveat: the present footprint of a model is less than what it will need. A granted model is charged its need as soon as
it is granted.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from backends.domain.failure import Aftermath, Blame, Cause, Failure, Reason
from backends.domain.spec import BackendSpec, Launch
from backends.domain.state import State
from backends.memory import units
from backends.memory.high_water import HighWaterMarks

log = logging.getLogger(__name__)

DECISION_INTERVAL = 0.25  # seconds between two decisions without an event: free memory changes by itself
MIN_WAIT_TO_REFUSE = 1.5  # seconds of measuring, without a process that ends, before a load is refused
MIN_RESIDENCY = 2.0  # seconds that a busy model is ready before it is evicted
MIN_WAIT_TO_EVICT_BUSY = 5.0  # seconds that another replica waits before a busy model is evicted


# -- the decision: values in, a value out ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Holding:
    """One replica that was granted memory. ``charge``: bytes; its grant or its footprint, whichever is larger."""

    id: str
    model: str
    charge: int
    state: State
    evictable: bool
    evicting: bool  # being drained so that another replica can load
    inflight: int  # client requests
    demand: bool  # requests are queued for its model
    used_at: float
    ready_at: float


@dataclass(frozen=True, slots=True)
class Claim:
    """One replica that asks for memory. ``need``, ``least``: bytes; ``least`` is the minimum to run, since ``need`` may
    be the highest footprint ever measured, with prompt caches in it."""

    id: str
    model: str
    pinned: bool
    need: int
    least: int
    waited: float  # seconds
    wanted: bool  # still to be loaded: not told to stop, and the requests that it was loaded for still wait
    pressing: bool  # queued requests, an operator or the configuration need it now: it may evict others
    failing: bool  # has only failed lately, was never ready: it may evict no other


@dataclass(frozen=True, slots=True)
class Memory:
    """``free``: bytes that may still be granted. ``budget``: bytes for all models; None = the machine's available
    memory. ``settled``: seconds since a process last ended, because its memory may be freed late."""

    free: int
    budget: int | None
    settled: float


@dataclass(frozen=True, slots=True)
class Grant:
    size: int


@dataclass(frozen=True, slots=True)
class Evict:
    id: str


@dataclass(frozen=True, slots=True)
class Wait:
    what: str  # for users


@dataclass(frozen=True, slots=True)
class Refuse:
    message: str


@dataclass(frozen=True, slots=True)
class Withdraw:
    pass


Decision = Grant | Evict | Wait | Refuse | Withdraw

WAITS_FOR_TURN = "waits for its turn to load"
WAITS_FOR_MEMORY = "waits for memory"
WAITS_FOR_OTHERS = "waits for other models to be unloaded"


def decide(claim: Claim, holdings: Sequence[Holding], memory: Memory, *, its_turn: bool, now: float) -> Decision:
    """``its_turn``: no claim with precedence is waiting."""
    if not claim.wanted:
        return Withdraw()
    evictable = _evictable(claim, holdings)
    most = memory.free + sum(other.charge for other in evictable)
    # The highest footprint ever measured need not be reached today.
    need = claim.least if claim.least <= most < claim.need else claim.need
    loading = any(other.state in (State.STARTING, State.WAITING_FOR_MEMORY) for other in holdings)
    if need <= memory.free and (2 * need <= memory.free or (its_turn and not loading)):
        return Grant(need)
    if need <= memory.free or loading or not its_turn:
        return Wait(WAITS_FOR_TURN)
    if not claim.pressing:
        return Withdraw()
    if most < need:
        ending = any(other.state is State.STOPPING for other in evictable)
        measured = not ending and min(claim.waited, memory.settled) >= MIN_WAIT_TO_REFUSE
        sure = memory.budget is not None or measured
        return Refuse(_refusal(claim.id, need, holdings, memory)) if sure else Wait(WAITS_FOR_MEMORY)
    victim = _victim(evictable, claim.waited, now)
    return Wait(WAITS_FOR_OTHERS) if victim is None else Evict(victim)


def _evictable(claim: Claim, holdings: Sequence[Holding]) -> list[Holding]:
    """The replicas that may be evicted for ``claim``."""
    if claim.failing or any(other.model == claim.model for other in holdings):
        return []
    return [other for other in holdings if other.evictable]


def _victim(evictable: Sequence[Holding], waited: float, now: float) -> str | None:
    """The replica to evict now. One at a time: the memory of one that is ending is measured first."""
    evicting = [other for other in evictable if other.evicting]
    if any(other.state is State.STOPPING for other in evictable) or any(not other.inflight for other in evicting):
        return None
    ready = [other for other in evictable if other.state is State.READY]
    idle = [other for other in ready if not other.inflight and not other.demand]
    if idle:
        return min(idle, key=lambda other: other.used_at).id
    if ready and waited >= MIN_WAIT_TO_EVICT_BUSY and not evicting:
        longest = min(ready, key=lambda other: other.ready_at)
        return longest.id if now - longest.ready_at >= MIN_RESIDENCY else None
    return None


def _refusal(name: str, need: int, holdings: Sequence[Holding], memory: Memory) -> str:
    whole = "what the machine can give now" if memory.budget is None else f"the budget of {units.memory(memory.budget)}"
    held = ", ".join(f"{other.id} {units.memory(other.charge)}" for other in holdings) or "nothing"
    return (
        f"{name} needs about {units.memory(need)}, and {units.memory(max(0, memory.free))} of {whole} are left "
        f"(loaded: {held}); use a smaller model, raise memory.budget, or correct the model's memory:"
    )


# -- the actor ---------------------------------------------------------------------------------------------------------


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
        """Drain, then unload; admit no request meanwhile."""
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
        return decide(claim, holdings, memory, its_turn=self._is_next(resident), now=self._clock())

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
            used_at=resident.used_at,
            ready_at=resident.ready_at,
        )

    def _charge(self, name: str) -> int:
        return max(self._granted.get(name, 0), self._residents[name].memory)

    def _is_next(self, resident: Resident) -> bool:
        """Pinned models first, then in the order of arrival."""
        if resident.spec.pinned:
            return True
        return not any(other.spec.pinned for other in self._waiting.values()) and resident is next(
            iter(self._waiting.values())
        )


def _no_memory(message: str) -> Failure:
    return Failure(Cause.LOAD_FAILURE, Aftermath.NOT_LAUNCHED, message, blame=Blame.MACHINE, reason=Reason.NO_MEMORY)


def _needless(message: str) -> Failure:
    return Failure(Cause.NONE, Aftermath.NOT_LAUNCHED, message, blame=Blame.GATEWAY)

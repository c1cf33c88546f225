"""Memory for models: which replica may be loaded, when, and which is evicted for it.

    enter -> ``decide`` -> Grant    there is memory, and it is its turn
                        -> Evict    an idle model goes, the least recently used first; a busy one finishes what it has
                        -> Wait     others load, leave, or finish first
                        -> Refuse   there is not enough even if all went that can go: with the numbers
                        -> Withdraw no request needs it any more, or it was told to stop

One load at a time, because a load takes more than the loaded model; another goes beside it only where twice its need
is free. The process of an evicted model is gone, and its memory is back, before the next load begins.

A model with requests in flight or in line is evicted only when another has waited ``MIN_WAIT`` and it has been ready
for ``MIN_RESIDENCY``. A second replica evicts no model, nor does a model that has only failed so far. Pinned models
stay.

Caveat: what a model takes now is not what it will take. A granted model is counted with what it needs, as soon as it is
granted.
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

LOOK_EVERY = 0.25  # seconds between two decisions where no event comes: the machine's memory changes by itself
REMEASURE_FOR = 1.5  # seconds without a change in which the machine's memory is measured before a load is refused
MIN_RESIDENCY = 2.0  # seconds that a busy model stays at least
MIN_WAIT = 5.0  # seconds that another waits before a busy model is evicted


# -- the decision: values in, a value out ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Holding:
    """One replica that was granted memory. ``charge``: bytes, its grant, or what it takes where that is more."""

    id: str
    model: str
    charge: int
    state: State
    evictable: bool
    evicting: bool  # it finishes what is in flight for others that wait
    inflight: int  # requests of clients
    demand: bool  # requests wait in line for its model
    used_at: float
    ready_at: float


@dataclass(frozen=True, slots=True)
class Claim:
    """One replica that asks for memory. ``need``: bytes; ``least``: what it cannot do without, since ``need`` may be
    the most that was ever seen, with prompt caches in it."""

    id: str
    model: str
    pinned: bool
    need: int
    least: int
    waited: float  # seconds
    wanted: bool  # it is still to be loaded: it was not told to stop, and is not for requests that are gone
    pressing: bool  # requests in line, a person or the configuration need it now: it may evict others
    failing: bool  # it has only failed lately: it evicts no other


@dataclass(frozen=True, slots=True)
class Memory:
    """``free``: bytes that may still be granted. ``budget``: bytes for all models; None = what the machine can give.
    ``settled``: seconds since a process ended, whose memory may come back late."""

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
    what: str  # for people


@dataclass(frozen=True, slots=True)
class Refuse:
    message: str


@dataclass(frozen=True, slots=True)
class Withdraw:
    pass


Decision = Grant | Evict | Wait | Refuse | Withdraw

WAITS_FOR_TURN = "waits for its turn to load"
WAITS_FOR_MEMORY = "waits for memory"
WAITS_FOR_OTHERS = "waits for other models to leave"


def decide(claim: Claim, holdings: Sequence[Holding], memory: Memory, *, its_turn: bool, now: float) -> Decision:
    """``its_turn``: no claim that comes first waits in line."""
    if not claim.wanted:
        return Withdraw()
    movable = _movable(claim, holdings)
    most = memory.free + sum(other.charge for other in movable)
    # What was seen once need not be what it takes today.
    need = claim.least if claim.least <= most < claim.need else claim.need
    loading = any(other.state in (State.STARTING, State.WAITING_FOR_MEMORY) for other in holdings)
    if need <= memory.free and (2 * need <= memory.free or (its_turn and not loading)):
        return Grant(need)
    if need <= memory.free or loading or not its_turn:
        return Wait(WAITS_FOR_TURN)
    if not claim.pressing:
        return Withdraw()
    if most < need:
        leaving = any(other.state is State.STOPPING for other in movable)
        measured = not leaving and min(claim.waited, memory.settled) >= REMEASURE_FOR
        sure = memory.budget is not None or measured
        return Refuse(_refusal(claim.id, need, holdings, memory)) if sure else Wait(WAITS_FOR_MEMORY)
    victim = _victim(movable, claim.waited, now)
    return Wait(WAITS_FOR_OTHERS) if victim is None else Evict(victim)


def _movable(claim: Claim, holdings: Sequence[Holding]) -> list[Holding]:
    """Whose memory it could have."""
    if claim.failing or any(other.model == claim.model for other in holdings):
        return []
    return [other for other in holdings if other.evictable]


def _victim(movable: Sequence[Holding], waited: float, now: float) -> str | None:
    """One at a time: the memory of one that is leaving is counted first."""
    evicting = [other for other in movable if other.evicting]
    if any(other.state is State.STOPPING for other in movable) or any(not other.inflight for other in evicting):
        return None
    ready = [other for other in movable if other.state is State.READY]
    idle = [other for other in ready if not other.inflight and not other.demand]
    if idle:
        return min(idle, key=lambda other: other.used_at).id
    if ready and waited >= MIN_WAIT and not evicting:
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
        """Requests of clients in flight."""
        ...

    @property
    def demand(self) -> int:
        """Requests in line for its model."""
        ...

    @property
    def wanted(self) -> bool:
        """The load under way is still needed."""
        ...

    @property
    def pressing(self) -> bool:
        """Requests in line, a person or the configuration need it now."""
        ...

    @property
    def failing(self) -> bool:
        """It has failed lately, and was never ready."""
        ...

    @property
    def evicting(self) -> bool:
        """It finishes what is in flight for others that wait."""
        ...

    @property
    def memory(self) -> int:
        """Bytes that its process takes now."""
        ...

    @property
    def used_at(self) -> float: ...

    @property
    def ready_at(self) -> float: ...

    def evict(self) -> None:
        """Finish what is in flight, then leave; take no requests meanwhile."""
        ...

    def keep(self) -> None:
        """An eviction is called off, unless the process is being ended already."""
        ...


class MemoryScheduler:
    """``budget``: bytes for all models, or None = what ``available`` says that the machine can give now. ``estimates``:
    by model, what a replica will take, in bytes, as far as it can be told before it was seen; None = not known."""

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
        self._line: dict[str, Resident] = {}  # those that ask, in the order in which they came
        self._evicted: set[str] = set()  # those that were told to go, and may be kept when no other waits any more
        self._left_at = float("-inf")  # when a process ended last
        self._news = asyncio.Event()

    def join(self, resident: Resident) -> None:
        self._residents[resident.id] = resident

    def needs(self, resident: Resident) -> tuple[int, int]:
        """Bytes that it will take: what the operator says, else what was seen, else what was estimated, 0 = not known.
        And what it cannot do without: the most that was seen has prompt caches in it."""
        if resident.spec.memory is not None:
            return resident.spec.memory, resident.spec.memory
        seen = self.peaks.get(resident.launch)
        estimate = self._estimates.get(resident.spec.model)
        estimated = (estimate() if estimate is not None else None) or 0
        return (estimated, estimated) if seen is None else (seen, min(seen, estimated or seen))

    async def enter(self, resident: Resident, waits: Callable[[str], None]) -> Failure | None:
        """Comes back when it may be loaded, the memory being its own until ``left``, or with the reason why it may not.
        ``waits`` is told what it waits for, each time that changes."""
        self._line[resident.id] = resident
        try:
            return await self._enter(resident, waits)
        finally:
            del self._line[resident.id]
            if not self._line:
                for name in self._evicted:
                    self._residents[name].keep()
                self._evicted.clear()
            self.changed()

    def left(self, name: str) -> None:
        """The process is gone."""
        self._granted.pop(name, None)
        self._evicted.discard(name)
        self._left_at = self._clock()
        self.changed()

    def changed(self) -> None:
        """A replica is idle, ready or gone that was not, or the demand for one has changed."""
        self._news.set()

    def free(self) -> int:
        """Bytes that may still be granted."""
        if self._budget is not None:
            return self._budget - sum(self._charge(name) for name in self._granted)
        still_to_take = sum(max(0, need - self._residents[name].memory) for name, need in self._granted.items())
        return self._available() - still_to_take

    async def _enter(self, resident: Resident, waits: Callable[[str], None]) -> Failure | None:
        began, told = self._clock(), ""
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
            if what != told:
                told = what
                waits(what)
            self._news.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), LOOK_EVERY)

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

    def _holding(self, one: Resident) -> Holding:
        return Holding(
            id=one.id,
            model=one.spec.model,
            charge=self._charge(one.id),
            state=one.state,
            evictable=not one.spec.pinned,
            evicting=one.evicting,
            inflight=one.clients,
            demand=one.demand > 0,
            used_at=one.used_at,
            ready_at=one.ready_at,
        )

    def _charge(self, name: str) -> int:
        return max(self._granted.get(name, 0), self._residents[name].memory)

    def _is_next(self, resident: Resident) -> bool:
        """Pinned models go first: no request's patience is at stake for the others to lose."""
        if resident.spec.pinned:
            return True
        return not any(other.spec.pinned for other in self._line.values()) and resident is next(
            iter(self._line.values())
        )


def _no_memory(message: str) -> Failure:
    return Failure(Cause.LOAD_FAILURE, Aftermath.NOT_LAUNCHED, message, blame=Blame.MACHINE, reason=Reason.NO_MEMORY)


def _needless(message: str) -> Failure:
    return Failure(Cause.NONE, Aftermath.NOT_LAUNCHED, message, blame=Blame.GATEWAY)

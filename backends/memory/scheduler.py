"""The memory scheduler: replicas that ask for memory wait in line, and each gets what ``eviction.decide`` says.

Memory that others than our processes hold is waited for as ``occupancy`` says: before a start of a replica that ran out
of memory, whatever the budget is; and where the budget is what the machine can give, before any start of a pinned one.
Who waits for others' memory keeps nobody else from loading.

Caveat: the present footprint of a model is less than what it will need. A granted model is charged its need as soon as
it is granted, and as long as the memory of its process is not back (``reclaim``).

The scheduler also divides the memory among the replicas that are loaded or about to be (``share``).
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from backends.domain.failure import Aftermath, Blame, Cause, Failure, Reason
from backends.domain.share import Share
from backends.domain.snapshot import WAITS_FOR_MEMORY
from backends.domain.spec import BackendSpec, Launch
from backends.domain.state import State
from backends.memory import occupancy, units
from backends.memory.eviction import (
    WAITS_FOR_OTHERS,
    WAITS_FOR_RELEASE,
    Claim,
    Decision,
    Evict,
    Grant,
    Holding,
    Memory,
    Refuse,
    Release,
    Released,
    Wait,
    Withdraw,
    decide,
)
from backends.memory.learned_sizes import high_water_marks, idle_sizes
from backends.memory.occupancy import Occupancies, Occupancy, Place
from backends.memory.past_lives import PastLives
from backends.memory.reclaim import Lingering
from backends.memory.share import UNKNOWN
from backends.memory.shares import Presence, Shares
from backends.process.learned import Learned
from backends.tasks import Tasks

log = logging.getLogger(__name__)

DECISION_INTERVAL = 0.25  # seconds between two decisions without an event: free memory changes by itself
LOOK_TIMEOUT = 5.0  # seconds, of one
OCCUPANCY_INTERVAL = 1.0  # seconds between two looks at who holds the memory


class Resident(Protocol):
    """A supervised replica, as the scheduler sees it."""

    spec: BackendSpec
    launch: Launch
    past: PastLives

    @property
    def id(self) -> str: ...

    @property
    def state(self) -> State: ...

    @property
    def clients(self) -> int:
        """Client requests in flight."""
        ...

    @property
    def inflight(self) -> int:
        """Slots taken, abandoned requests included."""
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
        """What its process holds now, in bytes (``process_memory``)."""
        ...

    @property
    def pooled(self) -> int:
        """Bytes of that in freed buffers; 0 = none, or not known."""
        ...

    @property
    def cached(self) -> int:
        """Bytes of that in the prompt cache, where we may change its size; else 0."""
        ...

    @property
    def working_set(self) -> int | None:
        """Bytes that its GPU recommends for all processes; None = not known."""
        ...

    @property
    def pid(self) -> int | None:
        """Of its process, which leads its session."""
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

    def release(self) -> None:
        """Give back freed buffers, and what the prompt cache holds beyond its part of the share."""
        ...


class MemoryScheduler:
    """``budget``: bytes for all models; None = the machine's memory, as ``available`` returns it. ``estimates``: by
    model, the estimated need of a replica in bytes, for models that were never measured; None = not known. ``shares``:
    divides the memory; None = every replica has the defaults. ``occupancies``: reads who holds the memory; without it
    nobody is known to."""

    def __init__(
        self,
        *,
        clock: Callable[[], float],
        available: Callable[[], int],
        budget: int | None = None,
        estimates: Mapping[str, Callable[[], int | None]] | None = None,
        peaks: Learned[int] | None = None,
        shares: Shares | None = None,
        occupancies: Occupancies = lambda _place, _own: None,
        occupancy_interval: float = OCCUPANCY_INTERVAL,
    ) -> None:
        self.peaks = peaks or high_water_marks()
        self.bases = shares.bases if shares is not None else idle_sizes()
        self._clock = clock
        self._shares = shares
        self._available = available
        self._budget = budget
        self._estimates = estimates or {}
        self._residents: dict[str, Resident] = {}
        self._granted: dict[str, int] = {}  # id -> bytes, of replicas whose process runs or is about to
        self._waiting: dict[str, Resident] = {}  # by id, in the order of arrival
        self._occupancies = occupancies
        self._occupancy_interval = occupancy_interval
        self._looking: dict[Place, asyncio.Task[Occupancy | None]] = {}
        self._tasks = Tasks("memory")
        self._held_up: set[str] = set()  # ids of the waiting ones whose memory others hold
        self._evicted: set[str] = set()  # ids told to unload; the eviction is cancelled when no replica waits any more
        self._released: dict[str, Released] = {}  # by the id of the waiting one; times of the clock
        self._left_at = float("-inf")  # when a process last ended
        self._lingering: dict[str, Lingering] = {}  # id -> memory of its last process that is not back yet
        self._changed = asyncio.Event()

    def join(self, resident: Resident) -> None:
        self._residents[resident.id] = resident

    def needs(self, resident: Resident) -> tuple[int, int]:
        """(need, least) in bytes. Need: as configured, else the high-water mark, else the estimate; 0 = not known.
        Least: the minimum to run; a high-water mark has the largest batch in it, and where the process told nothing of
        itself, prompt caches."""
        if resident.spec.memory is not None:
            return resident.spec.memory, resident.spec.memory
        seen, estimated = self.peaks.get(resident.launch), self._estimated(resident)
        return (estimated, estimated) if seen is None else (seen, min(seen, estimated or seen))

    def _estimated(self, resident: Resident) -> int:
        if self._shares is not None and (appetite := self._shares.appetite(resident)) is not None:
            return appetite.need
        estimate = self._estimates.get(resident.spec.model)
        return (estimate() if estimate is not None else None) or 0

    def _needs_in(self, place: Place, resident: Resident) -> tuple[int, int]:
        """(need, least) of that memory. The high-water marks are of main memory."""
        need, least = self.needs(resident)
        if place is Place.DEVICE and resident.spec.memory is None:
            need = least = self._estimated(resident) or resident.past.device_size
        return resident.past.least(place, need), resident.past.least(place, least)

    async def enter(self, resident: Resident, waits: Callable[[str], None]) -> Failure | None:
        """None when the replica may load: the memory is granted to it until ``left``. A Failure when it may not.
        ``waits`` is called with what it waits for, each time that changes."""
        self._waiting[resident.id] = resident
        try:
            return await self._enter(resident, waits)
        finally:
            del self._waiting[resident.id]
            self._released.pop(resident.id, None)
            self._held_up.discard(resident.id)
            if not self._in_line:
                for name in self._evicted:
                    self._residents[name].keep()
                self._evicted.clear()
            self.changed()

    async def look_at_device(self) -> None:
        """How much a GPU has beside the machine's memory. Called before a launch."""
        if self._shares is not None and (seen := await self.look(Place.DEVICE)) is not None:
            self._shares.note_device(seen, sum(self._residents[name].memory for name in self._granted))

    def share(self, resident: Resident) -> Share:
        """What the replica may use now, beside all that are loaded, or wait for memory."""
        if self._shares is None:
            return UNKNOWN
        return self._shares.of(resident, [self._presence(other, resident) for other in self._residents.values()])

    def _presence(self, other: Resident, resident: Resident) -> Presence:
        granted = other.id in self._granted
        here = other is resident or other.spec.pinned or granted or other.id in self._waiting
        return Presence(other, self._charge(other.id) if granted else 0, here)

    def left(self, name: str, lingering: Lingering | None = None) -> None:
        """The process of replica ``name`` has ended. ``lingering``: its memory, until the machine has it back."""
        self._granted.pop(name, None)
        self._lingering.pop(name, None)
        if lingering is not None:
            self._lingering[name] = lingering
        self._evicted.discard(name)
        self._left_at = self._clock()
        self.changed()

    def changed(self) -> None:
        """A replica has become idle, become ready or ended, or the demand for one has changed: decide again."""
        self._changed.set()

    def beside(self, resident: Resident) -> int:
        """Requests in flight on the other replicas, which share the memory."""
        return sum(other.inflight for other in self._residents.values() if other is not resident)

    def has_room(self, resident: Resident) -> bool:
        """``resident`` could load now, without an eviction and before no other."""
        decision = self._decide(resident, self.needs(resident), 0.0, free=self.free(resident))
        return not self._in_line and isinstance(decision, Grant)

    @property
    def _in_line(self) -> bool:
        """A replica waits, and not for others' memory: nobody knows for how long that is."""
        return bool(self._waiting.keys() - self._held_up)

    def free(self, resident: Resident | None = None) -> int:
        """Bytes that may still be granted, to ``resident``: its own last memory is waited for by its launch."""
        if self._budget is None:
            return self._available() - self._still_to_take()
        lingering = sum(size for name, size in self._not_back() if resident is None or name != resident.id)
        return self._budget - sum(self._charge(name) for name in self._granted) - lingering

    def _not_back(self) -> Iterator[tuple[str, int]]:
        """(id, bytes) of processes that have ended, whose memory the machine does not have back."""
        for name, lingering in list(self._lingering.items()):
            if missing := lingering.missing(self._available(), self._clock()):
                yield name, missing
            else:
                del self._lingering[name]

    def _still_to_take(self) -> int:
        return sum(max(0, need - self._residents[name].memory) for name, need in self._granted.items())

    async def look(self, place: Place) -> Occupancy | None:
        """Who holds that memory now; None = not known. One look at a time: a driver may hang."""
        looking = self._looking.get(place)
        if looking is None or looking.done():
            own = frozenset(pid for other in self._residents.values() if (pid := other.pid))
            looking = self._tasks.start(asyncio.to_thread(self._occupancies, place, own), f"look at {place}")
            self._looking[place] = looking
        done, _ = await asyncio.wait({looking}, timeout=LOOK_TIMEOUT)
        return None if not done or looking.cancelled() or looking.exception() else looking.result()

    async def crowded_out(self, resident: Resident, place: Place, *, alive: bool) -> str:
        """What tells that others hold the memory that ``resident`` needs and ran out of; "" = it had what it needs, or
        nobody else is found to hold it. ``alive``: its process still has its own."""
        seen = await self.look(place)
        if seen is None:
            return ""
        (_, need), room = self._needs_in(place, resident), seen.available
        own = seen.own.get(resident.pid or 0)
        if alive and (own is not None or place is Place.MACHINE):
            room += own or resident.memory
        elif alive:  # what it holds is not known, but what there was when it began
            room = resident.past.before.get(place, need)
            lone = not any(other.pid for other in self._residents.values() if other is not resident)
            seen = replace(seen, others=seen.total - room if lone else 0)
        return occupancy.numbers(seen, need, room) if occupancy.held_by_others(seen, need, room) else ""

    async def _enter(self, resident: Resident, waits: Callable[[str], None]) -> Failure | None:
        began, reported = self._clock(), ""
        seen, looked_at = None, float("-inf")
        place = resident.past.asked
        while True:
            if place is not None and self._clock() - looked_at >= self._occupancy_interval:
                seen, looked_at = await self.look(place) or seen, self._clock()
            match self._next(resident, self._clock() - began, seen):
                case Grant(size=size):
                    self._granted[resident.id] = size
                    return None
                case Withdraw():
                    return _needless(f"{resident.id} is not loaded: no request waits for it, or it was told to stop")
                case Refuse() if place is None and self._budget is None:
                    place = Place.MACHINE  # who holds it?
                    continue
                case Refuse(message=message):
                    return _no_memory(message)
                case Release(ids=ids):
                    self._release(ids, resident)
                    what = WAITS_FOR_RELEASE
                case Evict(id=victim):
                    self._evict(victim, resident)
                    what = WAITS_FOR_OTHERS
                case Wait(what=what):
                    pass
            if what != reported:
                reported = what
                waits(what)
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), DECISION_INTERVAL)

    def _evict(self, victim: str, resident: Resident) -> None:
        fields = {"backend": victim, "for": resident.id, "needs": units.memory(self.needs(resident)[0])}
        log.info("backend evicted", extra=fields)
        self._evicted.add(victim)
        self._residents[victim].evict()

    def _release(self, ids: Sequence[str], resident: Resident) -> None:
        spare = {name: self._spare(self._residents[name]) for name in ids}
        promised = sum(spare.values())
        for name, size in spare.items():
            log.info("memory released", extra={"backend": name, "for": resident.id, "unused": units.memory(size)})
            self._residents[name].release()
        now = self._clock()
        self._released[resident.id] = replace(self._released.get(resident.id, Released(now, now, promised)), last=now)

    def _next(self, resident: Resident, waited: float, seen: Occupancy | None) -> Decision:
        """``seen``: who holds the memory, where that counts."""
        free, needs = self.free(resident), self.needs(resident)
        least = needs[1]
        holder = "" if seen is None else occupancy.holder(seen, least - free)
        decision = self._decide(resident, needs, waited, free=free, holder=holder)
        if seen is not None and resident.past.asked is not None:
            decision = self._asked(resident, decision, seen, waited)
        elif seen is not None and isinstance(decision, Refuse) and resident.spec.pinned:
            held = occupancy.held_by_others(seen, least, free)
            decision = _wait_for_others(seen, least, free) if held else decision
        self._note_held_up(resident, decision)
        return decision

    def _asked(self, resident: Resident, first: Decision, seen: Occupancy, waited: float) -> Decision:
        """The memory that it ran out of, or that of its GPU, must have what it needs. ``first``: by the budget."""
        if isinstance(first, Withdraw) or (isinstance(first, Refuse) and self._budget is not None):
            return first
        needs = self._needs_in(seen.place, resident)
        least, room = needs[1], self._room(seen)
        holder = occupancy.holder(seen, least - room)
        decision = self._decide(resident, needs, waited, free=min(self.free(resident), room), holder=holder)
        if isinstance(decision, Wait) and decision.what == WAITS_FOR_MEMORY:
            return _wait_for_others(seen, least, room)
        if not isinstance(decision, Refuse):
            return first if isinstance(decision, Grant) and isinstance(first, Grant) else decision
        if waited < occupancy.longest_wait(seen, least, room):
            return _wait_for_others(seen, least, room)
        may_start = seen.place is Place.DEVICE or self._budget is not None
        start = first if isinstance(first, Grant) else Grant(least)
        return start if may_start or occupancy.held_by_others(seen, least, room) else decision

    def _room(self, seen: Occupancy) -> int:
        if seen.place is Place.MACHINE:
            return self._available() - self._still_to_take()
        loading = [other for name in self._granted if (other := self._residents[name]).state is not State.READY]
        return seen.available - sum(self._needs_in(seen.place, other)[1] for other in loading)

    def _note_held_up(self, resident: Resident, decision: Decision) -> None:
        if not (isinstance(decision, Wait) and decision.for_others):
            self._held_up.discard(resident.id)
        elif resident.id not in self._held_up:
            log.warning("backend waits", extra={"backend": resident.id, "reason": decision.what})
            self._held_up.add(resident.id)

    def _decide(
        self, resident: Resident, needs: tuple[int, int], waited: float, *, free: int, holder: str = ""
    ) -> Decision:
        spec, (need, least) = resident.spec, needs
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
        holdings += [self._ghost(name, size) for name, size in self._not_back() if name != resident.id]
        now, told = self._clock(), self._released.get(resident.id)
        memory = Memory(
            free,
            self._budget,
            settled=now - self._left_at,
            holder=holder,
            released=None if told is None else Released(now - told.first, now - told.last, told.promised),
        )
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
            spare=self._spare(resident),
        )

    def _ghost(self, name: str, size: int) -> Holding:
        """A process that has ended, whose memory is not back."""
        return Holding(
            id=name,
            model=self._residents[name].spec.model,
            charge=size,
            state=State.STOPPING,
            evictable=False,
            evicting=False,
            inflight=0,
            demand=False,
            pressing=False,
            used_at=0.0,
            ready_at=0.0,
        )

    def _spare(self, resident: Resident) -> int:
        """Bytes of the charge that end with the freed buffers, and with what is cached beyond the share."""
        if not (resident.pooled or resident.cached):
            return 0
        beyond = max(0, resident.cached - self.share(resident).prompt_cache)
        left = resident.memory - resident.pooled - beyond
        return max(0, self._charge(resident.id) - max(self._granted.get(resident.id, 0), left))

    def _charge(self, name: str) -> int:
        return max(self._granted.get(name, 0), self._residents[name].memory)

    def _is_next(self, resident: Resident) -> bool:
        """Pinned models first, then those that are needed now; within each kind, in the order of arrival. Those whose
        memory others hold keep nobody waiting."""
        waiting = [other for other in self._waiting.values() if other is resident or other.id not in self._held_up]
        first = min(waiting, key=lambda other: (not other.spec.pinned, not other.pressing), default=resident)
        return resident.spec.pinned or resident is first


def _wait_for_others(seen: Occupancy, need: int, room: int) -> Wait:
    return Wait(occupancy.waiting(seen, need, room), for_others=True)


def _no_memory(message: str) -> Failure:
    return Failure(Cause.LOAD_FAILURE, Aftermath.NOT_LAUNCHED, message, blame=Blame.MACHINE, reason=Reason.NO_MEMORY)


def _needless(message: str) -> Failure:
    return Failure(Cause.NONE, Aftermath.NOT_LAUNCHED, message, blame=Blame.GATEWAY)

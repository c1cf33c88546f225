"""The replicas of one model behind one bounded queue.

``acquire`` returns a lease on the replica with the fewest requests in flight, or queues for one, or returns a
``Refusal``. Choosing and admitting is one synchronous step, so no decision rests on a stale view.

Where a prompt, or one in flight, takes long to read, the choice is that of one cost model, which may be to wait for a
replica; and a long prompt and all others take turns on a replica (``placing``).

A request that fails over re-enters at the head of the queue: it has waited its turn already. The others take turns by
class (``fair_queue``), and the less urgent ones leave slots free for the more urgent (``slot_shares``).

A replica that restarts is a pause, not a refusal: the request is queued until the replica is back, unless it would be
back only after the request's patience.

Caveat: a request suspected of a crash is admitted alone, on an idle replica. Under steady load no replica would ever be
idle, so such a request reserves a replica, which is drained and takes no other request meanwhile. That costs the other
requests, so the reservation lapses after a time: then the request waits for a replica that happens to be idle, or for a
later reservation. One that is suspected of a shortage of memory is alone with the memory, not only with its replica: no
replica that shares it has a request in flight, or holds what is left of a process that is being ended. These come
last, the smallest first.

A request that mlx_lm.server cannot batch needs an idle replica as well, and holds it alone: beside others it would wait
in the server, silently, with everything that was sent after it. It reserves one in the same way, in the order of
arrival, so that many of them do not keep all others out.

A request whose batch would not fit the memory of any replica that has a slot waits, and smaller ones go before it: for
``PASSED`` seconds, then it reserves a replica too, so that the batch there becomes smaller.
"""

import asyncio
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import islice
from typing import Protocol

from backends.admission.excluded import NOTHING, Excluded
from backends.admission.inflight import InFlight
from backends.admission.lease import Changed, Lease
from backends.admission.memory_gate import Shortage
from backends.admission.placing import Decision, Placing
from backends.admission.slot_request import ANY, SlotRequest
from backends.admission.slot_shares import HELD_UP, SlotShares
from backends.admission.ticket_queue import LOOKED_AT, Ticket, TicketQueue
from backends.domain.engine import Engine
from backends.domain.place import Place, WaitsFor
from backends.domain.priority import Priority
from backends.domain.prompt_bound import PromptBound
from backends.domain.refusal import Refusal, Why
from backends.domain.report import EngineReport
from backends.domain.snapshot import Seat, Snapshot
from backends.domain.spec import BackendSpec
from backends.domain.state import State


class Backend(Protocol):
    """One replica, supervised or remote, as the pool and the fleet see it."""

    on_change: Changed
    spec: BackendSpec

    @property
    def id(self) -> str: ...

    @property
    def state(self) -> State: ...

    @property
    def inflight(self) -> int:
        """Slots taken, abandoned requests included."""
        ...

    @property
    def abandoned(self) -> int: ...

    @property
    def flight(self) -> InFlight:
        """Its requests in flight, and what they have taught."""
        ...

    @property
    def engine(self) -> Engine: ...

    @property
    def generation(self) -> int: ...

    @property
    def report(self) -> EngineReport | None:
        """What its process tells of itself."""
        ...

    @property
    def responsive(self) -> bool: ...

    @property
    def is_up_or_starting(self) -> bool: ...

    @property
    def recovers(self) -> bool:
        """It is ready, or will be without a person or a new request: it is loaded, or restarted after a failure."""
        ...

    @property
    def unloaded(self) -> bool:
        """The model is not loaded, because no request needed it."""
        ...

    @property
    def loading_on_demand(self) -> bool: ...

    @property
    def recently_denied(self) -> bool:
        """A load was refused memory a moment ago."""
        ...

    def set_demand(self, queued: int, *, accompanied: bool) -> None:
        """``queued``: requests that are queued for the model. ``accompanied``: another replica of it is ready."""
        ...

    def look_again(self) -> None:
        """A request came for which no replica is there: if this one was given up, look whether that can be mended."""
        ...

    def load(self) -> None:
        """Load the model for the queued requests, if it is unloaded."""
        ...

    def has_slot(self) -> bool: ...

    def fits(self, request: SlotRequest) -> bool:
        """Its batch, with this request in it, fits the memory that it may take, as far as is known."""
        ...

    def shortage(self, request: SlotRequest) -> Shortage | None:
        """None: it fits."""
        ...

    @property
    def prompt_bound(self) -> PromptBound | None:
        """Of the prompts that its memory can take; None = not known."""
        ...

    def admit(self) -> Lease: ...

    def snapshot(self) -> Snapshot: ...


Waiting = Callable[[Callable[[], Place]], AbstractContextManager[None]]  # gets what tells where the request stands

PASSED = 5.0  # seconds that others may go before a request that waits for memory
MOST_LARGE = 4  # of these that are looked at in one go
LOAD_GAP = 2  # requests in flight by which the preferred replica may exceed the least busy one
LONG_RESERVATION = 30.0  # seconds that a replica is kept free for a request that must be alone
TICK = 0.005  # seconds by which an alarm is late, so that it is not early
PATIENT = 20.0  # seconds that a request waits for a better replica than one that is free
RESERVATION = 10.0  # seconds that it is for one that cannot be batched, or waits for memory
PAUSE = 20.0  # seconds from the lapse of a reservation to the next one


def _untold(_place: Callable[[], Place]) -> AbstractContextManager[None]:
    return nullcontext()


class Pool:
    """``max_queue`` requests may be queued, each for at most ``queue_timeout`` seconds. ``reservations``: seconds that
    a replica is kept free for a request that cannot be batched, and for one that must be alone; ``pause``: seconds
    between two of them."""

    def __init__(
        self,
        backends: Sequence[Backend],
        *,
        max_queue: int,
        queue_timeout: float,
        reservations: tuple[float, float] = (RESERVATION, LONG_RESERVATION),
        pause: float = PAUSE,
    ) -> None:
        self.backends = tuple(backends)
        self._max_queue = max_queue
        self.queue_timeout = queue_timeout
        self._reservations = reservations
        self._pause = pause
        self._reserves_from = 0.0  # event loop time from which on a ticket may reserve a replica
        self._apart: dict[str, Lease] = {}  # by memory host, the request that has, or had last, all its memory
        self._arrivals = 0
        self._queue = TicketQueue(self._tell_demand)
        self._placing = Placing(self.backends)
        self._wake: asyncio.TimerHandle | None = None  # when somebody's turn may come by time alone
        self._shares = SlotShares()
        self._later: asyncio.TimerHandle | None = None  # dispatches while less urgent requests are queued
        self._turn = 0
        self._dispatching = True
        self._observers: set[Callable[[], None]] = set()
        for backend in self.backends:
            backend.on_change = self.dispatch

    @property
    def queued(self) -> int:
        return len(self._queue)

    @property
    def decisions(self) -> Sequence[Decision]:
        """The last ones about where a request is read, the oldest first."""
        return tuple(self._placing.decisions)

    def subscribe(self, observer: Callable[[], None]) -> Callable[[], None]:
        """``observer`` is called when a request was admitted, queued or ended, and when a replica has changed.
        Returns the function that unsubscribes."""
        self._observers.add(observer)
        return lambda: self._observers.discard(observer)

    def _tell(self) -> None:
        for observer in tuple(self._observers):
            observer()

    def ready(self, exclude: Excluded = NOTHING) -> bool:
        return any(b.state is State.READY for b in self._candidates(exclude))

    def may_answer(self, exclude: Excluded = NOTHING) -> bool:
        """A replica is up or starting."""
        return any(b.is_up_or_starting for b in self._candidates(exclude))

    def recovers(self, exclude: Excluded = NOTHING, *, until: float, needs: float = 0.0) -> bool:
        """A replica is up, or will be by ``until`` (event loop time) as far as is known, ``needs`` seconds before."""
        left = until - asyncio.get_running_loop().time() - needs
        return any(b.recovers and _is_back_within(b, left) for b in self._candidates(exclude))

    def unloaded(self, exclude: Excluded = NOTHING) -> bool:
        """No replica is up or starting, and one would be loaded for a request."""
        usable = self._candidates(exclude)
        return any(b.unloaded for b in usable) and not any(b.is_up_or_starting for b in usable)

    def loading_on_demand(self, exclude: Excluded = NOTHING) -> bool:
        return any(b.loading_on_demand for b in self._candidates(exclude))

    def reading(self, tokens: int, cached: int = 0) -> float:
        """Seconds that a prompt takes to be read after the first ``cached`` tokens, on the slowest replica of those
        that have shown it; 0.0 = not known."""
        return max(b.flight.reading.seconds(tokens, cached) for b in self.backends)

    def has_another(self, backend: str) -> bool:
        """Another replica than ``backend`` is there for what comes while this one reads a long prompt."""
        now = asyncio.get_running_loop().time()
        return any(
            b.id != backend and b.responsive and b.has_slot() and not self._placing.batch(b, now).longs
            for b in self.backends
        )

    def prompt_bound(self) -> PromptBound | None:
        """Of the replica that has the most memory; None = not known of all."""
        bounds = [b.prompt_bound for b in self.backends]
        known = [bound for bound in bounds if bound is not None]
        return max(known, key=lambda bound: bound.tokens) if known and len(known) == len(bounds) else None

    def _candidates(self, exclude: Excluded) -> Sequence[Backend]:
        """An instance that was tried is none; the one after it is."""
        return [b for b in self.backends if _is_candidate(b, exclude)] if exclude else self.backends

    def _tell_demand(self, queued: int) -> None:
        ready = [backend for backend in self.backends if backend.state is State.READY]
        for backend in self.backends:
            backend.set_demand(queued, accompanied=any(other is not backend for other in ready[:2]))

    def _to_load(self, exclude: Excluded) -> list[Backend]:
        """The unloaded replicas; without those that were refused memory a moment ago, if another replica may answer."""
        others = self.may_answer(exclude)
        unloaded = [b for b in self._candidates(exclude) if b.unloaded]
        return [b for b in unloaded if not (others and b.recently_denied)]

    async def acquire(self, request: SlotRequest = ANY, *, waiting: Waiting = _untold) -> Lease | Refusal:
        """``waiting`` is entered while the request is queued. Cancelling gives back a lease that was granted
        meanwhile."""
        # No request is overtaken: ``dispatch`` has left no slot free that a queued request could use.
        within = request.within
        seconds = self.queue_timeout if within is None else max(0.0, min(self.queue_timeout, within))
        self._arrivals += 1
        loop = asyncio.get_running_loop()
        now = loop.time()
        self._shares.note(request.priority, now)
        ticket = Ticket(self._arrivals, request, now, now + seconds, loop.create_future())
        ticket.particular = self._placing.came(request, now)
        ticket.patient_until = now + min(PATIENT, seconds / 2)
        lease = self._pick(ticket)
        if lease is None and not request.exclude and len(self._queue) >= self._max_queue:
            ticket.patient_until = now
            lease = self._pick(ticket)
        if lease is not None:
            self._tell()
            return lease
        self._queue.awaits(ticket, None)  # as long as it is not queued
        loads = self._to_load(request.exclude)
        if not loads and not self.recovers(request.exclude, until=ticket.until, needs=request.needs):
            return Refusal(Why.UNAVAILABLE, patience=seconds)
        if not request.exclude and len(self._queue) >= self._max_queue and not self._displace(request.priority):
            return Refusal(Why.QUEUE_FULL, queued=len(self._queue))
        with waiting(partial(self._place, ticket)):
            return await self._wait(ticket, seconds, loads)

    def _displace(self, priority: Priority) -> bool:
        """The queue is full: a request of a less urgent class makes room, if there is one."""
        last = self._queue.less_urgent(priority)
        if last is None:
            return False
        if not last.future.done():
            waited = asyncio.get_running_loop().time() - last.came
            last.future.set_result(Refusal(Why.DISPLACED, waited=waited, queued=len(self._queue) - 1))
        self._leave(last)
        return True

    def _place(self, ticket: Ticket) -> Place:
        now = asyncio.get_running_loop().time()
        before, eta = self._queue.standing(ticket, now)
        waits_for = WaitsFor.SLOT
        if ticket.request.alone or ticket.request.unbatchable:
            waits_for = WaitsFor.IDLE
        elif not self._has_share(ticket.priority):
            waits_for = WaitsFor.MORE_URGENT
        elif (numbers := self._shortage(ticket)) is not None:
            return Place(before, eta, WaitsFor.MEMORY, numbers)
        elif (usable := self._usable(ticket)) and not self._in_turn(ticket, usable):
            waits_for = WaitsFor.TURN
        return Place(before, eta, waits_for)

    def _shortage(self, ticket: Ticket) -> str | None:
        """Why memory keeps it waiting, of the replica where the least is missing; None: it does not."""
        if ticket.short_since is None:
            return None
        short = [b.shortage(ticket.request) for b in self.backends if self._has_slot(b)]
        least = min((one for one in short if one is not None), key=lambda one: one.missing, default=None)
        return None if least is None else str(least)

    def look_again(self) -> None:
        for backend in self.backends:
            backend.look_again()

    async def _wait(self, ticket: Ticket, seconds: float, loads: Sequence[Backend]) -> Lease | Refusal:
        """The ticket is queued before a replica is loaded for it: a load is granted only where there is demand."""
        self._queue.join(ticket)
        if ticket.particular:
            self._best(ticket)  # the replica that it waits for
        self._set_alarm(ticket.came)
        if ticket.priority is not Priority.INTERACTIVE:
            self._look_later()
        self._reserve(ticket)
        self._load(loads)
        self._tell()
        timer = asyncio.get_running_loop().call_later(seconds, self._expire, ticket, seconds)
        try:
            return await ticket.future
        except asyncio.CancelledError:
            if ticket.future.done() and not ticket.future.cancelled():
                granted = ticket.future.result()
                if isinstance(granted, Lease):
                    granted.release()
            elif ticket in self._queue:
                self._leave(ticket)
            raise
        finally:
            timer.cancel()

    def _look_later(self) -> None:
        """What holds less urgent requests back may end with time alone."""
        if self._later is None:
            self._later = asyncio.get_running_loop().call_later(HELD_UP / 2, self._look)

    def _look(self) -> None:
        self._later = None
        if self._queue:
            self.dispatch()
            self._look_later()

    def _load(self, backends: Sequence[Backend]) -> None:
        """Each replica reports its change at once. Dispatching is held back until all were told to load: otherwise a
        first replica that cannot load would have the queued requests refused."""
        self._dispatching = False
        for backend in backends:
            backend.load()
        self._dispatching = True
        if backends:
            self.dispatch()

    def _expire(self, ticket: Ticket, waited: float) -> None:
        if ticket in self._queue:
            why = Why.QUEUE_TIMEOUT if self.ready(ticket.request.exclude) else Why.LOADING
            if not ticket.future.done():
                left = len(self._queue) - 1
                ticket.future.set_result(
                    Refusal(why, waited=waited, queued=left, unbatchable=ticket.request.unbatchable)
                )
            self._leave(ticket)

    def _leave(self, ticket: Ticket) -> None:
        """Leave the queue without a lease. A replica that was reserved for the ticket may serve other requests."""
        if ticket.reserved and not ticket.request.alone:
            self._pause_reservations()
        if self._queue.leave(ticket):
            self.dispatch()
        else:
            self._tell()

    def _begun(self, lease: Lease) -> None:
        """The prompt was read."""
        waits = self._queue.particular or self._queue.failovers or (self._placing.any_long and len(self._queue))
        if lease.long or waits:
            self.dispatch()

    def dispatch(self) -> None:
        """A slot was freed, or a replica changed its state: serve the queue. Tickets that must be alone take reserved
        replicas, so their place in the queue does not matter, but that bystanders come before suspects. Where
        no slot is free, and a replica is up or starting, the cost does not grow with the number of tickets that can
        share a batch."""
        if not self._dispatching:
            return
        began = asyncio.get_running_loop().time()
        if self._placing.any_long:
            self._placing.over(began)
        for _ in range(len(self.backends) + 1):
            claims = self._queue.claims
            self._serve_all()
            if claims <= self._queue.claims:
                break  # else those that were served before may take what is kept free no longer
        self._set_alarm(began)
        self._tell_demand(len(self._queue))
        self._tell()

    def _serve_all(self) -> None:
        for ticket in (*self._queue.failovers, *self._queue.alone, *islice(self._queue.large, MOST_LARGE)):
            self._serve(ticket)
        if self.may_answer():
            self._serve_while_slots()
        else:  # they wait for a replica to come back, or are refused
            for ticket in tuple(self._queue.others):
                self._serve(ticket)
        self._serve_unbatchable()

    def _serve_while_slots(self) -> None:
        now = asyncio.get_running_loop().time()
        while any(self._serve_first(line) for line in self._queue.others.lines(now)):
            pass

    def _serve_first(self, line: Iterable[Ticket]) -> bool:
        """The first of one class that can be served; the others go on waiting. False: none of the first can. What keeps
        one waiting for which it does not matter where it is read keeps all such that came later."""
        plain = True
        for ticket in tuple(islice(line, LOOKED_AT)):
            if not (plain or ticket.particular):
                continue
            self._serve_unbatchable(before=ticket)
            if not self._any_slot(ticket):
                return False
            self._serve(ticket)
            if ticket not in self._queue:
                return True
            if ticket.short_since is not None:
                self._queue.set_aside(ticket)
                return True  # the next one may be smaller
            plain = plain and ticket.particular
        return False

    def _set_alarm(self, since: float) -> None:
        """For the next moment at which somebody's turn may come, or his patience ends, by time alone. ``since``: before
        all that was decided now was decided."""
        if self._wake is not None:
            self._wake.cancel()
            self._wake = None
        particular = self._queue.particular
        if not (particular or (self._placing.any_long and len(self._queue))):
            return
        ends = (ticket.patient_until for ticket in particular if ticket.patient_until > since)
        times = [*ends, *filter(None, [self._placing.changes_at(since)])]
        if times:
            self._wake = asyncio.get_running_loop().call_at(min(times) + TICK, self.dispatch)

    def _serve_unbatchable(self, before: Ticket | None = None) -> None:
        for ticket in tuple(self._queue.unbatchable):
            if before is not None and ticket.turn >= before.turn:
                break
            self._serve(ticket)

    def _any_slot(self, ticket: Ticket) -> bool:
        reserved = self._queue.reserved(ticket)
        free = any(self._has_slot(backend) and backend.id not in reserved for backend in self.backends)
        return free and self._has_share(ticket.priority)

    def _has_share(self, priority: Priority) -> bool:
        """One more request of that class may be in flight, beside those of all classes that are not more urgent."""
        if priority is Priority.INTERACTIVE:
            return True
        now = asyncio.get_running_loop().time()
        slots = sum(b.spec.max_inflight for b in self.backends if b.state is State.READY)
        more_urgent = sum(len(b.flight) - b.flight.count_of(priority) for b in self.backends)
        return self._shares.is_moment(priority, now, beside=more_urgent) and all(
            sum(b.flight.slots_of(level) for b in self.backends) < self._shares.most(level, slots, now)
            for level in Priority
            if level <= priority
        )

    def _has_slot(self, backend: Backend) -> bool:
        """No request that has all the memory is in flight on another replica."""
        apart = self._apart.get(backend.spec.memory_host)
        return backend.has_slot() and (apart is None or not (apart.alone and apart.in_flight))

    def _sharing(self, backend: Backend) -> list[Backend]:
        """The replicas of this model that use the same memory, itself included."""
        return [other for other in self.backends if other.spec.memory_host == backend.spec.memory_host]

    def _is_idle(self, backend: Backend, ticket: Ticket) -> bool:
        if not ticket.request.apart:
            return not backend.inflight
        return not any(b.inflight or b.state in (State.DRAINING, State.STOPPING) for b in self._sharing(backend))

    def _serve(self, ticket: Ticket) -> None:
        if ticket.future.done():  # cancelled: ``_wait`` finds the ticket gone from the queue
            self._queue.leave(ticket)
            return
        self._reserve(ticket)
        outcome: Lease | Refusal | None = self._pick(ticket)
        if outcome is None and not self._is_to_wait(ticket):
            outcome = Refusal(Why.UNAVAILABLE, queued=len(self._queue) - 1)
        if outcome is not None:
            served_at = asyncio.get_running_loop().time() if isinstance(outcome, Lease) else None
            self._queue.leave(ticket, served_at=served_at)
            ticket.future.set_result(outcome)

    def _is_to_wait(self, ticket: Ticket) -> bool:
        """A start takes as long as it takes; one that has failed again may now be back too late."""
        exclude, needs = ticket.request.exclude, ticket.request.needs
        return self.may_answer(exclude) or self.recovers(exclude, until=ticket.until, needs=needs)

    def _reserve(self, ticket: Ticket) -> None:
        """For a request that needs an idle replica, or one with a smaller batch, in its turn: keeps free the one that
        will probably be idle first. For one that cannot be batched, not one on which an abandoned request goes on:
        nobody knows for how long."""
        if not ticket.request.reserves or not self._needs_reservation(ticket):
            return
        taken = self._queue.reserved(ticket)
        usable = {
            b.id: b
            for b in self._candidates(ticket.request.exclude)
            if b.state is State.READY and b.id not in taken and (ticket.request.alone or not b.abandoned)
        }
        if ticket.reserved and not ticket.reserved.isdisjoint(usable):
            return
        now = asyncio.get_running_loop().time()
        if ticket.reserved or (now >= self._reserves_from and self._queue.may_reserve(ticket, now)):
            best = min(usable.values(), key=lambda b: (b.abandoned, b.inflight), default=None)
            self._keep_free(ticket, best)

    def _needs_reservation(self, ticket: Ticket) -> bool:
        if ticket.request.alone or ticket.request.unbatchable:
            return True
        since = ticket.short_since
        return since is not None and asyncio.get_running_loop().time() - since >= PASSED

    def _keep_free(self, ticket: Ticket, backend: Backend | None) -> None:
        kept = [] if backend is None else self._sharing(backend) if ticket.request.apart else [backend]
        ticket.keep_free(frozenset(b.id for b in kept))
        if kept and ticket.lapse is None:
            seconds = self._reservations[ticket.request.alone]
            ticket.lapse = asyncio.get_running_loop().call_later(seconds, self._lapse, ticket)

    def _lapse(self, ticket: Ticket) -> None:
        ticket.keep_free(frozenset())
        self._pause_reservations()
        self.dispatch()

    def _pause_reservations(self) -> None:
        """A reservation was in vain: for some time others are not kept waiting again."""
        loop = asyncio.get_running_loop()
        self._reserves_from = loop.time() + self._pause
        loop.call_later(self._pause, self.dispatch)

    def _free(self, ticket: Ticket) -> list[Backend]:
        """The replicas that can take the request now."""
        reserved = frozenset[str]() if ticket.request.alone else self._queue.reserved(ticket)
        free = [b for b in self._candidates(ticket.request.exclude) if b.id not in reserved and self._has_slot(b)]
        if ticket.request.alone:
            return [b for b in free if self._is_idle(b, ticket)]
        if not ticket.request.exclude and not self._has_share(ticket.priority):
            return []
        if ticket.request.unbatchable:
            free = [b for b in free if not (b.inflight and b.engine is Engine.MLX_LM)]
        roomy = [b for b in free if b.fits(ticket.request)]
        if free and not roomy and ticket.short_since is None:
            ticket.short_since = asyncio.get_running_loop().time()
        return self._gathered(roomy, ticket.priority)

    def _gathered(self, free: list[Backend], priority: Priority) -> list[Backend]:
        """Those among them that have requests of the class already, where these are to share one replica."""
        if priority is Priority.INTERACTIVE or not self._shares.gathers(priority, asyncio.get_running_loop().time()):
            return free
        return [b for b in free if b.flight.slots_of(priority)] or free

    def _usable(self, ticket: Ticket) -> list[Backend]:
        """A replica that misses its health checks is chosen only where there is no other."""
        usable = self._free(ticket)
        return usable if len(usable) < 2 else [b for b in usable if b.responsive] or usable

    def _in_turn(self, ticket: Ticket, usable: list[Backend]) -> list[Backend]:
        """Those among them whose turn it is to take it."""
        queue, placing = self._queue, self._placing
        if ticket.request.alone or not (ticket.particular or queue.any_awaiting or placing.any_long):
            return usable
        now = asyncio.get_running_loop().time()

        def admits(backend: Backend) -> bool:
            first = [] if ticket.request.exclude else queue.awaiting(backend.id, ticket)[:1]
            return placing.admits(
                ticket.request,
                backend,
                now,
                came=ticket.came,
                longs_came=first[0].came if first else math.inf,
                others_came=queue.plain_came,
            )

        return [backend for backend in usable if admits(backend)]

    def _pick(self, ticket: Ticket) -> Lease | None:
        best = self._best(ticket)
        if best is None:
            return None
        lease = best.admit()
        lease.work, lease.priority = ticket.request.work, ticket.priority
        self._shares.begins(ticket.priority, asyncio.get_running_loop().time())
        lease.alone = ticket.request.alone
        lease.unbatchable = ticket.request.unbatchable and best.engine is Engine.MLX_LM
        lease.on_begun = self._begun
        self._placing.admitted(lease, ticket.request, best)
        if ticket.request.apart:
            self._apart[best.spec.memory_host] = lease
        return lease

    def _best(self, ticket: Ticket) -> Backend | None:
        """None: there is none, or it is better to wait."""
        usable = self._usable(ticket)
        free = self._in_turn(ticket, usable)
        if ticket.request.alone or not (ticket.particular or (len(free) > 1 and self._placing.matters)):
            return self._least_busy(free, ticket.request.prefer)
        return self._cheapest(ticket, free, usable)

    def _least_busy(self, free: list[Backend], prefer: Seat | None) -> Backend | None:
        """The preferred replica, or the one with the fewest requests in flight; round robin among equals."""
        if not free:
            return None
        self._turn += 1
        count = len(self.backends)
        order = {b.id: (i - self._turn) % count for i, b in enumerate(self.backends)}
        best = min(free, key=lambda b: (b.inflight, order[b.id]))
        if prefer is None:
            return best
        own = next((b for b in free if (b.id, b.generation) == prefer), best)
        return own if own.inflight - best.inflight <= LOAD_GAP else best

    def _cheapest(self, ticket: Ticket, free: list[Backend], usable: list[Backend]) -> Backend | None:
        """By the cost model, and None where it is better to wait. ``free``: those among ``usable`` whose turn it is."""
        now, request = asyncio.get_running_loop().time(), ticket.request
        patient = ticket.particular and now < ticket.patient_until
        among = usable if patient or not free else free
        if not among:
            self._queue.awaits(ticket, None)
            return None
        self._turn += 1
        closed = frozenset(b.id for b in among if b not in free)
        choice = self._placing.choose(
            request, among, now, closed=closed, awaited=self._awaited(ticket, among), turn=self._turn
        )
        best = next(b for b in among if b.id == choice.id)
        joins = best.id not in closed
        self._queue.awaits(ticket, None if joins or not self._placing.is_long(request, best) else best.id)
        if ticket.particular and ticket.decided != (best.id, joins):
            ticket.decided = best.id, joins
            self._placing.decided(request, choice, best, now, joined=joins)
        return best if joins else None

    def _awaited(self, ticket: Ticket, backends: Iterable[Backend]) -> dict[str, float]:
        """Seconds of reading of the other long prompts that wait for each replica."""
        if not self._queue.any_awaiting:
            return {}
        return {
            b.id: sum(self._placing.reading(other.request, b) for other in self._queue.awaiting(b.id, ticket))
            for b in backends
        }


def _is_candidate(backend: Backend, exclude: Excluded) -> bool:
    if backend.state is State.READY:
        return not exclude.excludes(backend.id, backend.generation)
    return backend.id not in exclude.backends


def _is_back_within(backend: Backend, seconds: float) -> bool:
    """As far as is known: how long the first load of a model takes is not. A load on demand goes on only while requests
    are queued for it."""
    if backend.state is State.READY or backend.loading_on_demand:
        return True
    now = backend.snapshot()
    known = now.eta is not None and (now.eta_known or backend.state is not State.STARTING)
    return not known or now.eta is None or now.eta <= seconds

"""The replicas of one model behind one bounded queue.

``acquire`` returns a lease on a replica, or queues for one, or returns a ``Refusal``. The parts, each in its file:

    availability   which replicas may answer, now or later
    eligibility    which can take a request now, and what it waits for
    selection      which of these takes it: the fewest requests in flight, or the cost model
    placing        whose turn it is to have a prompt read, where that takes long
    reservations   replicas that are kept free for requests that need an idle one
    ticket_queue   who is queued, in which order
    dispatcher     serves the queue

A request that fails over, or goes on with the next slice of its prompt, re-enters at the head of the queue: it has
waited its turn already. The others take turns by class (``fair_queue``), and the less urgent ones leave slots free for
the more urgent (``slot_shares``).

A replica that restarts is a pause, not a refusal: the request is queued until the replica is back, unless it would be
back only after the request's patience.

Caveat: a request suspected of a crash is admitted alone, on an idle replica. One that is suspected of a shortage of
memory is alone with the memory, not only with its replica: no replica that shares it has a request in flight, or holds
what is left of a process that is being ended. These come last, the smallest first.

A request that mlx_lm.server cannot batch needs an idle replica as well, and holds it alone: beside others it would wait
in the server, silently, with everything that was sent after it. A request whose batch would not fit the memory of any
replica that has a slot waits, and smaller ones go before it for a time.
"""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

from backends.admission.availability import Availability
from backends.admission.backend import Backend
from backends.admission.dispatcher import Dispatcher
from backends.admission.eligibility import Eligibility
from backends.admission.excluded import NOTHING, Excluded
from backends.admission.lease import Lease
from backends.admission.placing import Decision, Placing
from backends.admission.reservations import LONG_RESERVATION, PAUSE, RESERVATION, Reservations
from backends.admission.selection import Selection
from backends.admission.slot_request import ANY, SlotRequest
from backends.admission.ticket_queue import Ticket, TicketQueue
from backends.domain.place import Place
from backends.domain.priority import Priority
from backends.domain.prompt_bound import PromptBound
from backends.domain.refusal import Refusal, Why
from backends.domain.snapshot import Seat
from backends.domain.state import State

Waiting = Callable[[Callable[[], Place]], AbstractContextManager[None]]  # gets what tells where the request stands

BOUND_HOLDS = 1.0  # seconds that what the memory can take is not looked at again
PATIENT = 20.0  # seconds that a request waits for a better replica than one that is free


def _untold(_place: Callable[[], Place]) -> AbstractContextManager[None]:
    return nullcontext()


class Pool:
    """``max_queue`` requests may be queued, each for at most ``queue_timeout`` seconds. ``reservations``, ``pause``:
    of ``Reservations``."""

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
        self.ids = tuple(backend.id for backend in backends)
        self._max_queue = max_queue
        self.queue_timeout = queue_timeout
        self._arrivals = 0
        self._bound: PromptBound | None = None
        self._bound_until = 0.0  # event loop time
        self._told: tuple[int, list[Backend]] | None = None  # to the replicas: (requests queued, those that are ready)
        self._observers: set[Callable[[], None]] = set()
        self._queue = TicketQueue(self._tell_demand)
        self._availability = Availability(self.backends)
        self._placing = Placing(self.backends)
        self._eligibility = Eligibility(self._availability, self._queue, self._placing)
        self._reservations = Reservations(
            self._availability, self._queue, seconds=reservations, pause=pause, dispatch=self.dispatch
        )
        self._dispatcher = Dispatcher(
            self._queue,
            self._availability,
            placing=self._placing,
            eligibility=self._eligibility,
            selection=Selection(self.backends, self._queue, self._placing, self._eligibility),
            reservations=self._reservations,
            changed=self._changed,
        )
        for backend in self.backends:
            backend.on_change = self.dispatch

    # -- what is known of the model ------------------------------------------------------------------------------------

    @property
    def queued(self) -> int:
        return len(self._queue)

    @property
    def width(self) -> int:
        """Requests that may be in flight at once on all replicas, when nothing is wrong."""
        return sum(backend.limit.requests for backend in self.backends)

    @property
    def decisions(self) -> Sequence[Decision]:
        """The last ones about where a request is read, the oldest first."""
        return tuple(self._placing.decisions)

    @property
    def seats(self) -> list[Seat]:
        """The present instances of its replicas."""
        return [Seat(name, backend.generation) for name, backend in zip(self.ids, self.backends, strict=True)]

    def ready(self, exclude: Excluded = NOTHING) -> bool:
        return self._availability.ready(exclude)

    def may_answer(self, exclude: Excluded = NOTHING) -> bool:
        """A replica is up or starting."""
        return self._availability.may_answer(exclude)

    def recovers(self, exclude: Excluded = NOTHING, *, until: float, needs: float = 0.0) -> bool:
        """A replica is up, or will be by ``until`` (event loop time) as far as is known, ``needs`` seconds before."""
        return self._availability.recovers(exclude, until - asyncio.get_running_loop().time() - needs)

    def unloaded(self, exclude: Excluded = NOTHING) -> bool:
        """No replica is up or starting, and one would be loaded for a request."""
        return self._availability.unloaded(exclude)

    def loading_on_demand(self, exclude: Excluded = NOTHING) -> bool:
        return self._availability.loading_on_demand(exclude)

    def reading(self, tokens: int, cached: int = 0) -> float:
        """Seconds that a prompt takes to be read after the first ``cached`` tokens, on the slowest replica of those
        that have shown it; 0.0 = not known."""
        return self._placing.slowest(tokens, cached)

    @property
    def knows_rate(self) -> bool:
        """A replica has shown how fast it reads."""
        return self._placing.knows_rate

    def has_another(self, backend: str) -> bool:
        """Another replica than ``backend`` is there for what comes while this one reads a long prompt."""
        now = asyncio.get_running_loop().time()
        return any(
            b.id != backend and b.responsive and b.has_slot() and not self._placing.batch(b, now).longs
            for b in self.backends
        )

    def begins_slices(self, prompt: object, backend: str) -> None:
        """``prompt``: any object by which it is known. A slice of it is read on ``backend``, and the next will be."""
        self._placing.begins_slices(prompt, backend)

    def has_slices_beside(self, prompt: object, backend: str) -> bool:
        """Another prompt is read in slices on ``backend``."""
        return self._placing.slices_on(backend, beside=prompt) > 0

    def ends_slices(self, prompt: object) -> None:
        """It has the lease for all that is left, or is given up."""
        if self._placing.ends_slices(prompt):
            self.dispatch()

    def prompt_bound(self) -> PromptBound | None:
        """Of the replica that has the most memory; None = not known of all."""
        now = asyncio.get_running_loop().time()
        if now >= self._bound_until:
            bounds = [b.prompt_bound for b in self.backends]
            known = [bound for bound in bounds if bound is not None]
            whole = known and len(known) == len(bounds)
            self._bound = max(known, key=lambda bound: bound.tokens) if whole else None
            self._bound_until = now + BOUND_HOLDS
        return self._bound

    def look_again(self) -> None:
        for backend in self.backends:
            backend.look_again()

    # -- acquiring a lease ---------------------------------------------------------------------------------------------

    async def acquire(self, request: SlotRequest = ANY, *, waiting: Waiting = _untold) -> Lease | Refusal:
        """``waiting`` is entered while the request is queued. Cancelling gives back a lease that was granted
        meanwhile."""
        # No request is overtaken: the dispatcher has left no slot free that a queued request could use.
        within = request.within
        seconds = self.queue_timeout if within is None else max(0.0, min(self.queue_timeout, within))
        self._arrivals += 1
        loop = asyncio.get_running_loop()
        now = loop.time()
        self._eligibility.shares.note(request.priority, now)
        ticket = Ticket(self._arrivals, request, now, now + seconds, loop.create_future())
        ticket.by_cost = self._placing.arrived(request, now)
        ticket.patient_until = now + min(PATIENT, seconds / 2)
        lease = self._dispatcher.pick(ticket)
        if lease is None and not request.again and len(self._queue) >= self._max_queue:
            ticket.patient_until = now
            lease = self._dispatcher.pick(ticket)
        if lease is not None:
            self._tell()
            return lease
        self._queue.awaits(ticket, None)  # as long as it is not queued
        loads = self._availability.to_load(request.exclude)
        needs = self.reading(request.work.prompt_tokens)  # after a start nothing is cached
        if not loads and not self.recovers(request.exclude, until=ticket.until, needs=needs):
            return Refusal(Why.UNAVAILABLE, patience=seconds)
        if not request.again and len(self._queue) >= self._max_queue and not self._displace(request.priority):
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
        waits_for, numbers = self._eligibility.waits_for(ticket, now)
        return Place(before, eta, waits_for, numbers)

    async def _wait(self, ticket: Ticket, seconds: float, loads: Sequence[Backend]) -> Lease | Refusal:
        """The ticket is queued before a replica is loaded for it: a load is granted only where there is demand."""
        self._queue.join(ticket)
        self._dispatcher.joined(ticket)
        self._reservations.reserve(ticket)
        self._dispatcher.load(loads)
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
            self._reservations.pause()
        if self._queue.leave(ticket):
            self.dispatch()
        else:
            self._tell()

    # -- changes -------------------------------------------------------------------------------------------------------

    def dispatch(self) -> None:
        """A slot was freed, or a replica changed its state."""
        self._dispatcher.dispatch()

    def _changed(self) -> None:
        self._tell_demand(len(self._queue))
        self._tell()

    def _tell_demand(self, queued: int) -> None:
        ready = [backend for backend in self.backends if backend.state is State.READY]
        if (queued, ready) == self._told:
            return
        self._told = queued, ready
        for backend in self.backends:
            backend.set_demand(queued, accompanied=any(other is not backend for other in ready[:2]))

    def subscribe(self, observer: Callable[[], None]) -> Callable[[], None]:
        """``observer`` is called when a request was admitted, queued or ended, and when a replica has changed.
        Returns the function that unsubscribes."""
        self._observers.add(observer)
        return lambda: self._observers.discard(observer)

    def _tell(self) -> None:
        for observer in tuple(self._observers):
            observer()

"""Serves the queue of one model: whenever a slot is freed, a replica changes, or time alone makes it somebody's turn.

Choosing a replica and admitting to it is one synchronous step, so no decision rests on a stale view.
"""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from itertools import islice

from backends.admission.availability import Availability
from backends.admission.backend import Backend
from backends.admission.eligibility import Eligibility
from backends.admission.fair_queue import Line
from backends.admission.lease import Lease
from backends.admission.placing import Placing
from backends.admission.reservations import Reservations
from backends.admission.selection import Selection
from backends.admission.slot_shares import HELD_UP
from backends.admission.ticket_queue import LOOKED_AT, Ticket, TicketQueue
from backends.domain.engine import Engine
from backends.domain.priority import Priority
from backends.domain.refusal import Refusal, Why

MOST_LARGE = 4  # requests of one class that wait for memory and are looked at in one go
TICK = 0.005  # seconds after the moment at which the alarm goes off: timers may be early by less than that


class Dispatcher:
    """``changed`` is called after each dispatch."""

    def __init__(
        self,
        queue: TicketQueue,
        availability: Availability,
        *,
        placing: Placing,
        eligibility: Eligibility,
        selection: Selection,
        reservations: Reservations,
        changed: Callable[[], None],
    ) -> None:
        self._queue = queue
        self._availability = availability
        self._placing = placing
        self._eligibility = eligibility
        self._selection = selection
        self._reservations = reservations
        self._changed = changed
        self._dispatching = True
        self._alarm: asyncio.TimerHandle | None = None  # when somebody's turn may come by time alone
        self._later: asyncio.TimerHandle | None = None  # dispatches while less urgent requests are queued

    def pick(self, ticket: Ticket) -> Lease | None:
        """Chooses a replica and takes a slot there; None: there is none, or it is better to wait."""
        now = asyncio.get_running_loop().time()
        best = self._selection.best(ticket, now)
        if best is None:
            return None
        lease = best.admit()
        lease.work, lease.priority = ticket.request.work, ticket.priority
        lease.alone = ticket.request.alone
        if ticket.request.held:
            lease.cached = ticket.request.cached_on(lease.seat)
        lease.unbatchable = ticket.request.unbatchable and best.engine is Engine.MLX_LM
        lease.on_begun = self._begun
        self._placing.admitted(lease, ticket.request, best)
        self._eligibility.admitted(ticket, best, lease, now)
        return lease

    def joined(self, ticket: Ticket) -> None:
        """The ticket has been queued."""
        if ticket.by_cost:  # notes the replica that it waits for
            self._selection.best(ticket, asyncio.get_running_loop().time())
        self._set_alarm(ticket.came)
        if ticket.priority is not Priority.INTERACTIVE:
            self._look_later()

    def load(self, backends: Sequence[Backend]) -> None:
        """Each replica reports its change at once. Dispatching is held back until all were told to load: otherwise a
        first replica that cannot load would have the queued requests refused."""
        self._dispatching = False
        for backend in backends:
            backend.load()
        self._dispatching = True
        if backends:
            self.dispatch()

    def _look_later(self) -> None:
        """What holds less urgent requests back may end with time alone."""
        if self._later is None:
            self._later = asyncio.get_running_loop().call_later(HELD_UP / 2, self._look)

    def _look(self) -> None:
        self._later = None
        if self._queue:
            self.dispatch()
            self._look_later()

    def _begun(self, lease: Lease) -> None:
        """The prompt was read."""
        waits = self._queue.by_cost or self._queue.again or (self._placing.any_long and len(self._queue))
        if lease.long or waits or (len(self._queue) and self._opens_slot(lease)):
            self.dispatch()

    def _opens_slot(self, lease: Lease) -> bool:
        """Its replica takes only so many prompts at a time, and now one more."""
        backends = (backend for backend in self._availability.backends if backend.id == lease.spec.id)
        return any(backend.limit.unread is not None and backend.has_slot() for backend in backends)

    def dispatch(self) -> None:
        """A slot was freed, or a replica changed its state: serve the queue. Tickets that must be alone take reserved
        replicas, so their place in the queue does not matter, but that bystanders come before suspects. Where
        no slot is free, and a replica is up or starting, the cost does not grow with the number of tickets that can
        share a batch."""
        if not self._dispatching:
            return
        began = asyncio.get_running_loop().time()
        self._placing.over(began)
        for _ in range(len(self._availability.backends) + 1 if self._queue else 0):
            claims = self._queue.claims
            self._serve_all()
            if claims <= self._queue.claims:
                break  # else a reservation has ended, and tickets that were looked at before may take the replica
        self._set_alarm(began)
        self._changed()

    def _serve_all(self) -> None:
        for ticket in self._queue.overdue:
            self._serve(ticket)
        for ticket in (*self._queue.again, *self._queue.alone):
            self._serve(ticket)
        if self._availability.may_answer():
            self._serve_while_slots()
        else:  # they wait for a replica to come back, or are refused
            for ticket in tuple(self._queue.others):
                self._serve(ticket)
        self._serve_unbatchable()

    def _serve_while_slots(self) -> None:
        now = asyncio.get_running_loop().time()
        seen = set[Ticket]()  # of those that wait for memory: what is served meanwhile only takes more of it
        while any(self._serve_first(line, seen, now) for line in self._queue.others.lines(now)):
            pass

    def _serve_first(self, line: Line[Ticket], seen: set[Ticket], now: float) -> bool:
        """Serves the first of one class that can be served. False: none of the first can. Those that wait for memory
        come first; others may go before them in the turns of their class, but no turn of another class is theirs."""
        for ticket in [ticket for ticket in islice(line.aside, MOST_LARGE) if ticket not in seen]:
            seen.add(ticket)
            if not self._eligibility.any_slot(ticket, now):
                return False
            self._serve(ticket)
            if ticket not in self._queue:
                return True
        return self._serve_first_of(line.rest, now)

    def _serve_first_of(self, rest: Iterable[Ticket], now: float) -> bool:
        """What keeps a ticket waiting that is not placed by cost keeps all such tickets behind it waiting too, so these
        are passed over."""
        plain = True
        for ticket in tuple(islice(rest, LOOKED_AT)):
            if not (plain or ticket.by_cost):
                continue
            self._serve_unbatchable(before=ticket)
            if not self._eligibility.any_slot(ticket, now):
                return False
            self._serve(ticket)
            if ticket not in self._queue:
                return True
            if ticket.short_since is not None:
                self._queue.set_aside(ticket)
                return True  # the next one may be smaller
            plain = plain and ticket.by_cost
        return False

    def _serve_unbatchable(self, before: Ticket | None = None) -> None:
        for ticket in tuple(self._queue.unbatchable):
            if before is not None and ticket.turn >= before.turn:
                break
            self._serve(ticket)

    def _serve(self, ticket: Ticket) -> None:
        if ticket.future.done():  # cancelled: who waits finds the ticket gone from the queue
            self._queue.leave(ticket)
            return
        self._reservations.reserve(ticket)
        outcome: Lease | Refusal | None = self.pick(ticket)
        if outcome is None and not self._is_to_wait(ticket):
            outcome = Refusal(Why.UNAVAILABLE, queued=len(self._queue) - 1)
        if outcome is not None:
            served_at = asyncio.get_running_loop().time() if isinstance(outcome, Lease) else None
            self._queue.leave(ticket, served_at=served_at)
            ticket.future.set_result(outcome)

    def _is_to_wait(self, ticket: Ticket) -> bool:
        """A start takes as long as it takes; one that has failed again may now be back too late."""
        exclude, left = ticket.request.exclude, ticket.until - asyncio.get_running_loop().time()
        return self._availability.may_answer(exclude) or self._availability.recovers(
            exclude, left - self._placing.slowest(ticket.request.work.prompt_tokens)
        )

    def _set_alarm(self, since: float) -> None:
        """For the next moment at which somebody's turn may come, or the end of a request's patience, by time alone.
        ``since``: before all that was decided now was decided."""
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        by_cost = self._queue.by_cost
        if not (by_cost or (self._placing.any_long and len(self._queue))):
            return
        ends = (ticket.patient_until for ticket in by_cost if ticket.patient_until > since)
        times = [*ends, *filter(None, [self._placing.changes_at(since)])]
        if times:
            self._alarm = asyncio.get_running_loop().call_at(min(times) + TICK, self.dispatch)

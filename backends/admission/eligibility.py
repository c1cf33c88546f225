"""Which replicas can take a queued request now, and what keeps it waiting where none can.

    candidates   not tried before                                    ``Availability``
    free         a slot, not reserved for another, within the share of the request's class, idle where that is needed,
                 and memory for the batch with it
    usable       of these, the ones that answer their health checks
    in turn      of these, the ones where it is the turn of this prompt to be read                   ``Placing``

No clock: time (event loop, seconds) is an argument.
"""

import math
from collections.abc import Sequence

from backends.admission.availability import Availability
from backends.admission.backend import Backend, sharing_memory
from backends.admission.lease import Lease
from backends.admission.placing import Placing
from backends.admission.slot_request import SlotRequest
from backends.admission.slot_shares import SlotShares
from backends.admission.ticket_queue import Ticket, TicketQueue
from backends.domain.engine import Engine
from backends.domain.place import WaitsFor
from backends.domain.priority import Priority
from backends.domain.state import State


class Eligibility:
    """Of the replicas of one model. Owns the shares of the classes, and who has a memory to itself."""

    def __init__(self, availability: Availability, queue: TicketQueue, placing: Placing) -> None:
        self.shares = SlotShares()
        self._availability = availability
        self._backends: Sequence[Backend] = availability.backends
        self._queue = queue
        self._placing = placing
        self._apart: dict[str, Lease] = {}  # by memory host, the request that has, or had last, all its memory

    def admitted(self, ticket: Ticket, backend: Backend, lease: Lease, now: float) -> None:
        self.shares.begins(ticket.priority, now)
        if ticket.request.apart:
            self._apart[backend.spec.memory_host] = lease

    def any_slot(self, ticket: Ticket, now: float) -> bool:
        """A replica has a slot for it, as far as that can be told quickly."""
        reserved = self._queue.reserved(ticket)
        free = any(self._has_slot(backend) and backend.id not in reserved for backend in self._backends)
        return free and self._has_share(ticket.priority, now)

    def is_plain(self, ticket: Ticket) -> bool:
        """Nothing counts for it but what ``has_place`` asks of a replica: as for most requests."""
        queue, placing, request = self._queue, self._placing, ticket.request
        special = (
            request.alone or request.unbatchable or request.exclude or request.priority is not Priority.INTERACTIVE
        )
        waits = ticket.by_cost or queue.any_awaiting or placing.any_long or placing.matters
        return not (special or waits or queue.reserved(ticket))

    def has_place(self, backend: Backend, request: SlotRequest) -> bool:
        """For one that is plain."""
        return self._has_slot(backend) and backend.responsive and backend.fits(request)

    def usable(self, ticket: Ticket, now: float) -> list[Backend]:
        """A replica that misses its health checks is chosen only where there is no other."""
        usable = self._free(ticket, now)
        return usable if len(usable) < 2 else [b for b in usable if b.responsive] or usable

    def in_turn(self, ticket: Ticket, usable: list[Backend], now: float) -> list[Backend]:
        """Those among them whose turn it is to take it."""
        queue, placing = self._queue, self._placing
        if not (ticket.by_cost or queue.any_awaiting or placing.any_long) or ticket.request.alone:
            return usable

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

    def waits_for(self, ticket: Ticket, now: float) -> tuple[WaitsFor, str]:
        """What keeps a queued request waiting, and its numbers for people ("" = none)."""
        if ticket.request.alone or ticket.request.unbatchable:
            return WaitsFor.IDLE, ""
        if not self._has_share(ticket.priority, now):
            return WaitsFor.MORE_URGENT, ""
        if (numbers := self._shortage(ticket)) is not None:
            return WaitsFor.MEMORY, numbers
        if usable := self.usable(ticket, now):
            return (WaitsFor.SLOT if self.in_turn(ticket, usable, now) else WaitsFor.TURN), ""
        kept = self._memory_share(ticket.priority, now) < 1.0 and any(self._has_slot(b) for b in self._backends)
        return (WaitsFor.MORE_URGENT if kept else WaitsFor.SLOT), ""

    def _shortage(self, ticket: Ticket) -> str | None:
        """Why memory keeps it waiting, of the replica where the least is missing; None: it does not."""
        if ticket.short_since is None:
            return None
        short = [b.shortage(ticket.request) for b in self._backends if self._has_slot(b)]
        least = min((one for one in short if one is not None), key=lambda one: one.missing, default=None)
        return None if least is None else str(least)

    def _free(self, ticket: Ticket, now: float) -> list[Backend]:
        request = ticket.request
        alone, priority = request.alone, request.priority
        reserved = frozenset[str]() if alone else self._queue.reserved(ticket)
        candidates = self._availability.candidates(request.exclude)
        free = [b for b in candidates if not (reserved and b.id in reserved) and self._has_slot(b)]
        if alone:
            return [b for b in free if self._is_idle(b, ticket)]
        if not (self._has_share(priority, now) or request.exclude):
            return []
        if request.unbatchable:
            free = [b for b in free if not (b.inflight and b.engine is Engine.MLX_LM)]
        share = 1.0 if request.exclude else self._memory_share(priority, now)
        roomy = [b for b in free if b.fits(request, share)]
        if free and not roomy and ticket.short_since is None and not any(share < 1.0 and b.fits(request) for b in free):
            ticket.short_since = now
        return self._gathered(roomy, priority, now)

    def _has_slot(self, backend: Backend) -> bool:
        """No request that has all the memory is in flight on another replica."""
        apart = self._apart.get(backend.spec.memory_host) if self._apart else None
        return backend.has_slot() and (apart is None or not (apart.alone and apart.in_flight))

    def _is_idle(self, backend: Backend, ticket: Ticket) -> bool:
        if not ticket.request.apart:
            return not backend.inflight
        others = sharing_memory(backend, self._backends)
        return not any(b.inflight or b.state in (State.DRAINING, State.STOPPING) for b in others)

    def _has_share(self, priority: Priority, now: float) -> bool:
        """One more request of that class may be in flight, beside those of all classes that are not more urgent."""
        if priority is Priority.INTERACTIVE:
            return True
        slots = sum(b.limit.requests for b in self._backends if b.state is State.READY)
        more_urgent = sum(len(b.flight) - b.flight.count_of(priority) for b in self._backends)
        return self.shares.may_begin(priority, now, beside=more_urgent) and all(
            sum(b.flight.slots_of(level) for b in self._backends) < self.shares.most(level, slots, now)
            for level in Priority
            if level <= priority
        )

    def _memory_share(self, priority: Priority, now: float) -> float:
        """Of each replica's room for its batch, that a request of that class may fill: all of it, if it is the only one
        of its class and of less urgent ones."""
        if priority is Priority.INTERACTIVE or not any(b.flight.count_of(priority) for b in self._backends):
            return 1.0
        return self.shares.of(priority, now)

    def _gathered(self, free: list[Backend], priority: Priority, now: float) -> list[Backend]:
        """Those among them that have requests of the class already, where these are to share one replica."""
        if priority is Priority.INTERACTIVE or not self.shares.gathers(priority, now):
            return free
        return [b for b in free if b.flight.slots_of(priority)] or free

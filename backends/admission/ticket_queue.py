"""The queued requests of one model, as tickets; which is served when is for the pool to decide."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain

from backends.admission.lease import Lease
from backends.admission.slot_request import SlotRequest
from backends.domain.refusal import Refusal


@dataclass(eq=False, slots=True)
class Ticket:
    """``number``: in the order of arrival. ``until``: event loop time at which it leaves the queue. ``future``: the
    outcome. ``reserved``: ids of replicas that take no other request until ``lapse``."""

    number: int
    request: SlotRequest
    until: float
    future: "asyncio.Future[Lease | Refusal]"
    reserved: frozenset[str] = frozenset()
    lapse: asyncio.TimerHandle | None = None

    def keep_free(self, backends: frozenset[str]) -> None:
        """Empty: the reservation is over."""
        self.reserved = backends
        if self.lapse is not None and not backends:
            self.lapse.cancel()
            self.lapse = None


class TicketQueue:
    """The queued tickets by kind, each kind in the order in which it is served, which is that of arrival except for
    those that must be alone. Leaving and counting take constant time, joining too except for those.

    ``alone``: tickets that must be alone, bystanders of a shortage of memory before its suspects, and of these the
    smallest first; ``unbatchable``: of the rest, those that cannot share a batch; ``failovers``: of the rest, those
    of requests that were tried before; ``others``: those that were not."""

    def __init__(self, changed: Callable[[int], None]) -> None:
        self.alone: dict[Ticket, None] = {}
        self.unbatchable: dict[Ticket, None] = {}
        self.failovers: dict[Ticket, None] = {}
        self.others: dict[Ticket, None] = {}
        self._changed = changed  # called with the length

    def __len__(self) -> int:
        return len(self.alone) + len(self.unbatchable) + len(self.failovers) + len(self.others)

    def __contains__(self, ticket: Ticket) -> bool:
        return ticket in self._kind(ticket)

    def _kind(self, ticket: Ticket) -> dict[Ticket, None]:
        if ticket.request.alone:
            return self.alone
        if ticket.request.unbatchable:
            return self.unbatchable
        return self.failovers if ticket.request.exclude else self.others

    def join(self, ticket: Ticket) -> None:
        self._kind(ticket)[ticket] = None
        if ticket.request.alone:
            self.alone = dict.fromkeys(sorted(self.alone, key=_turn))
        self._changed(len(self))

    def leave(self, ticket: Ticket) -> bool:
        """True: a replica was reserved for the ticket, and may serve other requests now."""
        self._kind(ticket).pop(ticket, None)
        reserved = bool(ticket.reserved)
        ticket.keep_free(frozenset())
        self._changed(len(self))
        return reserved

    def reserved(self, ticket: Ticket) -> frozenset[str]:
        """Ids of the replicas that are reserved for other tickets. A request that was tried before, and may share a
        batch, is not kept out for one that must be alone: it is a bystander of the failure that this one may have
        caused."""
        if not self.alone and not self.unbatchable:
            return frozenset()
        heeded = (self.unbatchable,) if self._kind(ticket) is self.failovers else (self.alone, self.unbatchable)
        return frozenset().union(*(other.reserved for other in chain(*heeded) if other is not ticket))

    @property
    def reservations(self) -> frozenset[tuple[bool, str]]:
        """(whether it is for a ticket that must be alone, id of the replica)"""
        if not self.alone and not self.unbatchable:
            return frozenset()
        tickets = chain(self.alone, self.unbatchable)
        return frozenset((ticket.request.alone, backend) for ticket in tickets for backend in ticket.reserved)

    def may_reserve(self, ticket: Ticket) -> bool:
        """It is the ticket's turn to have a replica kept free. One that must be alone: no other of them has one. One
        that cannot share a batch: no ticket that could has come before it."""
        if ticket.request.alone:
            return not any(other.reserved for other in self.alone if other is not ticket)
        first = (next(iter(kind), None) for kind in (self.failovers, self.others))
        return all(other is None or other.number > ticket.number for other in first)


def _turn(ticket: Ticket) -> tuple[bool, int, int]:
    apart = ticket.request.apart
    return apart, ticket.request.work.prompt_tokens if apart else 0, ticket.number

"""The queued requests of one model, as tickets; which is served when is for the pool to decide."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from backends.admission.excluded import Excluded
from backends.admission.lease import Lease
from backends.domain.refusal import Refusal
from backends.domain.snapshot import Seat


@dataclass(eq=False, slots=True)
class Ticket:
    """``number``: in the order of arrival; the rest as for ``Pool.acquire``. ``until``: event loop time at which it
    leaves the queue. ``future``: the outcome."""

    number: int
    exclude: Excluded
    alone: bool
    reserves: bool
    unbatchable: bool
    prefer: Seat | None
    until: float
    needs: float
    future: "asyncio.Future[Lease | Refusal]"


class TicketQueue:
    """The queued tickets, each kind in the order of arrival. Joining, leaving and counting take constant time.

    ``alone``: tickets that must be alone, with the id of the replica that is reserved for each ("" = none);
    ``unbatchable``: of the rest, those that cannot share a batch, likewise; ``failovers``: of the rest, the tickets of
    requests that were tried before; ``others``: those that were not."""

    def __init__(self, changed: Callable[[int], None]) -> None:
        self.alone: dict[Ticket, str] = {}
        self.unbatchable: dict[Ticket, str] = {}
        self.failovers: dict[Ticket, None] = {}
        self.others: dict[Ticket, None] = {}
        self._changed = changed  # called with the length

    def __len__(self) -> int:
        return len(self.alone) + len(self.unbatchable) + len(self.failovers) + len(self.others)

    def __contains__(self, ticket: Ticket) -> bool:
        return any(ticket in kind for kind in (self.alone, self.unbatchable, self.failovers, self.others))

    def join(self, ticket: Ticket) -> None:
        if ticket.alone:
            self.alone[ticket] = ""
        elif ticket.unbatchable:
            self.unbatchable[ticket] = ""
        else:
            (self.failovers if ticket.exclude else self.others)[ticket] = None
        self._changed(len(self))

    def leave(self, ticket: Ticket) -> bool:
        """True: a replica was reserved for the ticket, and may serve other requests now."""
        reserved = bool(self.alone.pop(ticket, "") or self.unbatchable.pop(ticket, ""))
        self.failovers.pop(ticket, None)
        self.others.pop(ticket, None)
        self._changed(len(self))
        return reserved

    @property
    def reserved(self) -> frozenset[str]:
        if not self.alone and not self.unbatchable:
            return frozenset()
        return frozenset((*self.alone.values(), *self.unbatchable.values()))

    def is_next(self, ticket: Ticket) -> bool:
        """No ticket that could share a batch has come before this one."""
        first = (next(iter(kind), None) for kind in (self.failovers, self.others))
        return all(other is None or other.number > ticket.number for other in first)

"""The queued requests of one model, as tickets; which is served when is for the pool to decide."""

import asyncio
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice

from backends.admission.fair_queue import FairQueue
from backends.admission.lease import Lease
from backends.admission.slot_request import SlotRequest
from backends.admission.standing import Standings
from backends.domain.priority import Priority
from backends.domain.refusal import Refusal

LOOKED_AT = 32  # tickets that are placed by cost and looked at in one go

# Seconds by which a ticket that cannot share a batch, or waits for memory, counts as having come later: it holds up all
# others.
HELD_BACK: Mapping[Priority, float] = {Priority.INTERACTIVE: 0.0, Priority.AGENT: 10.0, Priority.BACKGROUND: 30.0}


@dataclass(eq=False, slots=True)
class Ticket:
    """``number``: in the order of arrival. ``came``, ``until``: event loop time of its arrival, and at which it leaves
    the queue. ``future``: the outcome. ``reserved``: ids of replicas that take no other request until ``lapse``.
    ``by_cost``: the cost model chooses its replica (``placing``). ``patient_until``: until when it may wait for a
    replica that is better for it than one that is free. ``decided``: the replica that was chosen last, and whether to
    join it.
    ``short_since``: event loop time from which on there were slots for it, but too little memory; None = never."""

    number: int
    request: SlotRequest
    came: float
    until: float
    future: "asyncio.Future[Lease | Refusal]"
    reserved: frozenset[str] = frozenset()
    lapse: asyncio.TimerHandle | None = None
    by_cost: bool = False
    patient_until: float = 0.0
    decided: tuple[str, bool] | None = None
    short_since: float | None = None

    @property
    def priority(self) -> Priority:
        return self.request.priority

    @property
    def turn(self) -> tuple[float, int]:
        """Its place in a line of those that can share a batch and those that cannot; the least is first."""
        return self.came + HELD_BACK[self.priority], self.number

    def keep_free(self, backends: frozenset[str]) -> None:
        """Empty: the reservation is over."""
        self.reserved = backends
        if self.lapse is not None and not backends:
            self.lapse.cancel()
            self.lapse = None


class TicketQueue:
    """The queued tickets by kind, each kind in the order in which it is served. Leaving and counting take constant
    time, joining too except for the first two.

    ``alone``: tickets that must be alone, bystanders of a shortage of memory before its suspects, and of these the
    smallest first; ``unbatchable``: of the rest, those that cannot share a batch, by their turns; ``again``: of the
    rest, those of requests that were admitted before, in the order of arrival; ``others``: all others, by class; those
    for which there was too little memory are set aside.
    """

    def __init__(self, changed: Callable[[int], None]) -> None:
        self.alone: dict[Ticket, None] = {}
        self.unbatchable: dict[Ticket, None] = {}
        self.again: dict[Ticket, None] = {}
        self.others = FairQueue[Ticket]()
        self._all: set[Ticket] = set()
        self._by_cost: dict[Ticket, None] = {}
        self._plain: dict[Ticket, None] = {}  # the rest of ``others``
        self._awaited: dict[str, dict[Ticket, None]] = {}  # by replica, the long ones that wait for it
        self._changed = changed  # called with the length
        self._standings = Standings[Ticket](self._line)

    def __len__(self) -> int:
        return len(self._all)

    def __contains__(self, ticket: Ticket) -> bool:
        return ticket in self._all

    def _kind(self, ticket: Ticket) -> dict[Ticket, None] | FairQueue[Ticket]:
        if ticket.request.alone:
            return self.alone
        if ticket.request.unbatchable:
            return self.unbatchable
        if ticket.request.again:
            return self.again
        return self.others

    def set_aside(self, ticket: Ticket) -> None:
        """A ticket of ``others`` whose turn it was: there is too little memory for it."""
        self.others.set_aside(ticket, ticket.priority)
        self._plain.pop(ticket, None)

    def join(self, ticket: Ticket) -> None:
        self._all.add(ticket)
        kind = self._kind(ticket)
        if isinstance(kind, FairQueue):
            if not kind.of_class(ticket.priority):
                self._standings.begin(ticket.priority, ticket.came)
            kind.join(ticket, ticket.priority, ticket.came)
        else:
            kind[ticket] = None
        if ticket.by_cost:
            self._by_cost[ticket] = None
        elif kind is self.others:
            self._plain[ticket] = None
        if kind is self.alone:
            self.alone = dict.fromkeys(sorted(self.alone, key=_by_size))
        elif kind is self.unbatchable:
            self.unbatchable = dict.fromkeys(sorted(self.unbatchable, key=lambda other: other.turn))
        self._changed(len(self))

    def leave(self, ticket: Ticket, *, served_at: float | None = None) -> bool:
        """``served_at``: event loop time, if it leaves with a lease. True: a replica was reserved for the ticket, or
        others were kept out for it, and may serve other requests now."""
        self._all.discard(ticket)
        kind = self._kind(ticket)
        if not isinstance(kind, FairQueue):
            kind.pop(ticket, None)
        elif served_at is None:
            kind.leave(ticket, ticket.priority)
        else:
            kind.served(ticket, ticket.priority, served_at)
            self._standings.served(ticket.priority, served_at)
        self._by_cost.pop(ticket, None)
        self._plain.pop(ticket, None)
        awaited = self.awaits(ticket, None)
        reserved = bool(ticket.reserved)
        ticket.keep_free(frozenset())
        self._changed(len(self))
        return reserved or awaited

    def awaits(self, ticket: Ticket, backend: str | None) -> bool:
        """The long prompt of ``ticket`` is to be read on ``backend``, which takes no later requests before that; None =
        not decided. True: it was decided before, and is no longer."""
        awaited = False
        for other in tuple(self._awaited):
            if other == backend or ticket not in self._awaited[other]:
                continue
            awaited = True
            del self._awaited[other][ticket]
            if not self._awaited[other]:
                del self._awaited[other]
        if backend is not None:
            self._awaited.setdefault(backend, {})[ticket] = None
        return awaited and backend is None

    def awaiting(self, backend: str, but: Ticket) -> list[Ticket]:
        """The first long ones that wait for that replica, without ``but``."""
        mine = self._awaited.get(backend)
        return [ticket for ticket in islice(mine, LOOKED_AT) if ticket is not but] if mine else []

    @property
    def overdue(self) -> list[Ticket]:
        """The first long newcomer for each replica, if it came before those that go on with their slices: they take
        turns."""
        going = [ticket for ticket in self.again if ticket.request.long]
        if not going:
            return []
        lines = ([t for t in islice(line, LOOKED_AT) if not t.request.again] for line in self._awaited.values())
        first = [line[0] for line in lines if line]
        return [t for t in first if all(t.came < one.came and t.priority <= one.priority for one in going)]

    @property
    def any_awaiting(self) -> bool:
        return bool(self._awaited)

    @property
    def by_cost(self) -> list[Ticket]:
        """The first tickets whose replica the cost model chooses."""
        return list(islice(self._by_cost, LOOKED_AT)) if self._by_cost else []

    @property
    def plain_came(self) -> float:
        """Event loop time at which the first other ticket came that can share a batch; inf = there is none."""
        first = next(iter(self._plain), None)
        return math.inf if first is None else first.came

    def standing(self, ticket: Ticket, now: float) -> tuple[int, float | None]:
        """(tickets that are served before it, seconds until it is served, None = not known). For one that is not queued
        yet: as if it came now."""
        place = self._standings.of(ticket, now) if ticket in self else None
        before, of_class = place if place is not None else self._after_all(ticket.priority)
        in_turn = self._kind(ticket) is self.others and ticket.short_since is None
        return before, self._standings.eta(ticket.priority, of_class, now) if in_turn else None

    def _after_all(self, priority: Priority) -> tuple[int, int]:
        """The place of one that comes now, roughly."""
        urgent = sum(self.others.of_class(other) for other in Priority if other <= priority)
        return len(self.again) + len(self.alone) + urgent, self.others.of_class(priority)

    def _line(self, now: float) -> Iterator[tuple[Ticket, Priority]]:
        """All, about in the order in which they will be served."""
        unbatchable = list(self.unbatchable)[::-1]
        for ticket in chain(self.again, self.alone):
            yield ticket, ticket.priority
        for ticket in self.others.order(now):
            while unbatchable and unbatchable[-1].turn < ticket.turn:
                first = unbatchable.pop()
                yield first, first.priority
            yield ticket, ticket.priority
        for ticket in reversed(unbatchable):
            yield ticket, ticket.priority

    def less_urgent(self, priority: Priority) -> Ticket | None:
        """The ticket that makes room for one of that class: of the least urgent class the one that came last, if that
        class is less urgent than ``priority``. Requests that were admitted before are not sent away."""
        last = self.others.last_below(priority)
        below = [ticket for ticket in self.unbatchable if ticket.priority > priority]
        below += [last] if last is not None else []
        return max(below, key=lambda ticket: (ticket.priority, ticket.number), default=None)

    def reserved(self, ticket: Ticket) -> frozenset[str]:
        """Ids of the replicas that are reserved for other tickets. A request that was tried before, and may share a
        batch, is not kept out for one that must be alone: it is a bystander of the failure that this one may have
        caused."""
        if not self._may_be_reserved:
            return frozenset()
        of_failover = bool(ticket.request.exclude) and self._kind(ticket) is self.again
        heeded = chain(() if of_failover else self.alone, self.unbatchable, self.again, self.others.aside)
        return frozenset().union(*(other.reserved for other in heeded if other is not ticket))

    @property
    def _may_be_reserved(self) -> bool:
        """Only these reserve replicas."""
        return bool(self._all and (self.alone or self.unbatchable or self.again or self.others.any_aside))

    @property
    def claims(self) -> frozenset[tuple[str, str]]:
        """Replicas that are kept free: (kind of the tickets for which, id of the replica)."""
        if not (self._may_be_reserved or self._awaited):
            return frozenset()
        kinds = (
            ("alone", self.alone),
            ("unbatchable", self.unbatchable),
            ("again", self.again),
            ("short of memory", self.others.aside),
        )
        reserved = {(name, backend) for name, kind in kinds for ticket in kind for backend in ticket.reserved}
        return frozenset(reserved | {("long", backend) for backend in self._awaited})

    def may_reserve(self, ticket: Ticket, now: float) -> bool:
        """It is the ticket's turn to have a replica kept free. One that must be alone: no other of them has one. One
        that cannot share a batch: it was held back long enough, and no ticket that could share one is before it. One
        that waits for memory: no other of them has one."""
        if ticket.request.alone:
            return not any(other.reserved for other in self.alone if other is not ticket)
        if not ticket.request.unbatchable:
            waiting = chain(self.again, self.others.aside)
            return not any(other.reserved for other in waiting if other is not ticket)
        first = [*self.others.heads(now), *islice(self.again, 1)]
        return ticket.turn[0] <= now and all(other.turn > ticket.turn for other in first)


def _by_size(ticket: Ticket) -> tuple[bool, int, int]:
    apart = ticket.request.apart
    return apart, ticket.request.work.prompt_tokens if apart else 0, ticket.number

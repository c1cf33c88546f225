"""Which replica takes a request, of those that can: the simple rule, or the cost model where the reading of a prompt
takes noticeable time.

No clock: time (event loop, seconds) is an argument.
"""

from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter

from backends.admission.backend import Backend
from backends.admission.eligibility import Eligibility
from backends.admission.placing import Placing
from backends.admission.slot_request import SlotRequest
from backends.admission.ticket_queue import Ticket, TicketQueue

INFLIGHT = attrgetter("inflight")
LOAD_GAP = 2  # requests in flight by which the preferred replica may exceed the least busy one


class Selection:
    """Among the replicas of one model. Owns the turn of the round robin."""

    def __init__(
        self, backends: Sequence[Backend], queue: TicketQueue, placing: Placing, eligibility: Eligibility
    ) -> None:
        self._backends = tuple(backends)
        self._queue = queue
        self._placing = placing
        self._eligibility = eligibility
        self._turn = 0

    def best(self, ticket: Ticket, now: float) -> Backend | None:
        """None: there is none, or it is better to wait; for which replica is noted in the queue."""
        request, rules = ticket.request, self._eligibility
        if rules.is_plain(ticket) and (best := self._least_busy(request, lambda b: rules.has_place(b, request))):
            return best
        usable = rules.usable(ticket, now)
        free = rules.in_turn(ticket, usable, now)
        if request.alone or not (ticket.by_cost or (len(free) > 1 and self._placing.matters)):
            return self._least_busy(request, free.__contains__)
        return self._cheapest(ticket, free, usable, now)

    def _least_busy(self, request: SlotRequest, takes: Callable[[Backend], bool]) -> Backend | None:
        """Of those that take it, the preferred replica, or the one with the fewest requests in flight; round robin
        among equals."""
        turn = (self._turn + 1) % len(self._backends)
        in_order = sorted(self._backends[turn:] + self._backends[:turn], key=INFLIGHT)
        best = next(filter(takes, in_order), None)
        if best is None:
            return None
        self._turn += 1
        prefer = request.prefer
        if prefer is None:
            return best
        own = next((b for b in in_order if (b.id, b.generation) == prefer and takes(b)), best)
        return own if own.inflight - best.inflight <= LOAD_GAP else best

    def _cheapest(self, ticket: Ticket, free: list[Backend], usable: list[Backend], now: float) -> Backend | None:
        """By the cost model, and None where it is better to wait. ``free``: those among ``usable`` whose turn it is."""
        request = ticket.request
        patient = ticket.by_cost and now < ticket.patient_until
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
        if ticket.by_cost and ticket.decided != (best.id, joins):
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

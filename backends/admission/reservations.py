"""Replicas that are kept free for a request that needs an idle one, or one with a smaller batch.

Under steady load no replica would ever be idle, so such a request reserves a replica, which is drained and takes no
other request meanwhile. That costs the other requests, so the reservation lapses after a time: then the request waits
for a replica that happens to be idle, or for a later reservation, which begins after a pause at the earliest.

Requests that must be alone reserve one after the other, the suspects of a shortage of memory last; requests that cannot
be batched reserve in the order of arrival, so that many of them do not keep all others out; a request whose batch does
not fit the memory reserves when smaller ones have gone before it for ``PASSED`` seconds, and later if it is less urgent
(``HELD_BACK``).
"""

import asyncio
from collections.abc import Callable

from backends.admission.availability import Availability
from backends.admission.backend import Backend, sharing_memory
from backends.admission.ticket_queue import HELD_BACK, Ticket, TicketQueue
from backends.domain.state import State

LONG_RESERVATION = 30.0  # seconds that a replica is kept free for a request that must be alone
RESERVATION = 10.0  # seconds that it is for one that cannot be batched, or waits for memory
PAUSE = 20.0  # seconds from the lapse of a reservation to the next one
PASSED = 5.0  # seconds that others may go before a request that waits for memory, if it is interactive


class Reservations:
    """Of one model. ``seconds``: that a replica is kept free for a request that cannot be batched or waits for memory,
    and for one that must be alone; ``pause``: seconds between two of them. ``dispatch`` is called when others may have
    what was kept free. Which ticket holds which reservation is noted in the ticket."""

    def __init__(
        self,
        availability: Availability,
        queue: TicketQueue,
        *,
        seconds: tuple[float, float],
        pause: float,
        dispatch: Callable[[], None],
    ) -> None:
        self._availability = availability
        self._queue = queue
        self._seconds = seconds
        self._pause = pause
        self._dispatch = dispatch
        self._reserves_from = 0.0  # event loop time from which on a ticket may reserve a replica

    def reserve(self, ticket: Ticket) -> None:
        """In its turn, the replica that will probably be idle first. For a request that cannot be batched, not one on
        which an abandoned request goes on: how long is unknown."""
        now = asyncio.get_running_loop().time()
        if not ticket.request.reserves or not _needs_reservation(ticket, now):
            return
        taken = self._queue.reserved(ticket)
        usable = {
            b.id: b
            for b in self._availability.candidates(ticket.request.exclude)
            if b.state is State.READY and b.id not in taken and (ticket.request.alone or not b.abandoned)
        }
        if ticket.reserved and not ticket.reserved.isdisjoint(usable):
            return
        if ticket.reserved or (now >= self._reserves_from and self._queue.may_reserve(ticket, now)):
            best = min(usable.values(), key=lambda b: (b.abandoned, b.inflight), default=None)
            self._keep_free(ticket, best)

    def pause(self) -> None:
        """A reservation was in vain: for some time others are not kept waiting again."""
        loop = asyncio.get_running_loop()
        self._reserves_from = loop.time() + self._pause
        loop.call_later(self._pause, self._dispatch)

    def _keep_free(self, ticket: Ticket, backend: Backend | None) -> None:
        kept = [] if backend is None else [backend]
        if backend is not None and ticket.request.apart:
            kept = sharing_memory(backend, self._availability.backends)
        ticket.keep_free(frozenset(b.id for b in kept))
        if kept and ticket.lapse is None:
            seconds = self._seconds[ticket.request.alone]
            ticket.lapse = asyncio.get_running_loop().call_later(seconds, self._lapse, ticket)

    def _lapse(self, ticket: Ticket) -> None:
        ticket.keep_free(frozenset())
        self.pause()
        self._dispatch()


def _needs_reservation(ticket: Ticket, now: float) -> bool:
    if ticket.request.alone or ticket.request.unbatchable:
        return True
    return ticket.short_since is not None and now - ticket.short_since >= PASSED + HELD_BACK[ticket.priority]

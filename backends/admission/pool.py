"""The replicas of one model behind one bounded queue.

``acquire`` gives a lease on the replica with the least work in flight, or waits in line for one, or says why there
will be none. Choosing and admitting happen in one synchronous stretch, so that no decision rests on a stale view.

A request that fails over re-enters at the head of the line: it has waited its turn already.

The awkward bit: a request that may be what brought a backend down is let in alone, on an idle replica. Under steady
load no replica would ever be idle, so such a request reserves one, which takes nobody else until it has emptied. That
costs the others, so it is bounded in time.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from backends.admission.lease import Changed, Lease
from backends.domain.refusal import Refusal, Why
from backends.domain.snapshot import Seat, Snapshot
from backends.domain.spec import BackendSpec
from backends.domain.state import State


class Backend(Protocol):
    """One replica, supervised or remote, as the pool and the fleet see it."""

    on_change: Changed
    line: Callable[[], int]
    spec: BackendSpec

    @property
    def id(self) -> str: ...

    @property
    def state(self) -> State: ...

    @property
    def inflight(self) -> int: ...

    @property
    def generation(self) -> int: ...

    @property
    def responsive(self) -> bool: ...

    @property
    def is_up_or_starting(self) -> bool:
        """It is ready, or on its way to be."""
        ...

    @property
    def asleep(self) -> bool:
        """Its model is not loaded, because nobody needed it."""
        ...

    @property
    def waking(self) -> bool:
        """It is being loaded for requests that wait."""
        ...

    @property
    def reluctant(self) -> bool:
        """There was no room for it only just now."""
        ...

    def wake(self) -> None: ...

    def has_slot(self) -> bool: ...

    def admit(self) -> Lease: ...

    def snapshot(self) -> Snapshot: ...


LOAD_GAP = 2  # requests that the replica of one's own may have in flight more than another
ALONE_WITHIN = 30.0  # seconds that a replica is kept free for a request that has to be alone


@dataclass(eq=False, slots=True)
class _Ticket:
    exclude: frozenset[str]
    alone: bool
    prefer: Seat | None
    future: "asyncio.Future[Lease | Refusal]"
    reserved: str = ""  # id of the replica that is emptied for it


class Pool:
    """``max_queue`` requests may wait, each for at most ``queue_timeout`` seconds."""

    def __init__(self, backends: Sequence[Backend], *, max_queue: int, queue_timeout: float) -> None:
        self.backends = tuple(backends)
        self._max_queue = max_queue
        self._queue_timeout = queue_timeout
        self._line: deque[_Ticket] = deque()
        self._turn = 0
        for backend in self.backends:
            backend.on_change = self.dispatch
            backend.line = lambda: len(self._line)

    @property
    def queued(self) -> int:
        return len(self._line)

    def ready(self, exclude: frozenset[str] = frozenset()) -> bool:
        return any(backend.state is State.READY for backend in self.backends if backend.id not in exclude)

    def may_answer(self, exclude: frozenset[str] = frozenset()) -> bool:
        """Some replica is ready, or on its way."""
        return any(backend.is_up_or_starting for backend in self.backends if backend.id not in exclude)

    def asleep(self, exclude: frozenset[str] = frozenset()) -> bool:
        """No replica is up or on its way, and one would be loaded for a request."""
        usable = [backend for backend in self.backends if backend.id not in exclude]
        return any(b.asleep for b in usable) and not any(b.is_up_or_starting for b in usable)

    def waking(self, exclude: frozenset[str] = frozenset()) -> bool:
        return any(backend.waking for backend in self.backends if backend.id not in exclude)

    def _wake(self, exclude: frozenset[str]) -> bool:
        """Load what is asleep, if there is any; not what had no room only just now, where another replica can do it."""
        others = self.may_answer(exclude)
        asleep = [b for b in self.backends if b.asleep and b.id not in exclude and not (others and b.reluctant)]
        for backend in asleep:
            backend.wake()
        return bool(asleep)

    async def acquire(
        self,
        *,
        exclude: frozenset[str] = frozenset(),
        within: float = 0.0,
        alone: bool = False,
        prefer: Seat | None = None,
    ) -> Lease | Refusal:
        """``exclude``: ids of replicas already tried, which makes this a failover. ``within``: seconds, 0 = no bound
        but the queue's own. ``alone``: on an idle replica, that takes nobody else meanwhile. ``prefer``: the replica
        that has the beginning of the prompt, unless it has much more to do than another. Cancelling gives back
        whatever was granted meanwhile."""
        # Nobody is overtaken: ``dispatch`` has left no slot free that anyone in line could use.
        lease = self._pick(exclude, alone=alone, prefer=prefer)
        if lease is not None:
            return lease
        if self._wake(exclude) and (lease := self._pick(exclude, alone=alone, prefer=prefer)) is not None:
            return lease  # it had only been about to leave
        if not self.may_answer(exclude):
            return Refusal(Why.UNAVAILABLE)
        if not exclude and len(self._line) >= self._max_queue:
            return Refusal(Why.QUEUE_FULL, queued=len(self._line))
        bounds = [self._queue_timeout, within or self._queue_timeout, *([ALONE_WITHIN] if alone else [])]
        ticket = _Ticket(exclude, alone, prefer, asyncio.get_running_loop().create_future())
        return await self._wait(ticket, min(bounds))

    def idle(self, exclude: frozenset[str]) -> Lease | None:
        """A replica that has nothing to do as it is, for this request alone."""
        return self._pick(exclude, alone=True)

    async def _wait(self, ticket: _Ticket, patience: float) -> Lease | Refusal:
        self._reserve(ticket)
        if ticket.exclude:
            self._line.appendleft(ticket)
        else:
            self._line.append(ticket)
        timer = asyncio.get_running_loop().call_later(patience, self._expire, ticket, patience)
        try:
            return await ticket.future
        except asyncio.CancelledError:
            if ticket.future.done() and not ticket.future.cancelled():
                granted = ticket.future.result()
                if isinstance(granted, Lease):
                    granted.release()
            elif ticket in self._line:
                self._leave(ticket)
            raise
        finally:
            timer.cancel()

    def _expire(self, ticket: _Ticket, waited: float) -> None:
        if ticket in self._line:
            why = Why.QUEUE_TIMEOUT if self.ready() else Why.LOADING
            if not ticket.future.done():
                ticket.future.set_result(Refusal(why, waited=waited, queued=len(self._line) - 1))
            self._leave(ticket)

    def _leave(self, ticket: _Ticket) -> None:
        """Without a slot. What was reserved for it may serve others."""
        self._line.remove(ticket)
        if ticket.reserved:
            self.dispatch()

    def dispatch(self) -> None:
        """A slot was freed, or a replica changed its state: serve the line, in order."""
        for ticket in tuple(self._line):
            if ticket.future.done():  # cancelled; its owner is about to take it out
                continue
            self._reserve(ticket)
            outcome: Lease | Refusal | None = self._pick(ticket.exclude, alone=ticket.alone, prefer=ticket.prefer)
            if outcome is None and not self.may_answer(ticket.exclude):
                outcome = Refusal(Why.UNAVAILABLE, queued=len(self._line) - 1)
            if outcome is not None:
                self._line.remove(ticket)
                ticket.future.set_result(outcome)

    def _reserve(self, ticket: _Ticket) -> None:
        """For a request that has to be alone, the replica that will probably be idle first."""
        if not ticket.alone:
            return
        taken = {other.reserved for other in self._line if other is not ticket}
        usable = {
            b.id: b.inflight
            for b in self.backends
            if b.state is State.READY and b.id not in ticket.exclude and b.id not in taken
        }
        if ticket.reserved not in usable:
            ticket.reserved = min(usable, key=lambda name: usable[name], default="")

    def _pick(self, exclude: frozenset[str], *, alone: bool, prefer: Seat | None = None) -> Lease | None:
        """The one preferred, or the one with the least in flight; among equals, in turn; one that misses its health
        checks only for want of another."""
        reserved = frozenset() if alone else {ticket.reserved for ticket in self._line}
        free = [b for b in self.backends if b.id not in exclude and b.id not in reserved and b.has_slot()]
        if alone:
            free = [b for b in free if not b.inflight]
        if not free:
            return None
        self._turn += 1
        count = len(self.backends)
        order = {b.id: (i - self._turn) % count for i, b in enumerate(self.backends)}
        best = min(free, key=lambda b: (not b.responsive, b.inflight, order[b.id]))
        if prefer is not None:
            own = next((b for b in free if (b.id, b.generation) == prefer and b.responsive), best)
            best = own if own.inflight - best.inflight <= LOAD_GAP else best
        lease = best.admit()
        lease.alone = alone
        return lease

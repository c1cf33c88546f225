"""Slots: who is in flight on one backend.

A ``Lease`` is a slot on one life of one backend. It is given out synchronously by the backend that owns it, and given
back exactly once however often ``release`` is called. Through it the request opens its exchange, and through it the
supervisor reaches every request in flight: to see how long it has heard nothing, and to end it with a reason.
"""

from collections.abc import Callable
from typing import Protocol

from backends.diagnosis.suspects import RequestProgress
from backends.domain.failure import CallFailure
from backends.domain.spec import BackendSpec
from backends.upstream.exchange import Dialer, Exchange, ExchangeError, Request

Changed = Callable[[], None]


class Owner(Protocol):
    """The side of a backend that its leases speak to."""

    spec: BackendSpec
    on_change: Changed

    def released(self, lease: "Lease") -> None: ...


class Judge(Protocol):
    """One life, as the post mortem of a call needs it."""

    generation: int
    dialer: Dialer

    async def diagnose(self, error: ExchangeError, lease: "Lease") -> CallFailure: ...


class Lease:
    """``admitted`` is the event loop's time."""

    __slots__ = (
        "_life",
        "_owner",
        "_released",
        "admitted",
        "alone",
        "completed",
        "exchange",
        "failed",
        "generation",
        "internal",
        "non_streaming",
        "progress",
        "spec",
    )

    def __init__(self, owner: Owner, life: Judge, admitted: float) -> None:
        self._owner = owner
        self._life = life
        self._released = False
        self.generation = life.generation
        self.admitted = admitted
        self.exchange: Exchange | None = None
        self.progress = RequestProgress()  # of the request; kept up to date by the reader of its answer
        self.non_streaming = False
        self.alone = False  # nobody else is let in beside it; set by whoever grants it
        self.internal = False  # the gateway's own test, not a client's request
        self.completed = False  # answered in full: set by whoever read the answer
        self.failed = False  # it was not, in a way that speaks against the backend; neither = neutral
        self.spec = owner.spec

    def open(self, request: Request, *, non_streaming: bool = False) -> Exchange:
        """The one exchange of this lease; the caller closes it. ``non_streaming``: its answer comes in one piece at the
        end, so that silence means nothing until then."""
        self.non_streaming = non_streaming
        self.exchange = self._life.dialer.open(request)
        return self.exchange

    @property
    def last_byte_at(self) -> float:
        """When the last byte came for it; 0.0 = none yet."""
        return self.exchange.last_heard if self.exchange is not None else 0.0

    @property
    def waiting(self) -> bool:
        return self.exchange is not None and self.exchange.waiting_since > 0

    def silence(self, now: float) -> float:
        """Seconds for which it has waited for the backend in vain; also as it was when its client left."""
        if self.exchange is None or not self.exchange.waiting_since:
            return 0.0
        return now - max(self.exchange.last_heard, self.exchange.waiting_since)

    async def diagnose(self, error: ExchangeError) -> CallFailure:
        """What really happened, given what the wire showed. Waits a moment for the process's own evidence."""
        return await self._life.diagnose(error, self)

    def abort(self, error: ExchangeError) -> None:
        if self.exchange is not None:
            self.exchange.abort(error)

    def allow_others(self) -> None:
        """Others may be let in beside it from now on."""
        if self.alone:
            self.alone = False
            self._owner.on_change()

    def release(self) -> None:
        if not self._released:
            self._released = True
            self._owner.released(self)


class InFlight:
    """The leases of one backend, over all its lives: a dying life's requests may still be winding up."""

    def __init__(self) -> None:
        self._leases: set[Lease] = set()
        self._idle_at = 0.0  # when nobody was waiting for it
        self._heard = 0.0  # the last byte for a request that has ended since

    def __len__(self) -> int:
        return len(self._leases)

    @property
    def anybody_alone(self) -> bool:
        """The one that is in flight must have nobody beside it. (Such a one is let in only where there is no other.)"""
        return len(self._leases) == 1 and next(iter(self._leases)).alone

    @property
    def clients(self) -> int:
        """How many requests of clients."""
        return sum(not lease.internal for lease in self._leases)

    def add(self, lease: Lease) -> None:
        if not self.of(lease.generation):
            self._idle_at = lease.admitted
            self._heard = 0.0
        self._leases.add(lease)

    def discard(self, lease: Lease) -> None:
        self._leases.discard(lease)
        self._heard = max(self._heard, lease.last_byte_at)

    def of(self, generation: int) -> list[Lease]:
        return [lease for lease in self._leases if lease.generation == generation]

    def progress_of(self, generation: int) -> dict[Lease, RequestProgress]:
        """What those that have been sent to this life are doing."""
        return {lease: lease.progress for lease in self.of(generation) if lease.exchange is not None}

    def abort(self, generation: int, error: ExchangeError) -> None:
        for lease in self.of(generation):
            lease.abort(error)

    def all_non_streaming(self, generation: int) -> bool:
        """Whether none of those that wait could have heard anything yet."""
        return all(lease.non_streaming for lease in self.of(generation) if lease.waiting)

    def quiet(self, generation: int, now: float) -> tuple[int, float]:
        """How many requests wait for this life to say something, and for how many seconds it has said nothing to
        anybody while somebody waited. To be asked at every tick.

        A request that has only just arrived is no sign of life: steady arrivals must not hide a stall. One whose
        client does not read is no sign of death: nobody reads from the backend for it.
        """
        leases = self.of(generation)
        waiting = sum(lease.waiting for lease in leases)
        if not waiting:
            self._idle_at = now
            return 0, 0.0
        return waiting, now - max(self._idle_at, self._heard, *(lease.last_byte_at for lease in leases))

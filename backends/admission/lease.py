"""Leases: the requests in flight on one replica.

A ``Lease`` is one slot on one instance of a replica. The replica grants it synchronously; it is given back exactly
once, however often ``release`` is called. The request opens its exchange through its lease. The supervisor measures
the silence of each request in flight through the lease, and aborts the request with a reason.
"""

from collections.abc import Callable
from typing import Protocol

from backends.diagnosis.engine import EngineIdentity
from backends.diagnosis.suspects import RequestProgress
from backends.domain.failure import CallFailure
from backends.domain.spec import BackendSpec
from backends.upstream.exchange import Dialer, Exchange, ExchangeError, Request

Changed = Callable[[], None]


class Owner(Protocol):
    """A replica, as its leases need it."""

    spec: BackendSpec
    on_change: Changed

    def released(self, lease: "Lease") -> None: ...


class ServingInstance(Protocol):
    """One instance, as its leases need it."""

    generation: int
    dialer: Dialer
    identity: EngineIdentity

    async def diagnose(self, error: ExchangeError, lease: "Lease") -> CallFailure: ...


class Lease:
    """``admitted``: event loop time."""

    __slots__ = (
        "_instance",
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

    def __init__(self, owner: Owner, instance: ServingInstance, admitted: float) -> None:
        self._owner = owner
        self._instance = instance
        self._released = False
        self.generation = instance.generation
        self.admitted = admitted
        self.exchange: Exchange | None = None
        self.progress = RequestProgress()  # of the request; updated by the reader of its answer
        self.non_streaming = False
        self.alone = False  # no other request may be in flight beside it; set by the pool
        self.internal = False  # a self-test of the gateway, not a client's request
        self.completed = False  # answered in full; set by the reader of the answer
        self.failed = False  # failed in a way that counts against the replica; neither = neutral
        self.spec = owner.spec

    def open(self, request: Request, *, non_streaming: bool = False) -> Exchange:
        """Opens the only exchange of this lease; the caller closes it. ``non_streaming``: the answer comes in one piece
        at the end, so silence before that is no sign of a stall."""
        self.non_streaming = non_streaming
        self.exchange = self._instance.dialer.open(request)
        return self.exchange

    @property
    def identity(self) -> EngineIdentity:
        """Of the server that this lease is for."""
        return self._instance.identity

    @property
    def last_byte_at(self) -> float:
        """Event loop time of the last byte for this request; 0.0 = none yet."""
        return self.exchange.last_heard if self.exchange is not None else 0.0

    @property
    def waiting(self) -> bool:
        return self.exchange is not None and self.exchange.waiting_since > 0

    def silence(self, now: float) -> float:
        """Seconds that the request has waited for the backend without a byte. Still valid after its client left."""
        if self.exchange is None or not self.exchange.waiting_since:
            return 0.0
        return now - max(self.exchange.last_heard, self.exchange.waiting_since)

    async def diagnose(self, error: ExchangeError) -> CallFailure:
        """The cause of a failed call, from the error on the wire and the evidence of the process, which is waited for
        briefly."""
        return await self._instance.diagnose(error, self)

    def abort(self, error: ExchangeError) -> None:
        if self.exchange is not None:
            self.exchange.abort(error)

    def allow_others(self) -> None:
        """Other requests may be in flight beside this one from now on."""
        if self.alone:
            self.alone = False
            self._owner.on_change()

    def release(self) -> None:
        if not self._released:
            self._released = True
            self._owner.released(self)


class InFlight:
    """The leases of one replica, over all its instances: requests of an instance that is ending may still be open."""

    def __init__(self) -> None:
        self._leases: set[Lease] = set()
        self._idle_at = 0.0  # event loop time at which last no request was waiting
        self._last_byte_at = 0.0  # for requests that have ended since

    def __len__(self) -> int:
        return len(self._leases)

    @property
    def anybody_alone(self) -> bool:
        """The request in flight must be alone on the replica. (Such a request is admitted only on an idle replica.)"""
        return len(self._leases) == 1 and next(iter(self._leases)).alone

    @property
    def clients(self) -> int:
        """Number of client requests in flight."""
        return sum(not lease.internal for lease in self._leases)

    def add(self, lease: Lease) -> None:
        if not self.of(lease.generation):
            self._idle_at = lease.admitted
            self._last_byte_at = 0.0
        self._leases.add(lease)

    def discard(self, lease: Lease) -> None:
        self._leases.discard(lease)
        self._last_byte_at = max(self._last_byte_at, lease.last_byte_at)

    def of(self, generation: int) -> list[Lease]:
        return [lease for lease in self._leases if lease.generation == generation]

    def progress_of(self, generation: int) -> dict[Lease, RequestProgress]:
        """The progress of each request that was sent to this instance."""
        return {lease: lease.progress for lease in self.of(generation) if lease.exchange is not None}

    def abort(self, generation: int, error: ExchangeError) -> None:
        for lease in self.of(generation):
            lease.abort(error)

    def all_non_streaming(self, generation: int) -> bool:
        """All requests that wait for this instance are non-streaming, so that no byte is due yet."""
        return all(lease.non_streaming for lease in self.of(generation) if lease.waiting)

    def quiet(self, generation: int, now: float) -> tuple[int, float]:
        """(number of requests that wait for a byte of this instance, seconds without a byte for any request while at
        least one waited). Must be called at every liveness tick.

        The arrival of a request does not reset the silence: steady arrivals must not hide a stall. A request whose
        client does not read does not count as waiting: the gateway does not read from the backend for it.
        """
        leases = self.of(generation)
        waiting = sum(lease.waiting for lease in leases)
        if not waiting:
            self._idle_at = now
            return 0, 0.0
        return waiting, now - max(self._idle_at, self._last_byte_at, *(lease.last_byte_at for lease in leases))

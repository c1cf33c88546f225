"""Slots: who is in flight on one backend.

A ``Lease`` is a slot on one life of one backend. It is given out synchronously by the backend that owns it, and given
back exactly once however often ``release`` is called. Through it the request opens its exchange, and through it the
supervisor reaches every request in flight: to see how long it has heard nothing, and to end it with a reason.
"""

from collections.abc import Callable
from typing import Protocol

from backends.exchange import Dialer, Exchange, ExchangeError, Request
from backends.failure import Failure
from backends.spec import BackendSpec


class Owner(Protocol):
    """The side of a backend that its leases speak to."""

    spec: BackendSpec

    def released(self, lease: "Lease") -> None: ...


class Judge(Protocol):
    """One life, as the post mortem of a call needs it."""

    generation: int
    dialer: Dialer

    async def diagnose(self, error: ExchangeError) -> Failure: ...


class Lease:
    """``admitted`` is the event loop's time."""

    __slots__ = ("_life", "_owner", "_released", "admitted", "exchange", "generation", "spec")

    def __init__(self, owner: Owner, life: Judge, admitted: float) -> None:
        self._owner = owner
        self._life = life
        self._released = False
        self.generation = life.generation
        self.admitted = admitted
        self.exchange: Exchange | None = None
        self.spec = owner.spec

    def open(self, request: Request) -> Exchange:
        """The one exchange of this lease; the caller closes it."""
        self.exchange = self._life.dialer.open(request)
        return self.exchange

    @property
    def last_heard(self) -> float:
        return self.exchange.last_heard if self.exchange is not None else self.admitted

    async def diagnose(self, error: ExchangeError) -> Failure:
        """What really happened, given what the wire showed. Waits a moment for the process's own evidence."""
        return await self._life.diagnose(error)

    def abort(self, error: ExchangeError) -> None:
        if self.exchange is not None:
            self.exchange.abort(error)

    def release(self) -> None:
        if not self._released:
            self._released = True
            self._owner.released(self)


class InFlight:
    """The leases of one backend, over all its lives: a dying life's requests may still be winding up."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.leases: set[Lease] = set()

    def __len__(self) -> int:
        return len(self.leases)

    def of(self, generation: int) -> list[Lease]:
        return [lease for lease in self.leases if lease.generation == generation]

    def abort(self, generation: int, error: ExchangeError) -> None:
        for lease in self.of(generation):
            lease.abort(error)

    def last_heard(self, generation: int) -> float | None:
        """When anything last came from this life for any request in flight; None when nothing is in flight."""
        return max((lease.last_heard for lease in self.of(generation)), default=None)


Changed = Callable[[], None]

"""Leases: one request in flight on a replica each.

A ``Lease`` is one slot on one instance of a replica. The replica grants it synchronously; it is given back exactly
once, however often ``release`` is called. The request opens its exchange through its lease. The supervisor measures
the silence of each request in flight through the lease, and aborts the request with a reason.

A request that its client, or the gateway, has given up may still be at work in mlx_lm.server, which notices a lost
connection only when it writes: such a lease is *abandoned* and keeps its slot until the work is over. The connection is
kept open to see that; a stream is reset as soon as the server is seen to write.
"""

from collections.abc import Callable
from typing import Protocol

from backends import mlx_server
from backends.admission.growth import Stop
from backends.diagnosis.engine import EngineIdentity
from backends.diagnosis.suspects import NO_PROGRESS, RequestProgress
from backends.domain.failure import CallFailure
from backends.domain.priority import Priority
from backends.domain.snapshot import Seat
from backends.domain.spec import BackendSpec
from backends.domain.work import NO_WORK, Work
from backends.upstream.exchange import Dialer, Exchange, ExchangeError, Fault, Request

Changed = Callable[[], None]

AT_THAT_MOMENT = 0.25  # seconds between a line in the log and the bytes that follow it, as we read them


def _never() -> Stop:
    return Stop.NEVER


class Owner(Protocol):
    """A replica, as its leases need it."""

    spec: BackendSpec
    on_change: Changed

    def released(self, lease: "Lease") -> None:
        """The request has ended; if it is abandoned, its slot stays taken."""
        ...

    def over(self, lease: "Lease") -> None:
        """The backend no longer works on an abandoned request."""
        ...


class ServingInstance(Protocol):
    """One instance, as its leases need it."""

    generation: int
    dialer: Dialer
    identity: EngineIdentity

    async def diagnose(self, error: ExchangeError, lease: "Lease") -> CallFailure: ...

    async def dropped_call(self, *, since: float, within: float) -> bool: ...


class Lease:
    """``admitted``: event loop time. Implements ``Watcher`` for its exchange."""

    __slots__ = (
        "_instance",
        "_owner",
        "_released",
        "abandoned",
        "accompanied",
        "admitted",
        "alone",
        "cached",
        "completed",
        "confirmed",
        "crowded",
        "exchange",
        "failed",
        "finished",
        "generation",
        "hung_up_at",
        "internal",
        "long",
        "moved",
        "on_begun",
        "priority",
        "progress",
        "read",
        "reading",
        "spec",
        "stop",
        "stopped",
        "unbatchable",
        "work",
        "written",
    )

    def __init__(self, owner: Owner, instance: ServingInstance, admitted: float) -> None:
        self._owner = owner
        self._instance = instance
        self._released = False
        self.generation = instance.generation
        self.admitted = admitted
        self.exchange: Exchange | None = None
        self.progress = NO_PROGRESS  # of the request; updated by the reader of its answer
        self.work = NO_WORK
        self.priority = Priority.INTERACTIVE  # set by the pool
        self.accompanied = False  # others were in flight on the instance at the same time
        self.cached = 0  # tokens of its prompt that were thought to be in the prompt cache; set by the pool
        self.crowded = False  # and their prompts were read in the same time
        self.alone = False  # no other request may be in flight beside it; set by the pool
        self.unbatchable = False  # nor can be, as the engine would not serve it; set by the pool
        self.reading = 0.0  # seconds that its prompt was expected to take, as it was admitted; set by the pool
        self.long = False  # its prompt is read with no other beside it; set by the pool
        self.on_begun: Callable[[Lease], None] | None = None  # called once, when its prompt was read; set by the pool
        self.abandoned = False  # ended for the gateway, and perhaps not for the backend
        self.hung_up_at = 0.0  # event loop time of the reset of an abandoned request's connection; 0.0 = it stands
        self.moved = False  # it was taken from a silent backend
        self.written = (0, 0.0)  # tokens of the complete answer, and the seconds that they took
        self.read = (0, 0, 0.0)  # tokens of the prompt, those of them that were cached, seconds until the first token
        self.confirmed = 0  # times that the backend was shown to generate while this answer was overdue
        self.internal = False  # a self-test of the gateway, not a client's request
        self.finished = False  # the answer is whole; what may follow is not due. Set by the reader of the answer
        self.completed = False  # answered in full; set by the reader of the answer
        self.failed = False  # failed in a way that counts against the replica; neither = neutral
        self.stop: Callable[[], Stop] = _never  # what it would mean to stop it now; set by who sends the request
        self.stopped = False  # it was aborted, so that the rest of the batch fits the memory
        self.spec = owner.spec

    def open(self, request: Request, work: Work | None = None) -> Exchange:
        """Opens the exchange of this lease, or the next one; the caller ends it by ``hang_up``, and a last but one by
        closing it."""
        self.work = work or self.work
        self.exchange = self._instance.dialer.open(request)
        return self.exchange

    def hang_up(self, *, whole: bool = False) -> None:
        """Before ``release``. ``whole``: the backend has sent the whole answer. Other servers than mlx_lm.server are
        taken to end their work when the connection is closed."""
        if self.exchange is None:
            return
        if whole or not (self.exchange.working and self.identity.is_mlx):
            self.exchange.close()
        else:
            self.abandoned = True
            self.exchange.abandon(self)

    def heard(self, data: bytes) -> bool:
        """True: a reset now would be noticed."""
        reset = mlx_server.notices_reset(data, one_piece=self.work.one_piece, unbatchable=self.unbatchable)
        if reset and self.exchange is not None:
            self.hung_up_at = self.exchange.last_heard
        return reset

    def over(self) -> None:
        """The backend has ended the work on an abandoned request, or is taken to have ended it."""
        if not self.abandoned:
            return
        self.abandoned = False
        if self.exchange is not None:
            self.exchange.close()
        if self._released:
            self._owner.over(self)

    def report(self, progress: RequestProgress) -> None:
        """By the reader of its answer."""
        began = progress.begun and not self.progress.begun
        self.progress = progress
        if began and self.on_begun is not None:
            self.on_begun(self)

    @property
    def identity(self) -> EngineIdentity:
        """Of the server that this lease is for."""
        return self._instance.identity

    @property
    def seat(self) -> Seat:
        return Seat(self.spec.id, self.generation)

    @property
    def prompt_tokens(self) -> int:
        """As the backend has counted them, else as estimated."""
        return max(self.work.prompt_tokens, self.progress.tokens)

    @property
    def last_byte_at(self) -> float:
        """Event loop time of the last byte for this request; 0.0 = none yet."""
        return self.exchange.last_heard if self.exchange is not None else 0.0

    @property
    def waiting(self) -> bool:
        return self.exchange is not None and self.exchange.waiting_since > 0 and not self.finished

    @property
    def in_flight(self) -> bool:
        """The request has not ended, or the backend may still work on it."""
        return not self._released or self.abandoned

    def silence(self, now: float) -> float:
        """Seconds that the request has waited for the backend without a byte. Still valid after its client left."""
        if self.exchange is None or not self.exchange.waiting_since or self.finished:
            return 0.0
        return now - max(self.exchange.last_heard, self.exchange.waiting_since)

    async def diagnose(self, error: ExchangeError) -> CallFailure:
        """The cause of a failed call, from the error on the wire and the evidence of the process, which is waited for
        briefly."""
        return await self._instance.diagnose(error, self)

    async def dropped_call(self, *, within: float) -> bool:
        """Whether the log says that a tool call was dropped, which may have been this request's: where others were in
        flight, only at the moment of the last byte. Waits for the log for ``within`` seconds; each line counts once."""
        since = self.last_byte_at - AT_THAT_MOMENT if self.accompanied else self.admitted
        return await self._instance.dropped_call(since=since, within=within)

    def abort(self, error: ExchangeError) -> None:
        self.stopped = self.stopped or error.fault is Fault.CROWDED
        self.moved = self.moved or error.fault is Fault.OCCUPIED
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

"""Leases: the requests in flight on one replica.

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
from backends.admission.pace import Pace
from backends.diagnosis.engine import EngineIdentity
from backends.diagnosis.suspects import RequestProgress
from backends.domain.failure import CallFailure
from backends.domain.spec import BackendSpec
from backends.domain.work import Work
from backends.upstream.exchange import Dialer, Exchange, ExchangeError, Fault, Request

Changed = Callable[[], None]

LONG_PROMPT = 1.0  # seconds that its reading takes at least
NOT_BEGUN = 10.0  # seconds; mlx_lm.server begins with a request within its time budget (0.5 s) and one step, if it can
RECENT = 2.0  # seconds since the last byte of an answer that is being written
AT_THAT_MOMENT = 0.25  # seconds between a line in the log and the bytes that follow it, as we read them


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
        "completed",
        "confirmed",
        "exchange",
        "failed",
        "finished",
        "generation",
        "hung_up_at",
        "internal",
        "moved",
        "progress",
        "spec",
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
        self.progress = RequestProgress()  # of the request; updated by the reader of its answer
        self.work = Work()
        self.accompanied = False  # others were in flight on the instance at the same time
        self.alone = False  # no other request may be in flight beside it; set by the pool
        self.unbatchable = False  # nor can be, as the engine would not serve it; set by the pool
        self.abandoned = False  # ended for the gateway, and perhaps not for the backend
        self.hung_up_at = 0.0  # event loop time of the reset of an abandoned request's connection; 0.0 = it stands
        self.moved = False  # it was taken from a silent backend
        self.written = (0, 0.0)  # tokens of the complete answer, and the seconds that they took
        self.confirmed = 0  # times that the backend was shown to generate while this answer was overdue
        self.internal = False  # a self-test of the gateway, not a client's request
        self.finished = False  # the answer is whole; what may follow is not due. Set by the reader of the answer
        self.completed = False  # answered in full; set by the reader of the answer
        self.failed = False  # failed in a way that counts against the replica; neither = neutral
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

    @property
    def identity(self) -> EngineIdentity:
        """Of the server that this lease is for."""
        return self._instance.identity

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


class InFlight:
    """The leases of one replica, over all its instances: requests of an instance that is ending may still be open.
    Its length is the number of slots taken.

    ``batches``: the engine is known to answer several requests at a time, so an abandoned one does not hold up others.
    ``sequential``: it has been seen to answer one after the other: a wrapper's flags or the model do not let it batch.
    """

    def __init__(self, *, batches: bool = True) -> None:
        self.pace = Pace()
        self.batches = batches
        self.sequential = False
        self._leases: set[Lease] = set()
        self._idle_at = 0.0  # event loop time at which last no request was waiting
        self._last_byte_at = 0.0  # for requests that have ended since
        self.answered_at = 0.0  # event loop time of the last byte of a complete answer

    def __len__(self) -> int:
        return len(self._leases)

    @property
    def anybody_alone(self) -> bool:
        """The request in flight must be alone on the replica. (Such a request is admitted only on an idle replica.)"""
        if len(self._leases) != 1:
            return False
        (lease,) = self._leases
        return lease.alone or lease.unbatchable

    @property
    def clients(self) -> int:
        """Number of client requests in flight."""
        return sum(not (lease.internal or lease.abandoned) for lease in self._leases)

    @property
    def abandoned_count(self) -> int:
        return sum(lease.abandoned for lease in self._leases)

    @property
    def active(self) -> bool:
        """Somebody waits for an answer."""
        return any(not lease.abandoned for lease in self._leases)

    def add(self, lease: Lease) -> None:
        others = self.of(lease.generation)
        for other in others:
            other.accompanied = lease.accompanied = True
        if not others:
            self._idle_at = lease.admitted
            self._last_byte_at = 0.0
        self._leases.add(lease)

    def discard(self, lease: Lease) -> None:
        """The request has ended; an abandoned one keeps its slot until ``over``."""
        self._last_byte_at = max(self._last_byte_at, lease.last_byte_at)
        if lease.completed:
            self.answered_at = max(self.answered_at, lease.last_byte_at)
        if not lease.abandoned:
            self._leases.discard(lease)
        self.pace.note(*lease.written)
        if lease.completed and any(
            other.progress.decoding and other.admitted < lease.admitted for other in self.of(lease.generation)
        ):
            self.batches = True  # it began later than one that goes on, and has ended

    def held_up(self, generation: int, now: float) -> list[Lease]:
        """The requests that have not begun while one that came before them goes on: they wait for its end."""
        leases = self.of(generation)
        writing = [lease for lease in leases if lease.progress.decoding and now - lease.last_byte_at < RECENT]
        return [
            late
            for late in leases
            if late.exchange is not None
            and not (late.last_byte_at or late.work.one_piece)
            and late.identity.is_mlx
            and now - late.admitted >= NOT_BEGUN
            and any(lease.admitted < late.admitted for lease in writing)
        ]

    def over(self, lease: Lease) -> None:
        self._leases.discard(lease)

    def forget(self, generation: int) -> None:
        """The instance has ended, and with it what was abandoned on it."""
        for lease in self.abandoned(generation):
            lease.over()

    def of(self, generation: int) -> list[Lease]:
        return [lease for lease in self._leases if lease.generation == generation and not lease.abandoned]

    def abandoned(self, generation: int) -> list[Lease]:
        return [lease for lease in self._leases if lease.generation == generation and lease.abandoned]

    def noticed(self, port: int) -> None:
        """The backend has noticed that the connection from that port of ours is lost."""
        for lease in tuple(self._leases):
            if lease.abandoned and lease.hung_up_at and lease.exchange and lease.exchange.local_port == port:
                lease.over()

    def progress_of(self, generation: int) -> dict[Lease, RequestProgress]:
        """The progress of each request that was sent to this instance, abandoned ones included."""
        sent = (lease for lease in self._leases if lease.generation == generation and lease.exchange is not None)
        return {lease: lease.progress for lease in sent}

    def any_decoding(self, generation: int) -> bool:
        """The answer to one of these requests has begun."""
        return any(progress.decoding for progress in self.progress_of(generation).values())

    def abort(self, generation: int, error: ExchangeError) -> None:
        for lease in (*self.of(generation), *self.abandoned(generation)):
            lease.abort(error)

    def all_in_one_piece(self, generation: int) -> bool:
        """All requests that wait for this instance get their answers in one piece, so that no byte is due yet."""
        return all(lease.work.one_piece for lease in self.of(generation) if lease.waiting)

    def reading_until(self, generation: int) -> float:
        """Event loop time until which the prompts that are being read explain silence. mlx_lm.server tokenises one
        after the other and does nothing else meanwhile, and then reads them together; other servers do not report that
        they read. What takes less than ``LONG_PROMPT`` does not count: steady arrivals must not hide a stall."""
        mine = [lease for lease in self._leases if lease.generation == generation and lease.exchange is not None]
        unread = sorted((lease for lease in mine if not lease.progress.decoding), key=lambda lease: lease.admitted)
        until = 0.0
        for lease in unread:
            tokens, is_mlx = lease.prompt_tokens, lease.identity.is_mlx
            took = self.pace.tokenising(tokens) if is_mlx else self.pace.reading(tokens)
            if took >= LONG_PROMPT and not lease.last_byte_at:
                until = max(until, lease.admitted) + took
        if any(lease.last_byte_at and lease.identity.is_mlx for lease in unread):
            step = self.pace.step(max(lease.prompt_tokens for lease in unread))
            if step >= LONG_PROMPT:  # a batch costs as many times its longest prompt as it has members
                until = max(until, self.last_byte_at(generation) + len(unread) * step)
        return until

    def last_byte_at(self, generation: int) -> float:
        """Event loop time of the last byte of this instance for any request, 0.0 = none."""
        mine = (lease.last_byte_at for lease in self._leases if lease.generation == generation)
        return max(mine, default=0.0)

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
        return waiting, now - max(self._idle_at, self._last_byte_at, self.last_byte_at(generation))

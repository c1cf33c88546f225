"""HTTP/1 to a child on loopback: asyncio.Protocol + httptools, one TCP connection per call, no stream objects.

    start() -> _dial (a task: slot, connect, retries) -> connection_made: the request is written
    data_received -> ResponseReader (llhttp) -> Answer (head, buffered body, end) <- start() and read() wait here

The awkward bits: llhttp never learns of the end of the connection, so ``eof`` judges here whether a body without
Content-Length or chunks just ended, or was cut. And mlx_lm.server listens with a backlog of 5 (socketserver's default),
of which the other side sees nothing: see ``LeanDialer`` for the pacing.
"""

import asyncio
from collections.abc import Callable
from enum import Enum, auto
from typing import cast

import httptools

from backends.exchange import Exchange, ExchangeError, Fault, Head, Headers, Request

HIGH_WATER = 256 * 1024  # buffered body bytes beyond which the backend is left to wait
HEAD_LIMIT = 64 * 1024
RETRY_PAUSES = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8)  # after a reset connect, each times 0.5 to 1.5
RESETS = (ConnectionResetError, ConnectionAbortedError, BrokenPipeError)


class End(Enum):
    COMPLETE = auto()  # the framing says so
    EOF = auto()  # close-delimited, and it was closed: a killed server ends like this too


def close_delimited(headers: Headers) -> bool:
    names = dict(headers)
    return b"content-length" not in names and b"chunked" not in names.get(b"transfer-encoding", b"").lower()


class Answer:
    """What has come of one answer, and the one task that waits for more. Shared by both dialers.

    What was buffered is delivered before the end is told, whatever the end is.
    """

    __slots__ = ("_chunks", "_waiter", "end", "head", "size")

    def __init__(self) -> None:
        self.head: Head | None = None
        self.end: End | ExchangeError | None = None
        self.size = 0
        self._chunks: list[bytes] = []
        self._waiter: asyncio.Future[None] | None = None

    def begin(self, head: Head) -> None:
        self.head = head
        self._wake()

    def put(self, chunk: bytes) -> None:
        if self.end is None:  # else: what follows a complete body is nobody's
            self._chunks.append(chunk)
            self.size += len(chunk)
            self._wake()

    def finish(self, end: End | ExchangeError) -> None:
        """The first end stands."""
        if self.end is None:
            self.end = end
            self._wake()

    def overrule(self, error: ExchangeError) -> None:
        """Replaces any end but a complete body: the clean EOF of a killed server becomes its cause of death."""
        if self.end is not End.COMPLETE:
            self.end = error
            self._wake()

    def discard(self) -> None:
        self._chunks.clear()
        self.size = 0

    async def wait_head(self) -> Head:
        while self.head is None:
            if isinstance(self.end, ExchangeError):
                raise self.end
            await self._more()
        return self.head

    async def take(self) -> bytes:
        while not self._chunks:
            if isinstance(self.end, ExchangeError):
                raise self.end
            if self.end is not None:
                return b""
            await self._more()
        chunks = self._chunks
        data = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        self.discard()
        return data

    async def _more(self) -> None:
        if self._waiter is not None:
            raise RuntimeError("two tasks read one exchange")
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class ResponseReader:
    """Bytes of one HTTP/1 response → its Answer. Also the callback object of httptools."""

    def __init__(self, answer: Answer, method: str, peer: str) -> None:
        self.on_body = answer.put  # no frame of ours between llhttp and the buffer
        self._answer = answer
        self._method = method
        self._peer = peer
        self._headers: list[tuple[bytes, bytes]] = []
        self._header_bytes = 0
        self._fed = 0  # bytes that came before the head was complete
        self._until_eof = False
        self._parser: httptools.HttpResponseParser | None = httptools.HttpResponseParser(self)

    def feed(self, data: bytes) -> None:
        if self._parser is None:
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as exc:
            self._fail(Fault.PROTOCOL, f"{self._peer} does not speak HTTP: {exc}", exc)
        if self._answer.head is None:
            self._fed += len(data)
            self._check_head_size(self._fed)

    def eof(self) -> None:
        if self._answer.head is None:
            self._fail(Fault.EOF_BEFORE_HEAD, f"{self._peer} closed the connection without an answer")
        elif self._until_eof:
            self._answer.finish(End.EOF)
        else:
            self._fail(Fault.INCOMPLETE, f"{self._peer} closed the connection in the middle of its answer")

    def release(self) -> None:
        """Parser and callbacks refer to each other: without this, each exchange waits for the garbage collector."""
        self._parser = None

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name.lower(), value.strip(b" \t")))  # llhttp leaves trailing blanks
        self._header_bytes += len(name) + len(value)

    def on_headers_complete(self) -> None:
        if self._answer.head is not None or self._answer.end is not None or self._parser is None:
            return  # a second response nobody asked for
        status = self._parser.get_status_code()
        if status < 200:  # 100, 103: the real one follows
            self._headers.clear()
            return
        self._check_head_size(self._header_bytes)
        if self._answer.end is None:
            headers = tuple(self._headers)
            self._until_eof = close_delimited(headers)
            self._answer.begin(Head(status, headers))
            if self._method == "HEAD":
                self._answer.finish(End.COMPLETE)

    def on_message_complete(self) -> None:
        if self._answer.head is not None:  # else: it was a 1xx
            self._answer.finish(End.COMPLETE)

    def _check_head_size(self, size: int) -> None:
        if size > HEAD_LIMIT:
            self._fail(Fault.PROTOCOL, f"{self._peer} sent a head of more than {HEAD_LIMIT} bytes")

    def _fail(self, fault: Fault, detail: str, cause: Exception | None = None) -> None:
        error = ExchangeError(fault, detail)
        error.__cause__ = cause
        self._answer.finish(error)


class LeanExchange(asyncio.Protocol):
    """Implements ``Exchange``. Everything runs in callbacks; the caller's task waits on one future at a time."""

    def __init__(self, dialer: "LeanDialer", request: Request) -> None:
        self._loop = asyncio.get_running_loop()
        self.last_heard = self._loop.time()
        self._dialer = dialer
        self._wire = _encode(request, dialer.peer)
        self._answer = Answer()
        self._reader = ResponseReader(self._answer, request.method, dialer.peer)
        self._dialing: asyncio.Task[None] | None = None
        self._transport: asyncio.Transport | None = None
        self._slot: asyncio.Semaphore | None = None
        self._paused = False

    async def start(self) -> Head:
        if self._answer.end is None:
            self.last_heard = self._loop.time()
            self._dialer.enter(self)
            self._dialing = self._loop.create_task(self._dial())
            self._dialing.add_done_callback(self._dialed)
        return await self._answer.wait_head()

    async def read(self) -> bytes:
        data = await self._answer.take()
        if self._paused and self._answer.end is None and self._transport is not None:
            self._paused = False
            self._transport.resume_reading()
        return data

    def abort(self, error: ExchangeError) -> None:
        self._answer.overrule(error)
        self._hang_up()

    def close(self) -> None:
        # RESET for want of a better word: only another task, still waiting on this exchange, ever sees it.
        self._answer.finish(ExchangeError(Fault.RESET, f"the connection to {self._dialer.peer} was closed on our side"))
        self._answer.discard()
        self._hang_up()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # that of uvloop is no subclass
        if self._answer.end is not None:
            self._transport.abort()
            return
        self._loop.call_later(self._dialer.grace, self._give_slot_back)
        self._transport.writelines(self._wire)
        self._wire = ()

    def data_received(self, data: bytes) -> None:
        self.last_heard = self._loop.time()
        if self._slot is not None:
            self._give_slot_back()
        self._reader.feed(data)
        if self._answer.end is not None:
            self._hang_up()
        elif self._answer.size > HIGH_WATER and not self._paused and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()

    def eof_received(self) -> None:
        self._reader.eof()
        self._hang_up()

    def connection_lost(self, exc: Exception | None) -> None:
        where = "before its answer" if self._answer.head is None else "in the middle of its answer"
        error = ExchangeError(Fault.RESET, f"{self._dialer.peer} reset the connection {where}")
        error.__cause__ = exc
        self._answer.finish(error)
        self._hang_up()
        self._transport = None
        self._dialer.leave(self)

    async def _dial(self) -> None:
        await self._dialer.slots.acquire()
        self._slot = self._dialer.slots
        async with asyncio.timeout(self._dialer.connect_timeout):
            await self._dialer.connect(self)

    def _dialed(self, task: asyncio.Task[None]) -> None:
        self._dialing = None
        exc = asyncio.CancelledError() if task.cancelled() else task.exception()
        if exc is not None:
            self._answer.finish(_connect_error(exc, self._dialer.peer))
            self._give_slot_back()
            self._dialer.leave(self)  # uvloop need not call connection_lost after a cancelled connect

    def _hang_up(self) -> None:
        """After any end. ``abort``, not ``close``: a half-written request must not linger until it is flushed."""
        self._reader.release()
        self._give_slot_back()
        if self._transport is not None:
            self._transport.abort()
        elif self._dialing is not None:
            self._dialing.cancel()

    def _give_slot_back(self) -> None:
        slot, self._slot = self._slot, None
        if slot is not None:
            slot.release()


class LeanDialer:
    """Opens exchanges to one listener on this machine.

    Pacing: at most ``connects`` connections may be unaccepted, one less than mlx_lm.server's backlog of 5. Nothing
    tells a client when ``accept`` took its connection, so a slot is held until the first byte comes back (certainty)
    or ``grace`` seconds after the connect (a guess: an accept loop that fights a busy generation thread for the GIL
    waits a few switch intervals of 5 ms). If the guess is wrong the backlog fills, and Linux leaves the next connect
    unanswered, which keeps its slot taken; other systems reset it, hence the retries. Waiting for a slot does not
    count towards ``connect_timeout``.

    ``jitter`` gives numbers in [0, 1).
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        connect_timeout: float = 5.0,
        connects: int = 4,
        grace: float = 0.02,
        jitter: Callable[[], float] = lambda: 0.5,
    ) -> None:
        self.peer = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self.connect_timeout = connect_timeout
        self.grace = grace
        self.slots = asyncio.Semaphore(connects)
        self._host = host
        self._port = port
        self._jitter = jitter
        self._live: set[LeanExchange] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._closed = False

    def open(self, request: Request) -> Exchange:
        exchange = LeanExchange(self, request)
        if self._closed:
            exchange.abort(ExchangeError(Fault.REFUSED, f"no more calls to {self.peer}: it was given up"))
        return exchange

    async def aclose(self) -> None:
        """Hang up on all, and wait until every socket is closed."""
        self._closed = True
        for exchange in tuple(self._live):
            exchange.close()
        await self._idle.wait()

    async def connect(self, protocol: asyncio.Protocol) -> None:
        """Retries a reset connect; a refused one is final, on loopback it means that nobody listens."""
        loop = asyncio.get_running_loop()
        for pause in RETRY_PAUSES:
            try:
                await loop.create_connection(lambda: protocol, self._host, self._port)
            except RESETS:
                await asyncio.sleep(pause * (0.5 + self._jitter()))
            else:
                return
        await loop.create_connection(lambda: protocol, self._host, self._port)

    def enter(self, exchange: LeanExchange) -> None:
        self._live.add(exchange)
        self._idle.clear()

    def leave(self, exchange: LeanExchange) -> None:
        self._live.discard(exchange)
        if not self._live:
            self._idle.set()


def _encode(request: Request, peer: str) -> tuple[bytes, ...]:
    lines = [f"{request.method} {request.path} HTTP/1.1".encode(), b"Host: " + peer.encode(), b"Connection: close"]
    if request.body or request.method == "POST":
        lines.append(b"Content-Length: %d" % len(request.body))
    lines += [name + b": " + value for name, value in request.headers]
    if any(b"\r" in line or b"\n" in line for line in lines):
        raise ValueError("a line break in the path or in a header of a request")
    return (b"\r\n".join([*lines, b"", b""]), request.body)


def _connect_error(exc: BaseException, peer: str) -> ExchangeError:
    if isinstance(exc, ConnectionRefusedError):
        error = ExchangeError(Fault.REFUSED, f"connection refused by {peer}")
    elif isinstance(exc, RESETS):
        error = ExchangeError(Fault.CONNECT_RESET, f"{peer} reset the connection while it was being made")
    elif isinstance(exc, TimeoutError):
        error = ExchangeError(Fault.CONNECT_TIMEOUT, f"no connection to {peer} in time")
    else:
        error = ExchangeError(Fault.UNREACHABLE, f"cannot connect to {peer}: {exc!r}")
    error.__cause__ = exc
    return error

"""HTTP/1 to a child on loopback: asyncio.Protocol + httptools, one TCP connection per call, no stream objects.

    start() -> connect slot, connect, retries -> connection_made: the request is written
    data_received -> ResponseReader (llhttp) -> Answer (head, buffered body, end) <- start() and read() wait here

Caveat: mlx_lm.server listens with a backlog of 5 (socketserver's default), and a client cannot see how full it is: see
``H1Dialer`` for the pacing.
"""

import asyncio
import contextlib
import errno
import os
import socket
import struct
from collections.abc import Callable
from dataclasses import replace
from typing import cast

from backends.upstream import descriptors
from backends.upstream.exchange import (
    WORKS_ON,
    Exchange,
    ExchangeError,
    Fault,
    Head,
    Headers,
    Offer,
    Request,
    Watcher,
)
from backends.upstream.h1_response import Answer, ResponseReader
from backends.upstream.locality import hint

HIGH_WATER = 256 * 1024  # buffered body bytes beyond which reading from the backend is paused
RETRY_PAUSES = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8)  # seconds after a reset connect, each times 0.5 to 1.5
EXHAUSTED_ERRNOS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL})
NO_LINGER = struct.pack("ii", 1, 0)  # struct linger: closing resets the connection
RESETS = (ConnectionResetError, ConnectionAbortedError, BrokenPipeError)


class H1Exchange(asyncio.Protocol):
    """Implements ``Exchange``. Runs in callbacks; the caller's task waits on one future at a time."""

    def __init__(self, dialer: "H1Dialer", request: Request) -> None:
        self._loop = asyncio.get_running_loop()
        self.last_heard = 0.0
        self.pieces = 0
        self._dialer = dialer
        self._wire = _encode(request, dialer.peer)
        self._answer = Answer()
        self._reader = ResponseReader(self._answer, request.method, dialer.peer)
        self._dialing: asyncio.Timeout | None = None  # of the wait for a connect slot and the connection
        self._transport: asyncio.Transport | None = None
        self._slot: asyncio.Semaphore | None = None
        self._paused = False
        self.working = False
        self.local_port = 0
        self._watcher: Watcher | None = None
        self._unread = False  # aborted, and not closed or abandoned yet

    @property
    def waiting_since(self) -> float:
        return self._answer.waiting_since

    async def start(self) -> Head:
        if self._answer.end is None:
            self._dialer.enter(self)
            self._answer.waiting_since = self._loop.time()
            try:
                await self._dial()
            except BaseException as exc:
                self._answer.finish(_connect_error(exc, self._dialer.peer))
                self._give_slot_back()
                self._dialer.leave(self)  # uvloop need not call connection_lost after a cancelled connect
                if not isinstance(exc, Exception):
                    raise
        return await self._answer.wait_head()

    async def read(self, offer: Offer | None = None) -> bytes:
        data = await self._answer.take(offer)
        low = self._answer.size <= HIGH_WATER
        if self._paused and low and self._answer.end is None and self._transport is not None:
            self._paused = False
            self._transport.resume_reading()
        return data

    def abort(self, error: ExchangeError) -> None:
        self._answer.overrule(error)
        self._unread = self.working and error.fault in WORKS_ON
        if not self._unread:
            self._hang_up()

    def abandon(self, watcher: Watcher) -> None:
        self._watcher = watcher
        self._answer.discard()
        if self._transport is not None and self._paused:
            self._paused = False
            self._transport.resume_reading()

    def close(self) -> None:
        # RESET has no better fit; only another task that still waits on this exchange sees the error.
        self._answer.finish(ExchangeError(Fault.RESET, f"the connection to {self._dialer.peer} was closed on our side"))
        self._answer.discard()
        self._watcher = None
        self._hang_up()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is no subclass
        self.local_port = (transport.get_extra_info("sockname") or (0, 0))[1]
        if self._answer.end is not None:
            self._transport.abort()
            return
        self._loop.call_later(self._dialer.grace, self._give_slot_back)
        self._transport.writelines(self._wire)
        self._wire = ()
        self.working = True

    def data_received(self, data: bytes) -> None:
        self.last_heard = self._loop.time()
        self.pieces += 1
        if self._slot is not None:
            self._give_slot_back()
        if self._watcher is not None:
            if self._watcher.heard(data):
                self._reset()
            return
        if self._unread:
            return
        self._reader.feed(data)
        if self._answer.end is not None:
            self._hang_up()
        elif self._answer.size > HIGH_WATER and not self._paused and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()

    def eof_received(self) -> None:
        self._reader.eof()
        self._hang_up()
        self._tell_over()

    def connection_lost(self, exc: Exception | None) -> None:
        where = "before its answer" if self._answer.head is None else "in the middle of its answer"
        error = ExchangeError(Fault.RESET, f"{self._dialer.peer} reset the connection {where}")
        error.__cause__ = exc
        self._answer.finish(error)
        self._hang_up()
        self._transport = None
        self._dialer.leave(self)
        self._tell_over()

    def _tell_over(self) -> None:
        watcher, self._watcher = self._watcher, None
        if watcher is not None:
            watcher.over()

    def _reset(self) -> None:
        """Closed in order, the backend's next write would still succeed; after a reset it fails."""
        self._watcher = None
        if self._transport is not None:
            with contextlib.suppress(OSError):  # macOS: EINVAL if the peer has gone meanwhile
                self._transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER)
        self._hang_up()

    async def _dial(self) -> None:
        try:
            async with asyncio.timeout(None) as self._dialing:
                await self._dialer.slots.acquire()
                self._slot = self._dialer.slots
                if self._answer.end is None:  # else: hung up meanwhile, and this timeout expires next
                    self._dialing.reschedule(self._loop.time() + self._dialer.connect_timeout)
                await self._dialer.connect(self)
        finally:
            self._dialing = None

    def _hang_up(self) -> None:
        """Drop the connection, after any end. ``abort``, not ``close``: a half-written request must not linger until it
        is flushed."""
        self.working = False
        self._reader.release()
        self._give_slot_back()
        if self._transport is not None:
            self._transport.abort()
        elif self._dialing is not None and not self._dialing.expired():
            self._dialing.reschedule(self._loop.time())  # at once

    def _give_slot_back(self) -> None:
        slot, self._slot = self._slot, None
        if slot is not None:
            slot.release()


class H1Dialer:
    """Opens exchanges to one listener on this machine.

    Pacing: at most ``connects`` connections may be unaccepted, one less than mlx_lm.server's backlog of 5. A client
    cannot see when ``accept`` took its connection, so a connect slot is held until the first byte comes back (certain)
    or until ``grace`` seconds after the connect (a guess: an accept loop that competes with a busy generation thread
    for the GIL waits a few switch intervals of 5 ms). If the guess is wrong, the backlog fills: Linux leaves the next
    connect unanswered, which keeps its slot taken; other systems reset it, hence the retries. Waiting for a slot does
    not count towards ``connect_timeout``, which is in seconds.

    ``jitter`` returns numbers in [0, 1). ``prefix`` goes before every path, ``headers`` with every request.
    ``localhost`` is 127.0.0.1, or where that refuses ::1.
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
        prefix: str = "",
        headers: Headers = (),
    ) -> None:
        # Some servers, those of Node.js for instance, listen on the second address of localhost only.
        self._host, self._or_host = ("127.0.0.1", "::1") if host == "localhost" else (host, "")
        self.peer = f"[{self._host}]:{port}" if ":" in host else f"{self._host}:{port}"
        self.connect_timeout = connect_timeout
        self.grace = grace
        self.slots = asyncio.Semaphore(connects)
        self._port = port
        self._jitter = jitter
        self._prefix = prefix
        self._headers = headers
        self._live: set[H1Exchange] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._closed = False

    def open(self, request: Request) -> Exchange:
        if self._prefix or self._headers:
            request = replace(request, path=self._prefix + request.path, headers=(*request.headers, *self._headers))
        exchange = H1Exchange(self, request)
        if self._closed:
            exchange.abort(ExchangeError(Fault.REFUSED, f"no more calls to {self.peer}: its instance has ended"))
        return exchange

    async def aclose(self) -> None:
        """Close all exchanges, and wait until every socket is closed."""
        self._closed = True
        for exchange in tuple(self._live):
            exchange.close()
        await self._idle.wait()

    async def connect(self, protocol: asyncio.Protocol) -> None:
        """Retries a reset connect. A refused one is final: on loopback it means that the port has no listener."""
        for pause in RETRY_PAUSES:
            try:
                await self._connect_once(protocol)
            except RESETS:
                await asyncio.sleep(pause * (0.5 + self._jitter()))
            else:
                return
        await self._connect_once(protocol)

    async def _connect_once(self, protocol: asyncio.Protocol) -> None:
        if descriptors.are_scarce():
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        loop = asyncio.get_running_loop()
        try:
            await loop.create_connection(lambda: protocol, self._host, self._port)
        except ConnectionRefusedError as refused:
            if not self._or_host:
                raise
            try:
                await loop.create_connection(lambda: protocol, self._or_host, self._port)
            except OSError:  # also: this machine has no such address
                raise refused from None

    def enter(self, exchange: H1Exchange) -> None:
        self._live.add(exchange)
        self._idle.clear()

    def leave(self, exchange: H1Exchange) -> None:
        self._live.discard(exchange)
        if not self._live:
            self._idle.set()


def _encode(request: Request, peer: str) -> tuple[bytes, ...]:
    lines = [f"{request.method} {request.path} HTTP/1.1".encode(), b"Host: " + peer.encode(), b"Connection: close"]
    if request.body or request.method == "POST":
        lines.append(b"Content-Length: %d" % len(request.body))
    lines += [name + b": " + value for name, value in request.headers]
    if any(b"\r" in line or b"\n" in line for line in lines):
        raise ValueError("line break in the path or in a header of a request")
    return (b"\r\n".join([*lines, b"", b""]), request.body)


def _connect_error(exc: BaseException, peer: str) -> ExchangeError:
    if isinstance(exc, ConnectionRefusedError):
        error = ExchangeError(Fault.REFUSED, f"connection refused by {peer}")
    elif isinstance(exc, RESETS):
        error = ExchangeError(Fault.CONNECT_RESET, f"{peer} reset the connection while connecting")
    elif isinstance(exc, TimeoutError):
        error = ExchangeError(Fault.CONNECT_TIMEOUT, f"connecting to {peer} timed out")
    elif isinstance(exc, OSError) and exc.errno in EXHAUSTED_ERRNOS:
        error = ExchangeError(Fault.EXHAUSTED, f"the gateway cannot open a connection: {exc.strerror}")
    else:
        told = f"cannot connect to {peer}: {exc!r}{hint(exc, peer.rpartition(':')[0].strip('[]'))}"
        error = ExchangeError(Fault.UNREACHABLE, told)
    error.__cause__ = exc
    return error

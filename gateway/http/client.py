"""The client connection of one request: writes the answer, and detects a disconnect.

Raw ASGI: a streaming body as an async generator would cost a task and a queue per chunk.

Caveat: the request and the keepalive both write, so each write holds a lock; the first write sends the head, once.

Plain ASGI needs a waiting task for each event of the connection. ``Link``, an extension of ``http.uvicorn_protocol``,
avoids that: the text of a stream is sent without a task switch, and no task waits only for the disconnect.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

from starlette.types import Message, Receive, Scope, Send

from gateway.api import errors
from gateway.api.errors import GatewayError
from gateway.forward.sink import Header
from gateway.http.body_memory import Share

LINK = "mlx_gateway.link"  # the extension of ASGI: {"link": Link}

SSE_HEADERS: tuple[Header, ...] = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # an nginx in front of the gateway must not buffer the events
)


HEADERS_HELD = 1.0  # seconds from the request; until then a failure can still be a status
WAIT_INTERVAL = 2.0  # seconds between two comments while a request waits for a replica


class TooLarge(Exception):
    """The body is larger than the limit."""


class ClientLeft(Exception):
    """The client closed the connection: there is no client to answer."""


class Link(Protocol):
    """What the HTTP server offers beyond ASGI for the request that is being answered."""

    @property
    def ready(self) -> bool:
        """A body of unknown length is being sent, and writes are not paused: ``data`` would be sent at once."""
        ...

    def push(self, data: bytes) -> None:
        """Send ``data``; only while ``ready``."""
        ...

    def on_leave(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call ``callback`` when the connection is lost. Returns a function that unsubscribes."""
        ...


class ClientConnection:
    """``extra``: headers of the answer, added as they become known."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, request_id: str) -> None:
        self.scope = scope
        self.request_id = request_id
        self.extra: list[Header] = []
        self.headers_sent = False
        self.status = 0
        self.last_sent = 0.0  # event loop's time
        self.stuck_since = 0.0  # event loop's time; when the write began that waits for the client, 0.0 = none
        self.body_complete = False  # the whole answer was sent
        self.keepalive: KeepAlive | None = None  # of a stream
        self._headers: dict[bytes, bytes] | None = None
        self._receive = receive
        self._send = send
        self._lock = asyncio.Lock()
        # Removed from the scope, to which it refers: otherwise each request would be a cycle for the garbage collector.
        self._link: Link | None = scope.get("extensions", {}).pop(LINK, {}).get("link")
        self._time = asyncio.get_running_loop().time  # get_running_loop costs a system call each time (getpid)

    def header(self, name: bytes) -> bytes:
        """The value of the first header of that name; b"" if absent."""
        if self._headers is None:
            self._headers = dict(reversed(self.scope["headers"]))
        return self._headers.get(name, b"")

    async def read_body(self, limit: int, share: Share) -> bytes:
        """Raises TooLarge; OutOfBodyMemory, if possible before anything is read; ClientLeft if the client disconnects
        before the end of the body."""
        length = self.header(b"content-length")
        if length.isdigit():
            if int(length) > limit:
                raise TooLarge
            share.expect(int(length))
        message = await self._next_part(0, limit, share)
        if not message.get("more_body", False):
            return bytes(message.get("body", b""))
        body = bytearray(message.get("body", b""))  # not a list of parts: a small one takes many times its size
        while message.get("more_body", False):
            message = await self._next_part(len(body), limit, share)
            body += message.get("body", b"")
        return bytes(body)

    async def _next_part(self, size: int, limit: int, share: Share) -> Message:
        """``size``: bytes read before."""
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise ClientLeft
        size += len(message.get("body", b""))
        if size > limit:
            raise TooLarge
        share.resize(size)
        return message

    def on_leave(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call ``callback`` when the client disconnects; only after the body was read. Returns a function that
        unsubscribes."""
        if self._link is not None:
            return self._link.on_leave(callback)
        watch = asyncio.get_running_loop().create_task(self._left())  # the returned function holds a reference
        watch.add_done_callback(lambda done: None if done.cancelled() else callback())

        def unwatch() -> None:
            watch.cancel()

        return unwatch

    async def _left(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass

    @property
    def ready(self) -> bool:
        return self._link is not None and self._link.ready and not self._lock.locked() and not self.body_complete

    def push(self, data: bytes) -> None:
        if self._link is not None:
            self.last_sent = self._time()
            self._link.push(data)

    async def write(self, data: bytes) -> None:
        """Write whole SSE events or comments, after the head if it was not sent. No-op once the answer is complete."""
        async with self._lock:
            if self.body_complete:
                return
            if not self.headers_sent:
                await self._head(200, [*SSE_HEADERS, *self.extra])
            await self._body(data, more=True)

    def waits(self, told: Callable[[], str]) -> Callable[[], None]:
        return self.keepalive.waits(told) if self.keepalive is not None else lambda: None

    async def finish(self) -> None:
        async with self._lock:
            await self._body(b"", more=False)

    async def answer(self, status: int, body: bytes) -> None:
        """Send a whole JSON answer."""
        async with self._lock:
            await self._whole(status, body, ())

    async def fail(self, error: GatewayError) -> None:
        """Send the error as an HTTP status, or as the last event of a stream if the head was sent."""
        async with self._lock:
            if self.body_complete:
                return
            if self.headers_sent:
                await self._body(errors.sse_tail(error, self.request_id), more=False)
            else:
                await self._whole(error.status, errors.body(error, self.request_id), errors.headers(error))

    async def _whole(self, status: int, body: bytes, headers: Sequence[Header]) -> None:
        length = (b"content-length", str(len(body)).encode())
        await self._head(status, [(b"content-type", b"application/json"), length, *headers, *self.extra])
        await self._body(body, more=False)

    async def _head(self, status: int, headers: list[Header]) -> None:
        self.headers_sent = True
        self.status = status
        all_headers = [*headers, (b"x-request-id", self.request_id.encode())]
        await self._send({"type": "http.response.start", "status": status, "headers": all_headers})

    async def _body(self, data: bytes, *, more: bool) -> None:
        self.body_complete = not more
        self.last_sent = self.stuck_since = self._time()
        await self._send({"type": "http.response.body", "body": data, "more_body": more})
        self.stuck_since = 0.0


class KeepAlive:
    """Sends an SSE comment when nothing else was sent for ``interval`` seconds, and while the request waits for a
    replica every ``WAIT_INTERVAL`` at least, with what it waits for. The first comment commits to a 200, so none is
    sent in the first ``HEADERS_HELD`` seconds: what is refused by then has a status of its own."""

    def __init__(self, client: ClientConnection, interval: float) -> None:
        self._client = client
        self._interval = interval
        self._loop = asyncio.get_running_loop()
        self._started_at = self._loop.time()
        self._sending: asyncio.Task[None] | None = None
        self._waits: dict[object, Callable[[], str]] = {}  # several, if the request asks for several answers
        self._timer = self._loop.call_later(interval, self._tick)

    def waits(self, told: Callable[[], str]) -> Callable[[], None]:
        """``told`` gives the line that is sent while the request waits. Returns the function that ends that."""
        key = object()
        self._waits[key] = told
        self._schedule(max(0.0, self._started_at + HEADERS_HELD - self._loop.time()))
        return lambda: self._end(key)

    def _end(self, key: object) -> None:
        self._waits.pop(key, None)

    def _tick(self) -> None:
        pause = min(self._interval, WAIT_INTERVAL) if self._waits else self._interval
        heard_at = self._client.last_sent or (self._started_at if not self._waits else 0.0)
        idle = self._loop.time() - heard_at
        if idle >= pause and (self._sending is None or self._sending.done()):
            self._sending = self._loop.create_task(self._client.write(self._comment()))  # cancelled by stop
        self._schedule(pause - idle if idle < pause else pause)

    def _comment(self) -> bytes:
        told = next(iter(self._waits.values()), None)
        return b": keepalive\n\n" if told is None else f": {told()}\n\n".encode()

    def _schedule(self, seconds: float) -> None:
        self._timer.cancel()
        self._timer = self._loop.call_later(seconds, self._tick)

    def stop(self) -> None:
        self._timer.cancel()
        if self._sending is not None and not self._sending.done():
            self._sending.cancel()

"""uvicorn's HTTP/1.1 with bounds on the size of a head, the time to receive a request, and the open connections.

uvicorn leaves these bounds to a reverse proxy, which a gateway need not have: a client that opens connections and sends
nothing, or sends its request byte by byte, would hold descriptors and slots for ever. Requests refused here get an
error in the usual form, though no application is involved yet.

Caveat: overrides methods and reads attributes that uvicorn does not document. The dependency has an upper bound, and
``tests/long`` runs the tests of this module on the versions inside it.
"""

import asyncio
import logging
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from gateway.api import errors
from gateway.api.errors import Code, GatewayError
from gateway.http.client import LINK

log = logging.getLogger(__name__)

MAX_HEAD = 64 * 1024  # bytes of the request line and headers
HEAD_TIMEOUT = 30.0  # seconds from the connection, or from the end of the last answer, to a whole head
BODY_TIMEOUT = 60.0  # seconds between two pieces of a body
CHECK_INTERVAL = 30.0  # seconds between checks while a request is being answered
CLOSE_TIMEOUT = 1.0  # seconds that the client of a closed connection gets to read the rest
SPARE_CONNECTIONS = 256  # connections beyond max_connections: idle ones that clients keep alive, and probes


class TooLong(Exception):
    """The head is larger than MAX_HEAD."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """``spare``: connections beyond ``max_connections``; timeouts in seconds."""

    spare: int = SPARE_CONNECTIONS
    head_timeout: float = HEAD_TIMEOUT
    body_timeout: float = BODY_TIMEOUT


def bounded(max_connections: int, bounds: Bounds = Bounds()) -> type[HttpToolsProtocol]:
    """A protocol class with these bounds as attributes, since uvicorn passes no values of ours to the instances."""

    class Bounded(Protocol):
        limit = max_connections + bounds.spare
        head_timeout = bounds.head_timeout
        body_timeout = bounds.body_timeout

    return Bounded


class Link:
    """``client.Link`` on uvicorn's state of the request."""

    __slots__ = ("_cycle", "_flow", "_leavers", "_transport")

    def __init__(self, cycle: RequestResponseCycle, leavers: set[Callable[[], None]]) -> None:
        self._cycle = cycle
        self._flow = cycle.flow
        self._transport = cycle.transport
        self._leavers = leavers  # callbacks for the loss of the connection

    @property
    def ready(self) -> bool:
        cycle = self._cycle
        return bool(
            cycle.chunked_encoding
            and not cycle.response_complete
            and not self._flow.write_paused
            and not self._transport.is_closing()
        )

    def push(self, data: bytes) -> None:
        self._transport.write(b"%x\r\n%b\r\n" % (len(data), data))

    def on_leave(self, callback: Callable[[], None]) -> Callable[[], None]:
        self._flow.resume_reading()  # else a disconnect is not noticed; uvicorn's ``receive`` does the same
        if self._transport.is_closing():
            asyncio.get_running_loop().call_soon(callback)
        self._leavers.add(callback)
        return lambda: self._leavers.discard(callback)


class Protocol(HttpToolsProtocol):
    limit = 1 << 30
    head_timeout = HEAD_TIMEOUT
    body_timeout = BODY_TIMEOUT

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_bytes = 0
        self._raw_bytes = 0
        self._in_head = True
        self._too_long = False
        self._receiving = True  # a request is expected, or is being received
        self._in_body = False
        self._deadline = 0.0  # event loop's time
        self._check_timer: asyncio.TimerHandle | None = None
        self._leavers: set[Callable[[], None]] = set()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        super().connection_made(transport)
        if len(self.connections) > self.limit:
            message = f"{len(self.connections)} connections are open (server.max_connections); try again later"
            self._refuse(GatewayError(Code.OVERLOADED, message))
            return
        self._expect(self.head_timeout)
        self._check()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._check_timer is not None:
            self._check_timer.cancel()
        super().connection_lost(exc)
        for callback in tuple(self._leavers):
            callback()

    def data_received(self, data: bytes) -> None:
        if self._in_body:
            self._expect(self.body_timeout)
        super().data_received(data)
        if self._in_head:  # the parser reports a header only at the end of its line
            self._raw_bytes += len(data)
            if self._raw_bytes > 2 * MAX_HEAD and not self.transport.is_closing():
                self._too_long = True
                self.send_400_response("")

    # -- callbacks of the parser --------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        self._head_bytes = self._raw_bytes = 0
        self._receiving = self._in_head = True
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head, self._in_body = False, True
        self._expect(self.body_timeout)
        scope = self.scope
        super().on_headers_complete()
        cycle: RequestResponseCycle | None = self.cycle  # None if the first request asks for an upgrade
        if cycle is not None and cycle.scope is scope:  # its task has not run yet
            scope["extensions"] = {LINK: {"link": Link(cycle, self._leavers)}}

    def on_message_complete(self) -> None:
        self._receiving = self._in_body = False
        super().on_message_complete()
        self._await_next()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._await_next()

    def _await_next(self) -> None:
        """Called at the end of the request and of its answer, which may end in either order; the next request may have
        begun already."""
        if not self._in_body and not self._receiving and self.cycle.response_complete:
            self._receiving = True
            # While the client sends nothing, uvicorn's own timeout closes the connection sooner.
            self._expect(self.timeout_keep_alive + self.head_timeout)

    # -- bounds -------------------------------------------------------------------------------------------------------

    def _count(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > MAX_HEAD:
            self._too_long = True
            raise TooLong

    def _expect(self, within: float) -> None:
        self._deadline = self.loop.time() + within

    def _check(self) -> None:
        """One timer per connection, not one per piece of data."""
        now = self.loop.time()
        if self.transport.is_closing():  # closed, but not lost: the client does not read the rest
            self.transport.abort()
            return
        if self._receiving and now >= self._deadline:
            log.info("request timed out", extra={"part": "body" if self._in_body else "head"})
            self.transport.close()
        wait = self._deadline - now if self._receiving else CHECK_INTERVAL
        self._check_timer = self.loop.call_later(max(CLOSE_TIMEOUT, wait), self._check)

    def send_400_response(self, msg: str) -> None:
        if self._too_long:
            message = f"the request line and headers are longer than {MAX_HEAD} bytes; send shorter headers"
            self._refuse(GatewayError(Code.REQUEST_TOO_LARGE, message))
            return
        message = f"{msg.rstrip('.')}: the request is not valid HTTP/1.1; correct the client"
        self._refuse(GatewayError(Code.INVALID_REQUEST, message))

    def _refuse(self, error: GatewayError) -> None:
        cycle: RequestResponseCycle | None = self.cycle  # None before the first request, unlike uvicorn's annotation
        if cycle is not None and cycle.response_started and not cycle.response_complete:
            self.transport.close()  # an answer is being sent: an error within it would corrupt it
            return
        request_id = f"req_{uuid.uuid4().hex}"
        body = errors.body(error, request_id)
        head = [b"HTTP/1.1 %d -" % error.status]
        head += [name + b": " + value for name, value in errors.headers(error)]
        head += [b"content-type: application/json", b"content-length: %d" % len(body), b"connection: close"]
        head += [b"x-request-id: " + request_id.encode(), b"", b""]
        log.info("refused", extra={"request_id": request_id, "status": error.status, "code": error.code.value})
        self.transport.write(b"\r\n".join(head) + body)
        self.transport.close()

"""uvicorn's HTTP/1.1 with bounds on the size of a head, the time to receive a request, and the open connections.

uvicorn leaves these bounds to a reverse proxy, which a gateway need not have: a client that opens connections and sends
nothing, or sends its request byte by byte, would hold descriptors and slots for ever. Requests refused here get an
error in the usual form, though no application is involved yet.

One request at a time: what a client sends while its request is answered (pipelining) is held back unread, so that it
can neither end the answer nor begin a time limit. Requests that came in one piece wait in a queue.

Further differences from uvicorn:

* An offer to upgrade (``h2c``, which Java's client sends with its first request) is declined. The parser takes the
  bytes after such a head for another protocol, so a second parser is given the same framing, and then the body.
* A client that has closed its sending side gets its answer. Such a client and one that is gone look alike until
  something is sent to it, so something harmless is sent, and the loss of the connection is noticed.
* When a connection is closed though the client still sends, its sending side is closed first and the rest is read for a
  while: a reset would destroy the answer on its way to the client.

Caveat: overrides methods and reads attributes that uvicorn does not document. The dependency has an upper bound, and
``tests/long`` runs the tests of this module on the versions inside it.
"""

import asyncio
import logging
import uuid
from collections import deque
from collections.abc import Callable
from enum import Enum
from typing import Any
from urllib.parse import unquote

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from gateway.api import errors
from gateway.api.errors import Code, GatewayError
from gateway.config import is_loopback
from gateway.http.arrival import BodyClock, Bounds
from gateway.http.client import LINK
from gateway.http.connection_table import ConnectionTable, Place
from gateway.http.cycle import Cycle, Link
from gateway.http.middleware import OPEN_PATHS
from gateway.http.peer import discard_received, is_gone

log = logging.getLogger(__name__)

MAX_HEAD = 64 * 1024  # bytes of the request line and headers
MAX_HELD = 64 * 1024  # bytes that are read, and held back, while a request is being answered
MAX_QUEUED = 32  # requests that came in one piece and wait for the answer before them
CHECK_INTERVAL = 30.0  # seconds between checks while a request is being answered
CLOSE_TIMEOUT = 1.0  # seconds that the client of a closed connection gets to read the rest
FIRST_LOOK = 0.05  # seconds from an end of the client's data to the first look whether the client is gone
REQUEST_TIMEOUT = 408
HEAD_TOO_LONG = f"the request line and headers are longer than {MAX_HEAD} bytes; send shorter headers"


class TooLong(Exception):
    """The head is larger than MAX_HEAD, or too many requests wait."""


class Stage(Enum):
    """Of the request that is being received."""

    HEAD = "head"  # none yet, or not its whole head
    BODY = "body"
    WHOLE = "whole"  # what comes is held back until the answers are complete
    BROKEN = "broken"  # what comes is thrown away; the client is told after the answers to the requests before
    LINGERING = "lingering"  # what comes is thrown away; the last answer was sent


def bounded(table: ConnectionTable, bounds: Bounds = Bounds()) -> type[HttpToolsProtocol]:
    """A protocol class with these bounds as attributes, since uvicorn passes no values of ours to the instances."""

    class Bounded(Protocol):
        pass

    Bounded.table = table
    Bounded.bounds = bounds
    return Bounded


class Protocol(HttpToolsProtocol):
    table = ConnectionTable(1 << 30)
    bounds = Bounds()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._stage = Stage.HEAD
        self._place = Place.ADMITTED
        self._head_bytes = 0
        self._raw_bytes = 0
        self._too_long = ""  # the message about it
        self._error: GatewayError | None = None  # of BROKEN
        self._replays = False  # the parser is being given the framing of a request that it has already reported
        self._body_clock: BodyClock | None = None
        self._deadline = 0.0  # event loop's time; for HEAD, BODY and LINGERING
        self._linger_until = 0.0
        self._answering: Cycle | None = None
        self._queue: deque[Cycle] = deque()
        self._held = bytearray()
        self._ended = False  # the client sends no more
        self._stuck_since = 0.0  # event loop's time; when the client stopped reading, 0.0 = it reads
        self._check_timer: asyncio.TimerHandle | None = None
        self._look_timer: asyncio.TimerHandle | None = None
        self._leavers: set[Callable[[], None]] = set()

    # -- the connection -----------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        super().connection_made(transport)
        local = self.client is None or is_loopback(self.client[0])
        self._place = self.table.enter(self, local=local, now=self.loop.time())
        if self._place is Place.REFUSED:
            self._refuse_excess()
            return
        self._expect(self.bounds.head if self._place is Place.ADMITTED else self.bounds.excess_head)
        self._check()

    def evict(self) -> None:
        """From the table: another connection needs the place."""
        if self._stage is Stage.LINGERING:
            self.transport.abort()
        elif self._place is Place.ADMITTED:
            self.transport.close()
        else:
            self._place = Place.REFUSED
            self._refuse_excess()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._check_timer, self._look_timer):
            if timer is not None:
                timer.cancel()
        self.table.leave(self)
        super().connection_lost(exc)
        for cycle in (self._answering, *self._queue):
            if cycle is not None and not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()
        for callback in tuple(self._leavers):
            callback()

    def pause_writing(self) -> None:
        self._stuck_since = self.loop.time()
        super().pause_writing()

    def resume_writing(self) -> None:
        self._stuck_since = 0.0
        super().resume_writing()

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        if self._stage is Stage.LINGERING:
            self._deadline = min(self.loop.time() + self.bounds.linger_pause, self._linger_until)
        elif self._stage is Stage.WHOLE:
            self._held += data
            if len(self._held) > MAX_HELD:
                self.flow.pause_reading()
        elif self._stage is not Stage.BROKEN:
            self._feed(data)

    def eof_received(self) -> bool:  # type: ignore[override]  # as in asyncio
        """True keeps the connection open for the answer."""
        self._ended = True
        cycle = self._answering
        if self._stage is Stage.LINGERING or cycle is None or cycle.response_complete or cycle.more_body:
            return False
        if cycle.harmless is None:
            return False  # without an end, and nothing would tell that the client is gone
        self._probe_client()
        self._look(FIRST_LOOK)
        return True

    def _probe_client(self) -> None:
        cycle = self._answering
        if cycle is not None and not self.flow.write_paused and (harmless := cycle.harmless):
            self.transport.write(harmless)

    def _look(self, wait: float) -> None:
        """Looks whether the client is gone, after ``wait`` seconds and then ever more seldom."""

        def look() -> None:
            if is_gone(self.transport):
                self.transport.abort()
                return
            if wait >= CHECK_INTERVAL:
                self._probe_client()
            self._look(min(2 * wait, CHECK_INTERVAL))

        self._look_timer = self.loop.call_later(wait, look)

    # -- the parser ---------------------------------------------------------------------------------------------------

    def _feed(self, data: bytes) -> None:
        if self._stage is Stage.BODY and self._body_clock is not None:
            self._body_clock.receive(len(data), self.loop.time())
            self._deadline = self._body_clock.deadline
        try:
            self._parse(data)
        except httptools.HttpParserError:
            self.send_400_response("")
            return
        if self._stage is Stage.HEAD:  # the parser reports a header only at the end of its line
            self._raw_bytes += len(data)
            if self._raw_bytes > 2 * MAX_HEAD and not self.transport.is_closing():
                self._too_long = HEAD_TOO_LONG
                self.send_400_response("")

    def _parse(self, data: bytes) -> None:
        """Raises HttpParserError."""
        rest: bytes | memoryview = data
        while True:
            try:
                self.parser.feed_data(rest)
            except httptools.HttpParserUpgrade as offer:
                rest = memoryview(rest)[offer.args[0] :]
            else:
                return
            self._decline_upgrade()

    def _decline_upgrade(self) -> None:
        """Go on with the body of the request whose head offers an upgrade."""
        framing = [h for h in self.headers if h[0] in (b"content-length", b"transfer-encoding")]
        method = self.scope["method"].encode()
        lines = [method + b" / HTTP/1.1", *(name + b": " + value for name, value in framing), b"", b""]
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
        self._replays = True
        try:
            self.parser.feed_data(b"\r\n".join(lines))
        finally:
            self._replays = False

    @property
    def _is_deaf(self) -> bool:
        """What the parser reports is known already, or no longer of interest."""
        return self._replays or self._stage in {Stage.BROKEN, Stage.LINGERING}

    def on_message_begin(self) -> None:
        if self._is_deaf:
            return
        self._head_bytes = self._raw_bytes = 0
        self._stage = Stage.HEAD
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        if self._is_deaf:
            return
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._is_deaf:
            return
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self._is_deaf:
            return
        now = self.loop.time()
        self._stage = Stage.BODY
        self._body_clock = BodyClock(self.bounds, now)
        self._deadline = self._body_clock.deadline
        self._fill_scope()
        self.table.works(self)
        if self._place is Place.EXCESS and self.scope["path"].rstrip("/") not in OPEN_PATHS:
            self._refuse_excess()
            return
        if len(self._queue) >= MAX_QUEUED:
            self._too_long = f"more than {MAX_QUEUED} requests were sent at once; await the answers"
            raise TooLong
        cycle = self.cycle = self._new_cycle()
        if self._answering is None:
            self._start(cycle)
        else:
            self._queue.append(cycle)

    def _fill_scope(self) -> None:
        scope = self.scope
        scope["method"] = self.parser.get_method().decode("ascii")
        scope["http_version"] = self.parser.get_http_version()
        url = httptools.parse_url(self.url)
        path = url.path.decode("ascii")
        scope["path"] = unquote(path) if "%" in path else path
        scope["raw_path"] = url.path
        scope["query_string"] = url.query or b""

    def _new_cycle(self) -> Cycle:
        keep = self.scope["http_version"] != "1.0" and self.parser.should_keep_alive()
        cycle = Cycle(
            scope=self.scope,
            transport=self.transport,
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=self.access_log,
            default_headers=self.server_state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=self.expect_100_continue,
            keep_alive=keep and self._place is Place.ADMITTED,
            on_response=self.on_response_complete,
        )
        self.scope["extensions"] = {LINK: {"link": Link(cycle, self._leavers)}}
        return cycle

    def on_body(self, body: bytes) -> None:
        if self._stage is Stage.BODY:  # else refused
            super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return  # the body follows, see _decline_upgrade
        if self._stage is Stage.BODY:
            self._stage = Stage.WHOLE
            super().on_message_complete()

    # -- the answer ---------------------------------------------------------------------------------------------------

    def _start(self, cycle: Cycle) -> None:
        self._answering = cycle
        task = self.loop.create_task(cycle.run_asgi(self.app))
        task.add_done_callback(self.tasks.discard)
        self.tasks.add(task)

    def on_response_complete(self) -> None:
        self.server_state.total_requests += 1
        done, self._answering = self._answering, None
        if self.transport.is_closing():
            return
        if done is not None and done.last:
            self._end()
            return
        self.flow.resume_reading()
        if self._queue and not (self._ended and self._queue[0].more_body):
            self._start(self._queue.popleft())
        elif self._error is not None:
            self._refuse(self._error)
        elif self._ended:
            self.transport.close()
        elif self._stage is Stage.WHOLE:
            self._await_next()
        self._restart_clock()

    def _restart_clock(self) -> None:
        """A part of the next request came together with one that is answered now."""
        if self._stage is Stage.BODY:
            self._body_clock = BodyClock(self.bounds, self.loop.time())
            self._deadline = self._body_clock.deadline
        elif self._stage is Stage.HEAD and self._raw_bytes:
            self._expect(self.bounds.head)

    def _await_next(self) -> None:
        self._stage = Stage.HEAD
        self.table.waits(self, self.loop.time())
        # While the client sends nothing, uvicorn's own timeout closes the connection sooner.
        self._expect(self.timeout_keep_alive + self.bounds.head)
        if self._held:
            held, self._held = bytes(self._held), bytearray()
            self._feed(held)
        else:
            keep = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)
            self.timeout_keep_alive_task = keep

    def _end(self) -> None:
        """Close the connection without destroying what was sent."""
        nothing_comes = self._ended or (self._stage is Stage.WHOLE and not self._held)
        if nothing_comes or not self.transport.can_write_eof():
            self.transport.close()
            return
        if self._place is Place.REFUSED:  # it has no place to linger in
            discard_received(self.transport)
            self.transport.close()
            return
        self._stage = Stage.LINGERING
        self._queue.clear()
        self._held.clear()
        self.table.finishes(self, self.loop.time())
        self._linger_until = self.loop.time() + self.bounds.linger
        self._expect(self.bounds.linger_pause)
        self.transport.write_eof()
        self.flow.resume_reading()
        self._rearm()

    # -- bounds -------------------------------------------------------------------------------------------------------

    def _count(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > MAX_HEAD:
            self._too_long = HEAD_TOO_LONG
            raise TooLong

    def _expect(self, within: float) -> None:
        self._deadline = self.loop.time() + within

    @property
    def _is_due(self) -> bool:
        """More is expected from the client, and nothing of ours keeps it from coming."""
        if self._stage in {Stage.WHOLE, Stage.BROKEN} or self.flow.read_paused:
            return False
        busy = self._answering
        return busy is None or (busy is self.cycle and self._stage is Stage.BODY)

    def _check(self) -> None:
        """One timer per connection, not one per piece of data."""
        if self.transport.is_closing():  # closed, but not lost: the client does not read the rest
            self.transport.abort()
            return
        if self._stuck_since and self.loop.time() - self._stuck_since >= self.bounds.stuck:
            log.info("client does not read", extra={"seconds": self.bounds.stuck})
            self.transport.abort()
            return
        if self._is_due and self.loop.time() >= self._deadline:
            self._time_out()
        self._rearm()

    def _rearm(self) -> None:
        if self._check_timer is not None:
            self._check_timer.cancel()
        wait = self._deadline - self.loop.time() if self._is_due else CHECK_INTERVAL
        self._check_timer = self.loop.call_later(max(CLOSE_TIMEOUT, wait), self._check)

    def _time_out(self) -> None:
        if self._stage is Stage.LINGERING:
            self.transport.abort()
            return
        log.info("request timed out", extra={"part": self._stage.value})
        if self._place is Place.EXCESS:
            self._refuse_excess()
        elif self._stage is Stage.BODY:
            bounds = self.bounds
            message = (
                f"the body came too slowly: expected {bounds.body_rate:g} bytes per second, no pause of "
                f"{bounds.body_pause:g} s, and the end within {bounds.body_total:g} s; send it faster"
            )
            self._refuse(GatewayError(Code.INVALID_REQUEST, message, http_status=REQUEST_TIMEOUT))
        else:
            self.transport.close()

    def _refuse_excess(self) -> None:
        message = f"{len(self.table)} connections are open (server.max_connections, ulimit -n); try again later"
        self._refuse(GatewayError(Code.OVERLOADED, message))

    def send_400_response(self, msg: str) -> None:
        del msg  # uvicorn's
        error = GatewayError(Code.REQUEST_TOO_LARGE, self._too_long)
        if not self._too_long:
            message = "Invalid HTTP request received: the request is not valid HTTP/1.1; correct the client"
            error = GatewayError(Code.INVALID_REQUEST, message)
        if self._answering is None or self._answering.more_body:
            self._refuse(error)
            return
        self._error, self._stage = error, Stage.BROKEN
        if self._queue and self._queue[-1].more_body:
            self._queue.pop()

    def _refuse(self, error: GatewayError) -> None:
        """Answer in place of the application, and close."""
        cycle = self._answering
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
        if cycle is not None:  # the application reads the body, in vain
            cycle.disconnected = True
            cycle.message_event.set()
        self._end()

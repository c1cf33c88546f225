"""The bounds of the HTTP server, over real sockets. Its timers run on a clock that the test moves."""

import asyncio
import itertools
import logging
import random
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import httptools
import pytest
from starlette.types import Receive, Scope, Send

from gateway.cli import server
from gateway.http.arrival import Bounds
from gateway.http.body_memory import BodyMemory
from gateway.http.client import ClientConnection
from gateway.http.connection_table import MIN_WAIT, ConnectionTable
from gateway.http.uvicorn_protocol import CHECK_INTERVAL, MAX_HEAD, MAX_QUEUED, Protocol, Stage, bounded
from tests.faultserver import chunks
from tests.lives import until
from tests.serving import Wire, listening

KEEP_ALIVE = 75.0  # uvicorn's own limit, as the gateway sets it
HEAD_TIMEOUT = Bounds().head
BODY_PAUSE = Bounds().body_pause


@dataclass(eq=False, slots=True)
class Timer:
    when: float
    callback: Callable[[], None]
    pending: bool = True

    def cancel(self) -> None:
        self.pending = False


class Clock:
    """The event loop as a connection sees it: timers go off when the test says so; all else is the real one."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._now = 1000.0
        self._timers: list[Timer] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loop, name)

    def time(self) -> float:
        return self._now

    def call_later(self, delay: float, callback: Callable[..., None], *args: object) -> Timer:
        self._timers.append(Timer(self._now + delay, lambda: callback(*args)))
        return self._timers[-1]

    @property
    def pending(self) -> int:
        return sum(timer.pending for timer in self._timers)

    def advance(self, seconds: float) -> None:
        end = self._now + seconds
        while due := [timer for timer in self._timers if timer.pending and timer.when <= end]:
            first = min(due, key=lambda timer: timer.when)
            self._now = max(self._now, first.when)
            first.pending = False
            first.callback()
        self._now = end


@dataclass
class Scene:
    """An application that answers with the size of the body; ``/stream`` goes on until ``go`` has been put False."""

    server: Any = None
    port: int = 0
    bodies: list[bytes] = field(default_factory=list)
    go: "asyncio.Queue[bool]" = field(default_factory=asyncio.Queue)
    clock: Clock = field(default_factory=Clock)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] != "/early":  # which answers before the body is there
            self.bodies.append(await whole(receive))
        if scope["path"] != "/stream":
            told = b"%d" % len(self.bodies[-1] if self.bodies else b"")
            headers = [(b"content-length", b"%d" % len(told))]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": told, "more_body": False})
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while await self.go.get():
            await send({"type": "http.response.body", "body": b"tick", "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    @property
    def connections(self) -> set[Any]:
        return self.server.server_state.connections  # type: ignore[no-any-return]

    def wire(self) -> Wire:
        return Wire(self.port)

    async def connected(self, count: int = 1) -> None:
        await until(lambda: len(self.connections) == count, f"{count} connections")


@pytest.fixture
def last_byte_at(monkeypatch: pytest.MonkeyPatch) -> dict[object, int]:
    """How many bytes each connection has taken in."""
    count: dict[object, int] = defaultdict(int)
    received = Protocol.data_received

    def counted(self: Protocol, data: bytes) -> None:
        received(self, data)
        count[self] += len(data)

    monkeypatch.setattr(Protocol, "data_received", counted)
    return count


async def more(last_byte_at: dict[object, int], one: Protocol, before: int) -> None:
    await until(lambda: last_byte_at[one] > before or one.transport.is_closing(), "more has come")


async def whole(receive: Receive) -> bytes:
    body = b""
    while True:
        message = await receive()
        body += bytes(message.get("body", b""))
        if not message.get("more_body", False):
            return body


@asynccontextmanager
async def scene(
    monkeypatch: pytest.MonkeyPatch,
    limit: int = 2048,
    *,
    timed: bool = True,
    app: object = None,
    bounds: Bounds = Bounds(),
    max_excess: int = 64,
) -> AsyncIterator[Scene]:
    one = Scene()
    made = Protocol.connection_made

    def on_the_clock(self: Protocol, transport: asyncio.Transport) -> None:
        self.loop = one.clock  # type: ignore[assignment]
        made(self, transport)

    if timed:
        monkeypatch.setattr(Protocol, "connection_made", on_the_clock)
    monkeypatch.setattr(server, "application", lambda _: app or one)
    service = SimpleNamespace(
        config=SimpleNamespace(server=SimpleNamespace(max_connections=limit)), fleet=SimpleNamespace(backends={})
    )
    config = server._uvicorn(service)  # type: ignore[arg-type]
    config.http = bounded(ConnectionTable(limit, max_excess=max_excess), bounds)
    async with listening(config) as (one.server, one.port):
        yield one
        await until(lambda: not one.connections, "no connection is left")


# -- what is not HTTP --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sent",
    [
        b"FOO\r\n\r\n",
        b"FOO / HTTP/1.1\r\nhost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # somebody speaks TLS
        b"POST / HTTP/1.1\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n",
        b"POST / HTTP/1.1\r\ncontent-length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n",
        b"GET / HTTP/1.1\r\nx: a\x00b\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
    ],
)
async def test_what_is_not_http_is_told_so(
    sent: bytes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "gateway.http.uvicorn_protocol")
    async with scene(monkeypatch) as s, s.wire() as wire:
        await wire.send(sent)
        answer = await wire.answer()
        assert (answer.status, answer.error["code"], answer.error["type"]) == (
            400,
            "invalid_request",
            "invalid_request_error",
        )
        assert answer.headers[b"connection"] == b"close"
        assert await wire.closed() == b""
    assert s.bodies == []
    (line,) = [record for record in caplog.records if record.name == "gateway.http.uvicorn_protocol"]
    assert line.__dict__["request_id"] == answer.headers[b"x-request-id"].decode()
    assert line.__dict__["status"] == 400


async def test_a_bad_chunk_in_mid_body(monkeypatch: pytest.MonkeyPatch) -> None:
    async with scene(monkeypatch) as s, s.wire() as wire:
        await wire.send(b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\nZZ\r\n")
        assert (await wire.answer()).error["code"] == "invalid_request"
        assert await wire.closed() == b""


def headers(size: int) -> bytes:
    """So many bytes of names and values, in lines of 1 kB and one that is shorter."""
    full, rest = divmod(size, 1000)
    lines = [b"n" + b": " + b"v" * 999] * full + ([b"n: " + b"v" * (rest - 1)] if rest else [])
    return b"\r\n".join(lines) + b"\r\n"


async def test_a_head_of_the_greatest_size_and_one_byte_more(monkeypatch: pytest.MonkeyPatch) -> None:
    async with scene(monkeypatch) as s:
        async with s.wire() as wire:
            await wire.send(b"GET / HTTP/1.1\r\n" + headers(MAX_HEAD - 1) + b"\r\n")
            assert (await wire.answer()).body == b"0"
            await wire.send(b"GET / HTTP/1.1\r\n" + headers(MAX_HEAD - 1) + b"\r\n")
            assert (await wire.answer()).body == b"0", "each request counts for itself"
        async with s.wire() as wire:
            await wire.send(b"GET / HTTP/1.1\r\n" + headers(MAX_HEAD) + b"\r\n")
            answer = await wire.answer()
            assert (answer.status, answer.error["code"]) == (413, "request_too_large")
            assert str(MAX_HEAD) in answer.error["message"]
            assert await wire.closed() == b""
    assert len(s.bodies) == 2


async def test_a_path_that_is_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    async with scene(monkeypatch) as s, s.wire() as wire:
        await wire.send(b"GET /" + b"a" * MAX_HEAD)
        assert (await wire.answer()).error["code"] == "request_too_large"
        assert await wire.closed() == b""


async def test_one_header_without_an_end(monkeypatch: pytest.MonkeyPatch, last_byte_at: dict[object, int]) -> None:
    async with scene(monkeypatch) as s, s.wire() as wire:
        await wire.send(b"GET / HTTP/1.1\r\nx: ")
        await s.connected()
        (one,) = s.connections
        before = last_byte_at[one] = 0
        while last_byte_at[one] < 4 * MAX_HEAD and one._stage is Stage.HEAD:
            await wire.send(b"a" * 1000)
            await more(last_byte_at, one, before)
            before = last_byte_at[one]
        assert (await wire.answer()).status == 413
        assert await wire.closed() == b""


# -- how many ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """No connection may be evicted, so that the limit is reached by idle ones."""
    monkeypatch.setattr(ConnectionTable, "_evict", lambda *_: False)


@pytest.mark.usefixtures("nobody_waits")
async def test_one_connection_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    async with scene(monkeypatch, limit=2) as s:
        async with s.wire() as first, s.wire():
            await s.connected(2)
            async with s.wire() as third:
                await third.post("/", b"body")
                answer = await third.answer()
                assert (answer.status, answer.error["code"]) == (503, "overloaded")
                assert answer.headers[b"retry-after"] == b"1"
                assert answer.error["retry_after"] == 1
                assert await third.closed() == b""
            await first.get("/")
            assert (await first.answer()).status == 200, "those who were there first are served"
        await s.connected(0)
        assert s.bodies == [b""], "the third reached no application"
        async with s.wire() as again:
            await again.get("/")
            assert (await again.answer()).status == 200


@pytest.mark.usefixtures("nobody_waits")
async def test_a_probe_beyond_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    async with scene(monkeypatch, limit=1, max_excess=1) as s, s.wire():
        await s.connected(1)
        for _ in range(3):
            async with s.wire() as probe:
                await probe.get("/livez")
                answer = await probe.answer()
                assert (answer.status, answer.headers[b"connection"]) == (200, b"close")
            await s.connected(1)


@pytest.mark.parametrize("waits", [b"", b"GET / HT", b"GET / HTTP/1.1\r\n\r\n"])
async def test_the_one_that_waits_longest_gives_way(waits: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    async with scene(monkeypatch, limit=2) as s, s.wire() as busy, s.wire() as idle:
        await busy.post("/stream", b"{}")
        s.go.put_nowait(True)
        await busy.head()
        await idle.send(waits)
        if waits.endswith(b"\r\n\r\n"):
            await idle.answer()
        await s.connected(2)
        async with s.wire() as early:
            await early.get("/")
            assert (await early.answer()).status == 503, "the request of the other may be there, unread"
        s.clock.advance(MIN_WAIT)
        async with s.wire() as fresh:
            assert await idle.closed() == b""
            await fresh.get("/")
            assert (await fresh.answer()).status == 200
        s.go.put_nowait(False)
        assert await busy.chunk() == b"tick", "one that is being answered stays"
        assert await busy.chunk() == b""


async def test_excess_is_told_so_even_if_it_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    async with scene(monkeypatch, limit=1, max_excess=1) as s, s.wire() as busy:
        await busy.post("/stream", b"{}")
        s.go.put_nowait(True)
        await busy.head()
        async with s.wire() as silent:
            await s.connected(2)
            async with s.wire() as probe:
                assert (await silent.answer()).status == 503, "it gives way to a probe"
                await probe.get("/readyz")
                assert (await probe.answer()).status == 200
        await s.connected(1)
        async with s.wire() as silent:
            await s.connected(2)
            s.clock.advance(Bounds().excess_head + 1)
            assert (await silent.answer()).status == 503
        s.go.put_nowait(False)
        assert await busy.chunk() == b"tick"


# -- how long ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sent", [b"", b"G", b"POST / HTTP/1.1\r\nhost: x\r\ncontent-le"])
async def test_a_head_that_does_not_come(sent: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    async with scene(monkeypatch) as s, s.wire() as wire:
        await wire.send(sent)
        await s.connected()
        if sent:
            (one,) = s.connections
            await until(lambda: one.scope is not None, "the head has begun")
        s.clock.advance(HEAD_TIMEOUT - 1)
        assert len(s.connections) == 1
        s.clock.advance(2)
        assert await wire.closed() == b""
    assert s.bodies == []


async def test_a_head_byte_by_byte_gets_no_more_time(monkeypatch: pytest.MonkeyPatch) -> None:
    async with scene(monkeypatch) as s, s.wire() as wire:
        await s.connected()
        for byte in b"GET / HTTP/1.1\r\n":
            await wire.send(bytes([byte]))
            s.clock.advance(HEAD_TIMEOUT / 15)
        assert await wire.closed() == b""


async def test_a_body_that_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    slack = Bounds(body_grace=10 * BODY_PAUSE)
    async with scene(monkeypatch, bounds=slack) as s, s.wire() as wire:
        await wire.send(b"POST / HTTP/1.1\r\ncontent-length: 10\r\n\r\nhalf")
        (one,) = await headers_sent(s)
        await until(lambda: one.cycle.body == b"" and one.cycle.more_body, "the application reads")
        s.clock.advance(BODY_PAUSE - 1)
        assert len(s.connections) == 1
        s.clock.advance(2)
        answer = await wire.answer()
        assert (answer.status, answer.error["code"]) == (408, "invalid_request")
        assert await wire.closed() == b""
        await until(lambda: s.bodies, "the application hears of it")


async def headers_sent(s: Scene) -> set[Any]:
    """The connections, once the one there is has a request with a whole head."""

    def has() -> bool:
        return any(one.cycle is not None for one in s.connections)

    await until(has, "a whole head")
    return s.connections


@pytest.mark.parametrize(
    ("pieces", "size", "every", "comes"), [(20, 1, 1.0, True), (20, 1, 2.0, False), (9, 30_000, 29.0, True)]
)
async def test_a_slow_body(
    *,
    pieces: int,
    size: int,
    every: float,
    comes: bool,
    monkeypatch: pytest.MonkeyPatch,
    last_byte_at: dict[object, int],
) -> None:
    async with scene(monkeypatch) as s, s.wire() as wire:
        await wire.send(b"POST / HTTP/1.1\r\ncontent-length: %d\r\n\r\n" % (pieces * size))
        (one,) = await headers_sent(s)
        for _ in range(pieces):
            if one.transport.is_closing():
                break
            before = last_byte_at[one]
            await wire.send(b"x" * size)
            await until(lambda b=before: last_byte_at[one] >= b + size or one.transport.is_closing(), "it has come")  # type: ignore[misc]
            s.clock.advance(every)
        answer = await wire.answer()
        assert answer.status == (200 if comes else 408)
        assert not comes or answer.body == b"%d" % (pieces * size)


async def test_a_long_answer_is_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    async with scene(monkeypatch) as s, s.wire() as wire:
        await wire.post("/stream", b"{}")
        for turn in range(5):
            s.go.put_nowait(True)
            if turn == 0:
                await wire.head()
            assert await wire.chunk() == b"tick"
            s.clock.advance(3600)
        s.go.put_nowait(False)
        assert await wire.chunk() == b""


async def test_rude_excess_does_not_keep_a_probe_out(monkeypatch: pytest.MonkeyPatch) -> None:
    async with scene(monkeypatch, limit=1, max_excess=2) as s, s.wire() as busy:
        await busy.post("/stream", b"{}")
        s.go.put_nowait(True)
        await busy.head()
        async with s.wire() as one, s.wire() as two:
            for rude in (one, two):
                await rude.send(b"POST / HTTP/1.1\r\ncontent-length: 1000000\r\n\r\n{")
                assert (await rude.answer()).status == 503
            async with s.wire() as probe:
                await probe.get("/livez")
                assert (await probe.answer()).status == 200
        s.go.put_nowait(False)
        assert await busy.chunk() == b"tick"


async def test_a_client_that_never_reads_does_not_keep_its_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    async def pours(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(1000):
            await send({"type": "http.response.body", "body": b"x" * 100_000, "more_body": True})
        raise AssertionError("this goes into no buffer")

    async with scene(monkeypatch, app=pours) as s, s.wire() as wire:
        wire._reader._transport.pause_reading()  # type: ignore[attr-defined]
        await wire.get("/")
        (one,) = await headers_sent(s)
        await until(lambda: one._stuck_since, "the buffers are full")
        s.clock.advance(Bounds().stuck - CHECK_INTERVAL)
        assert len(s.connections) == 1
        s.clock.advance(2 * CHECK_INTERVAL)
        await s.connected(0)


async def test_an_idle_connection_is_kept_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    async with scene(monkeypatch) as s, s.wire() as wire:
        for _ in range(3):
            await wire.post("/", b"four")
            answer = await wire.answer()
            assert (answer.status, answer.body) == (200, b"4")
            assert b"connection" not in answer.headers
            s.clock.advance(KEEP_ALIVE - 1)
            assert len(s.connections) == 1
        s.clock.advance(2)
        assert await wire.closed() == b""


async def test_the_next_head_has_its_limit_too(monkeypatch: pytest.MonkeyPatch) -> None:
    async with scene(monkeypatch) as s, s.wire() as wire:
        await wire.get("/")
        await wire.answer()
        s.clock.advance(KEEP_ALIVE - 1)
        (one,) = s.connections
        await wire.send(b"GET / HT")
        await until(lambda: one.timeout_keep_alive_task is None, "uvicorn's limit is off")
        s.clock.advance(HEAD_TIMEOUT + 2)
        assert await wire.closed() == b""


# -- an answer before the body --------------------------------------------------------------------------------------


async def test_an_answer_that_did_not_wait_for_the_body_is_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    async with scene(monkeypatch) as s, s.wire() as wire:
        await wire.send(b"POST /early HTTP/1.1\r\ncontent-length: 10000000\r\n\r\n")
        answer = await wire.answer()
        assert (answer.status, answer.headers[b"connection"]) == (200, b"close")
        assert await wire.closed() == b""
        await wire.send(b"x" * 1_000_000)  # read, so that no reset destroys an answer that is on its way
        await wire.send(b"\r\nGET / HTTP/1.1\r\n\r\n")
        (one,) = s.connections
        s.clock.advance(Bounds().linger + 1)
        assert one.transport.is_closing()
    assert s.bodies == []


async def test_what_still_comes_has_a_bound_in_time(
    monkeypatch: pytest.MonkeyPatch, last_byte_at: dict[object, int]
) -> None:
    async with scene(monkeypatch) as s, s.wire() as wire:
        await wire.send(b"POST /early HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n")
        await wire.answer()
        (one,) = s.connections
        turns = 0
        while not one.transport.is_closing():
            turns += 1
            before = last_byte_at[one]
            await wire.send(b"1\r\nx\r\n")
            await more(last_byte_at, one, before)
            s.clock.advance(1.0)
        assert turns <= Bounds().linger + 1


async def test_the_body_comes_after_the_head_and_before_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    async with scene(monkeypatch) as s, s.wire() as wire:
        await wire.send(b"POST / HTTP/1.1\r\ncontent-length: 4\r\n\r\n")
        await headers_sent(s)
        await wire.send(b"four")
        assert b"connection" not in (await wire.answer()).headers


# -- upgrades, HTTP/1.0, half-closed connections ---------------------------------------------------------------------

H2C = b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAEAAEAA\r\n"


@pytest.mark.parametrize("cut", ["nowhere", "after the head", "everywhere"])
@pytest.mark.parametrize(
    ("framing", "body"),
    [
        (b"content-length: 5\r\n", b"hello"),
        (b"transfer-encoding: chunked\r\n", b"2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n"),
        (b"", b""),
    ],
)
async def test_an_offer_to_upgrade_is_declined(
    framing: bytes, body: bytes, cut: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = b"POST / HTTP/1.1\r\n" + framing + H2C + b"\r\n"
    async with scene(monkeypatch) as s, s.wire() as wire:
        for _ in range(2):
            sent = head + body
            pieces = {
                "nowhere": [sent],
                "after the head": [head, body],
                "everywhere": [sent[i : i + 1] for i in range(len(sent))],
            }
            for piece in pieces[cut]:
                await wire.send(piece)
                await asyncio.sleep(0)
            answer = await wire.answer()
            assert (answer.status, answer.body) == (200, b"5" if body else b"0")
            assert b"upgrade" not in answer.headers
    assert s.bodies == [b"hello" if body else b""] * 2


async def test_many_offers_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async with scene(monkeypatch) as s, s.wire() as wire:
        one = b"POST / HTTP/1.1\r\ncontent-length: 2\r\n" + H2C + b"\r\nhi"
        await wire.send(one * 20)
        assert [(await wire.answer()).body for _ in range(20)] == [b"2"] * 20
    assert s.bodies == [b"hi"] * 20


async def test_a_client_of_http_1_0_gets_its_stream_without_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    async with scene(monkeypatch) as s, s.wire() as wire:
        for go in (True, True, False):
            s.go.put_nowait(go)
        await wire.send(b"GET /stream HTTP/1.0\r\n\r\n")
        _, status, headers = await wire.head()
        assert (status, headers[b"connection"]) == (200, b"close")
        assert b"transfer-encoding" not in headers
        assert await wire.closed() == b"ticktick"
        assert len(s.bodies) == 1


async def test_a_broken_head_that_offers_an_upgrade(monkeypatch: pytest.MonkeyPatch) -> None:
    async with scene(monkeypatch) as s, s.wire() as wire:
        await wire.send(b"POST / HTTP/1.1\r\ntransfer-encoding: chonked\r\n" + H2C + b"\r\n")
        assert (await wire.answer()).status == 400
        assert await wire.closed() == b""


async def test_half_a_request_and_then_no_more_behind_one_that_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    async with scene(monkeypatch) as s, s.wire() as wire:
        await wire.send(b"GET / HTTP/1.1\r\n\r\nPOST / HTTP/1.1\r\ncontent-length: 5\r\n\r\nab")
        wire._writer.write_eof()
        assert (await wire.answer()).status == 200
        assert await wire.closed() == b""


@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
async def test_a_client_that_has_closed_its_sending_side_gets_its_answer(
    version: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = asyncio.Event()

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        await whole(receive)
        await go.wait()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    async with scene(monkeypatch, app=slow) as s, s.wire() as wire:
        await wire.send(b"POST / HTTP/%b\r\ncontent-length: 4\r\n\r\nbody" % version)
        wire._writer.write_eof()
        await until(lambda: any(one._ended for one in s.connections), "it was noticed")
        s.clock.advance(3 * CHECK_INTERVAL)  # the client is there
        go.set()
        got = await wire.closed()
        assert got.endswith(b"\r\n\r\nok")
        assert (b"100 Continue" in got) is (version == b"1.1")


@pytest.mark.parametrize("how", ["hang_up", "reset"])
@pytest.mark.parametrize("begun", [True, False])
async def test_a_client_that_is_gone_is_noticed_while_nothing_is_sent(
    how: str, begun: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = asyncio.Event()

    async def silent(scope: Scope, receive: Receive, send: Send) -> None:
        client = ClientConnection(scope, receive, send, "r")
        await client.read_body(100, BodyMemory(1 << 30).share())
        client.on_leave(told.set)
        if begun:
            await client.write(b": hello\n\n")
        await told.wait()

    async with scene(monkeypatch, app=silent, timed=False) as s:
        async with s.wire() as wire:
            await wire.post("/", b"{}")
            await headers_sent(s)
            if begun:
                await wire.head()
                await wire.chunk()
            getattr(wire, how)()
        async with asyncio.timeout(5):
            await told.wait()


async def test_the_reader_of_a_stream_that_is_not_sse_leaves_by_closing(monkeypatch: pytest.MonkeyPatch) -> None:
    async with scene(monkeypatch) as s:
        async with s.wire() as wire:
            await wire.get("/stream")
            s.go.put_nowait(True)
            await wire.head()
            await wire.chunk()
        await s.connected(0)
        s.go.put_nowait(False)


# -- one after another -------------------------------------------------------------------------------------------------


async def test_requests_sent_at_once_are_answered_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    async with scene(monkeypatch) as s, s.wire() as wire:
        post = b"POST / HTTP/1.1\r\ncontent-length: %d\r\n\r\n%b"
        await wire.send(b"".join(post % (size, b"x" * size) for size in (1, 22, 333)))
        assert [(await wire.answer()).body for _ in range(3)] == [b"1", b"22", b"333"]
        s.clock.advance(KEEP_ALIVE + 1)
        assert await wire.closed() == b""


async def test_the_second_of_two_requests_may_take_long_too(monkeypatch: pytest.MonkeyPatch) -> None:
    async with scene(monkeypatch) as s, s.wire() as wire:
        await wire.send(b"GET / HTTP/1.1\r\n\r\nGET /stream HTTP/1.1\r\n\r\n")
        await wire.answer()
        s.go.put_nowait(True)
        await wire.head()
        assert await wire.chunk() == b"tick"
        (one,) = s.connections
        s.clock.advance(3600)
        s.go.put_nowait(False)
        assert not one.transport.is_closing()


@pytest.mark.parametrize(
    "more", [b"G", b"POST / HTTP/1.1\r\ncontent-length: 9\r\n\r\nhalf", b"\0", b"GET / HTTP/1.1\r\n" * 9]
)
@pytest.mark.parametrize("together", [True, False])
async def test_what_comes_behind_a_request_does_not_end_its_answer(
    more: bytes, together: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with scene(monkeypatch) as s, s.wire() as wire:
        first = b"GET /stream HTTP/1.1\r\n\r\n"
        await wire.send(first + more if together else first)
        s.go.put_nowait(True)
        await wire.head()
        if not together:
            await wire.send(more)
        for _ in range(4):
            assert await wire.chunk() == b"tick"
            s.clock.advance(3600)
            s.go.put_nowait(True)
        assert await wire.chunk() == b"tick"
        s.go.put_nowait(False)
        assert await wire.chunk() == b""
        s.clock.advance(3600)  # it still has to send the rest in time
        rest = await wire.closed()
        assert rest == b"" or b" 408 " in rest or b" 400 " in rest


async def test_what_is_held_back_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    async with scene(monkeypatch) as s, s.wire() as wire:
        await wire.get("/stream")
        s.go.put_nowait(True)
        await wire.head()
        (one,) = s.connections
        sending = asyncio.ensure_future(wire.send(b"x" * 20_000_000))
        await until(lambda: one.flow.read_paused, "reading has paused")
        assert len(one._held) < 1_000_000
        s.go.put_nowait(False)
        assert await wire.chunk() == b"tick"
        assert await wire.chunk() == b""
        assert (await wire.answer()).status == 400
        wire.reset()
        await asyncio.gather(sending, return_exceptions=True)


async def test_too_many_requests_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async with scene(monkeypatch) as s, s.wire() as wire:
        await wire.send(b"GET / HTTP/1.1\r\n\r\n" * (MAX_QUEUED + 5))
        assert [(await wire.answer()).status for _ in range(MAX_QUEUED + 2)] == [200] * (MAX_QUEUED + 1) + [413]
        assert await wire.closed() == b""


def some_request(dice: random.Random) -> tuple[bytes, int]:
    """And the size of its body."""
    body = dice.randbytes(dice.choice([0, 1, 5, 300]))
    framing, sent = b"content-length: %d\r\n" % len(body), body
    if dice.random() < 0.5:
        framing, sent = b"transfer-encoding: chunked\r\n", chunks(body) * bool(body) + b"0\r\n\r\n"
    return b"POST / HTTP/1.1\r\n" + framing + dice.choice([b"", H2C]) + b"\r\n" + sent, len(body)


async def converse(wire: Wire, dice: random.Random) -> None:
    requests = [some_request(dice) for _ in range(dice.randint(1, 6))]
    data = b"".join(sent for sent, _ in requests) + dice.choice([b"", b"", b"\0", b"GET / HT"])
    cuts = sorted(dice.sample(range(1, len(data)), min(len(data) - 1, dice.choice([0, 1, 3, 30]))))
    for begin, end in itertools.pairwise([0, *cuts, len(data)]):
        await wire.send(data[begin:end])
        await asyncio.sleep(0)
    for _, size in requests:
        assert (await wire.answer()).body == b"%d" % size


async def test_requests_in_any_pieces_are_answered_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    async def talk(s: Scene, seed: int) -> None:
        async with s.wire() as wire:
            await converse(wire, random.Random(seed))

    async with scene(monkeypatch) as s:
        await asyncio.gather(*(talk(s, seed) for seed in range(100)))


# -- beyond ASGI -------------------------------------------------------------------------------------------------------


@dataclass
class Linked:
    """An application that keeps its client, and answers with a stream of which the test sends the pieces."""

    clients: list[ClientConnection] = field(default_factory=list)
    told: list[str] = field(default_factory=list)
    done: asyncio.Event = field(default_factory=asyncio.Event)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        client = ClientConnection(scope, receive, send, "r")
        await client.read_body(100, BodyMemory(1 << 30).share())
        client.on_leave(lambda: self.told.append(scope["path"]))
        assert not client.ready, "no head is out yet"
        await client.write(b"first")
        self.clients.append(client)
        await self.done.wait()


async def test_pieces_are_pushed_in_order_until_the_client_takes_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    app, size = Linked(), 60_000
    async with scene(monkeypatch, app=app) as s, s.wire() as wire:
        await wire.get("/")
        await until(lambda: len(app.clients) == 1, "the answer has begun")
        (client,) = app.clients
        pushed = 0
        while client.ready:
            client.push(b"%c" % (97 + pushed % 26) * size)
            pushed += 1
            assert pushed < 1000, "it takes more than any buffer"
        writing = asyncio.ensure_future(client.write(b"last"))
        await wire.head()
        assert await wire.chunk() == b"first"
        for n in range(pushed):
            assert await wire.chunk() == b"%c" % (97 + n % 26) * size
        assert await wire.chunk() == b"last"
        await writing
        await client.finish()
        assert not client.ready
        app.done.set()


async def test_all_whose_requests_came_over_the_connection_hear_that_it_is_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    app = Linked()
    async with scene(monkeypatch, app=app, timed=False) as s:
        async with s.wire() as wire:
            await wire.send(b"GET /a HTTP/1.1\r\n\r\n")
            await until(lambda: len(app.clients) == 1, "the first is being answered")
            wire.reset()
        await until(lambda: app.told == ["/a"], "it was told")
        assert not app.clients[0].ready
        app.done.set()


# -- the end -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sent", [b"", b"GET /", b"POST / HTTP/1.1\r\ncontent-length: 9\r\n\r\nhalf"])
@pytest.mark.parametrize("how", ["hang_up", "reset"])
async def test_a_client_that_leaves_leaves_no_timer(sent: bytes, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with scene(monkeypatch) as s:
        async with s.wire() as wire:
            await wire.send(sent)
            await s.connected()
            assert s.clock.pending == 1
            getattr(wire, how)()
        await s.connected(0)
        assert s.clock.pending == 0


async def test_no_timer_is_left_after_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    async with scene(monkeypatch) as s:
        async with s.wire() as wire:
            await wire.get("/")
            await wire.answer()
            assert s.clock.pending == 2, "the patrol, and uvicorn's limit"
        await s.connected(0)
        assert s.clock.pending == 0


async def test_by_the_clock_on_the_wall(monkeypatch: pytest.MonkeyPatch) -> None:
    """Silent clients are closed while one that is being answered is not."""
    quick = Bounds(head=0.05, body_pause=0.05)
    async with scene(monkeypatch, timed=False, bounds=quick) as s, s.wire() as busy:
        await busy.post("/stream", b"{}")
        s.go.put_nowait(True)
        await busy.head()
        assert await busy.chunk() == b"tick"
        async with s.wire() as silent, s.wire() as half:
            await half.send(b"POST / HTTP/1.1\r\ncontent-length: 10\r\n\r\nhalf")
            assert await silent.closed() == b""
            assert (await half.answer()).status == 408
        s.go.put_nowait(True)
        assert await busy.chunk() == b"tick"
        s.go.put_nowait(False)
        assert await busy.chunk() == b""


def test_the_parser_reports_what_a_callback_raises_as_its_own_error() -> None:
    """What the limit of the head rests on."""
    assert issubclass(httptools.HttpParserCallbackError, httptools.HttpParserError)

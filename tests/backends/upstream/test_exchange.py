"""Both dialers against a server that fails like the real thing: the same bytes give the same values and faults."""

import asyncio
import gc
import socket
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import uvloop

from backends.domain.spec import Remote
from backends.upstream.exchange import Dialer, Exchange, ExchangeError, Fault, Head, Offer, Request
from backends.upstream.fetch import fetch
from backends.upstream.h1_client import HIGH_WATER, RETRY_PAUSES, H1Dialer, H1Exchange
from backends.upstream.h1_response import HEAD_LIMIT
from backends.upstream.httpx_client import HttpxDialer, HttpxExchange
from tests.faultserver import (
    CHUNKED_HEAD,
    EVENT,
    JSON_BODY,
    LENGTH_HEAD,
    NO_STATUS_LINE,
    SSE_BODY,
    SSE_HEAD,
    Conn,
    FaultServer,
    Script,
    accept_then_close,
    answer,
    chunks,
    drip,
    reset_after,
    then_silent,
)

POST = Request("POST", "/v1/chat/completions", b'{"stream": true}', ((b"content-type", b"application/json"),))
CLEAN = "clean"
Outcome = tuple[int | None, bytes, str]  # status, body, CLEAN or the fault
Run = Callable[[Callable[[], Coroutine[Any, Any, None]]], None]
MakeDialer = Callable[..., Dialer]


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Runs on that loop, and fails if a task or a socket is left behind."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    factory = uvloop.new_event_loop if request.param == "uvloop" else asyncio.SelectorEventLoop

    def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
        async def whole() -> set[str]:
            await main()
            gc.collect()  # generators that httpx left suspended are closed by tasks of the loop
            for _ in range(5):
                await asyncio.sleep(0)
            return {repr(task) for task in asyncio.all_tasks() if task is not asyncio.current_task()}

        with asyncio.Runner(loop_factory=factory) as runner:
            assert runner.run(whole()) == set()

    yield run
    gc.collect()  # an unclosed socket or transport is a ResourceWarning, and warnings are errors
    gc.freeze()  # what is left belongs to earlier tests and imports, and need not be looked at each time


@pytest.fixture(params=["lean", "remote"])
def dial(request: pytest.FixtureRequest) -> MakeDialer:
    def make(port: int, *, host: str = "127.0.0.1", **options: float) -> Dialer:
        if request.param == "lean":
            return H1Dialer(host, port, **options)  # type: ignore[arg-type]
        return HttpxDialer(Remote(f"http://{host}:{port}"), **options)  # type: ignore[arg-type]

    return make


async def collect(exchange: Exchange, server: FaultServer | None = None) -> Outcome:
    head, body = None, b""
    try:
        head = await exchange.start()
        while data := await exchange.read():
            body += data
            if server is not None:
                server.conns[-1].read_some.set()
    except ExchangeError as error:
        return head.status if head else None, body, error.fault
    else:
        return head.status, body, CLEAN
    finally:
        exchange.close()


WHOLE_SSE: Outcome = (200, SSE_BODY, CLEAN)
MATRIX: dict[str, tuple[Script, Outcome]] = {
    "close-delimited": (answer(SSE_HEAD, SSE_BODY), WHOLE_SSE),
    "content-length": (answer(LENGTH_HEAD, JSON_BODY), (200, JSON_BODY, CLEAN)),
    "content-length, kept open": (then_silent(LENGTH_HEAD, JSON_BODY), (200, JSON_BODY, CLEAN)),
    "chunked": (answer(CHUNKED_HEAD, chunks(EVENT, EVENT), b"0\r\n\r\n"), (200, EVENT * 2, CLEAN)),
    "chunked, kept open": (then_silent(CHUNKED_HEAD, chunks(EVENT), b"0\r\n\r\n"), (200, EVENT, CLEAN)),
    "no content": (then_silent(b"HTTP/1.0 204 No Content\r\n\r\n"), (204, b"", CLEAN)),
    "an error's body": (answer(b'HTTP/1.0 404 Not Found\r\n\r\n{"error": "x"}'), (404, b'{"error": "x"}', CLEAN)),
    "drip": (drip(SSE_HEAD + EVENT), (200, EVENT, CLEAN)),
    "split utf-8": (answer(SSE_HEAD + SSE_BODY[:-30], SSE_BODY[-30:-29], SSE_BODY[-29:]), WHOLE_SSE),
    "100-continue": (answer(b"HTTP/1.1 100 Continue\r\n\r\n", LENGTH_HEAD + JSON_BODY), (200, JSON_BODY, CLEAN)),
    "100 with the head": (answer(b"HTTP/1.1 100 Continue\r\n\r\n" + SSE_HEAD, SSE_BODY), WHOLE_SSE),
    "killed in mid-stream": (answer(SSE_HEAD, EVENT[:9]), (200, EVENT[:9], CLEAN)),
    "killed after the head": (answer(SSE_HEAD), (200, b"", CLEAN)),
    "short of its length": (answer(LENGTH_HEAD, JSON_BODY[:5]), (200, JSON_BODY[:5], Fault.INCOMPLETE)),
    "in mid-chunk": (answer(CHUNKED_HEAD, b"9\r\nhello"), (200, b"hello", Fault.INCOMPLETE)),
    "between chunks": (answer(CHUNKED_HEAD, chunks(EVENT)), (200, EVENT, Fault.INCOMPLETE)),
    "bad chunk size": (answer(CHUNKED_HEAD + chunks(EVENT), b"zz\r\n"), (200, EVENT, Fault.PROTOCOL)),
    "reset before the head": (reset_after(), (None, b"", Fault.RESET)),
    "reset in mid-stream": (reset_after(SSE_HEAD, EVENT), (200, EVENT, Fault.RESET)),
    "reset in mid-length": (reset_after(LENGTH_HEAD, JSON_BODY[:5]), (200, JSON_BODY[:5], Fault.RESET)),
    "eof before the head": (answer(), (None, b"", Fault.EOF_BEFORE_HEAD)),
    "eof in the head": (answer(SSE_HEAD[:30]), (None, b"", Fault.EOF_BEFORE_HEAD)),
    "garbage": (answer(b"\x16\x03\x01\x00 garbage\r\n\r\n"), (None, b"", Fault.PROTOCOL)),
    "no status line": (answer(NO_STATUS_LINE + b"\r\n\r\n"), (None, b"", Fault.PROTOCOL)),
    "endless head": (answer(b"HTTP/1.0 200 OK\r\nX: " + b"x" * 200_000), (None, b"", Fault.PROTOCOL)),
    "unasked upgrade": (
        then_silent(b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n"),
        (None, b"", Fault.PROTOCOL),
    ),
}


@pytest.mark.parametrize(("script", "expected"), MATRIX.values(), ids=MATRIX.keys())
def test_matrix(run: Run, dial: MakeDialer, script: Script, expected: Outcome) -> None:
    async def main() -> None:
        async with FaultServer(script) as server:
            dialer = dial(server.port)
            assert await collect(dialer.open(POST), server) == expected
            await dialer.aclose()

    run(main)


def test_json_without_status_line_that_just_ends(run: Run, dial: MakeDialer) -> None:
    """mlx-lm 0.28.4. h11 looks at a head only when it is whole, so httpx cannot tell this from silence."""

    async def main() -> None:
        async with FaultServer(answer(NO_STATUS_LINE)) as server:
            dialer = dial(server.port)
            fault = Fault.PROTOCOL if isinstance(dialer, H1Dialer) else Fault.EOF_BEFORE_HEAD
            assert await collect(dialer.open(POST)) == (None, b"", fault)
            await dialer.aclose()

    run(main)


def test_accept_then_close(run: Run, dial: MakeDialer) -> None:
    """FIN or RST, as the request crosses the close or not."""

    async def main() -> None:
        async with FaultServer(accept_then_close) as server:
            dialer = dial(server.port)
            status, body, fault = await collect(dialer.open(POST))
            assert (status, body) == (None, b"")
            assert fault in {Fault.RESET, Fault.EOF_BEFORE_HEAD}
            await dialer.aclose()

    run(main)


def test_nobody_listens(run: Run, dial: MakeDialer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

    async def main() -> None:
        dialer = dial(port)
        assert await collect(dialer.open(POST)) == (None, b"", Fault.REFUSED)
        await dialer.aclose()
        assert await collect(dialer.open(POST)) == (None, b"", Fault.REFUSED)  # given up

    run(main)


def test_nobody_listens_on_any_address_of_a_name(run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

    def both(*_: Any, **__: Any) -> list[tuple[Any, ...]]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (f"127.0.0.{n}", 0)) for n in (1, 2)]

    async def main() -> None:
        dialer = HttpxDialer(Remote(f"http://two.invalid:{port}"), lookup=both)
        assert await collect(dialer.open(POST)) == (None, b"", Fault.REFUSED)
        await dialer.aclose()

    run(main)


def test_no_route(run: Run, dial: MakeDialer) -> None:
    async def main() -> None:
        dialer = dial(9, host="255.255.255.255")
        assert await collect(dialer.open(POST)) == (None, b"", Fault.UNREACHABLE)
        await dialer.aclose()

    run(main)


def test_tls_failure(run: Run) -> None:
    async def greet(conn: Conn) -> None:
        await conn.send(b"220 this is not TLS\r\n")
        await conn.gone()

    async def main() -> None:
        async with FaultServer(greet) as server:
            dialer = HttpxDialer(Remote(f"https://127.0.0.1:{server.port}"))
            assert await collect(dialer.open(POST)) == (None, b"", Fault.UNREACHABLE)
            await dialer.aclose()

    run(main)


@pytest.fixture
def full_backlog() -> Iterator[int]:
    """A port whose listener takes no more connections, and never will."""
    if sys.platform != "linux":
        pytest.skip("other systems fill a backlog differently")
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        waiting = []
        try:
            for _ in range(4):
                waiting.append(socket.socket())
                waiting[-1].setblocking(False)
                waiting[-1].connect_ex(listener.getsockname())
            yield listener.getsockname()[1]
        finally:
            for sock in waiting:
                sock.close()


def test_connect_timeout(run: Run, dial: MakeDialer, full_backlog: int) -> None:
    async def main() -> None:
        dialer = dial(full_backlog, connect_timeout=0.1)
        assert await collect(dialer.open(POST)) == (None, b"", Fault.CONNECT_TIMEOUT)
        await dialer.aclose()

    run(main)


def test_the_request_on_the_wire(run: Run, dial: MakeDialer) -> None:
    seen: list[bytes] = []

    async def script(conn: Conn) -> None:
        seen.append(await conn.request())
        await conn.send(LENGTH_HEAD + JSON_BODY)

    async def main() -> None:
        async with FaultServer(script) as server:
            dialer = dial(server.port)
            for request in (POST, Request("POST", "/health"), Request("GET", "/health")):
                assert (await collect(dialer.open(request)))[2] == CLEAN
            big = Request("POST", "/", b"x" * 3_000_000)
            assert (await collect(dialer.open(big)))[2] == CLEAN
            assert seen.pop().endswith(b"\r\n\r\n" + big.body)
            for raw, path in zip(seen, (b"POST /v1/chat/completions", b"POST /health", b"GET /health"), strict=True):
                line, *headers = raw.partition(b"\r\n\r\n")[0].split(b"\r\n")
                assert line == path + b" HTTP/1.1"
                lower = {header.lower() for header in headers}
                assert {b"host: 127.0.0.1:%d" % server.port, b"connection: close"} <= lower
                assert (b"content-length: 0" in lower) == (path == b"POST /health")
            assert b"content-type: application/json" in seen[0].lower()
            assert b"content-length: 16" in seen[0].lower()
            assert seen[0].endswith(POST.body)
            await dialer.aclose()

    run(main)


def test_remote_key_and_cookies(run: Run) -> None:
    seen: list[bytes] = []

    async def script(conn: Conn) -> None:
        seen.append(await conn.request())
        await conn.send(b"HTTP/1.1 200 OK\r\nSet-Cookie: a=1\r\nContent-Length: 0\r\n\r\n")

    async def main() -> None:
        async with FaultServer(script) as server:
            dialer = HttpxDialer(Remote(f"http://127.0.0.1:{server.port}", "k3y"))
            request = Request("POST", "/", b"", ((b"authorization", b"Bearer client"),))
            for _ in range(2):
                await collect(dialer.open(request))
            for raw in seen:
                assert b"authorization: bearer k3y\r\n" in raw.lower()
                assert b"bearer client" not in raw.lower()
                assert b"cookie" not in raw.lower()
            await dialer.aclose()

    run(main)


def test_line_break_in_a_header_is_refused(run: Run) -> None:
    async def main() -> None:
        dialer = H1Dialer("127.0.0.1", 1)
        for bad in (Request("GET", "/a\nb"), Request("GET", "/", b"", ((b"x", b"a\rb"),))):
            with pytest.raises(ValueError, match="line break"):
                dialer.open(bad)

    run(main)


# --- cancelling, aborting -------------------------------------------------------------------------------------------


async def begin(exchange: Exchange) -> "asyncio.Task[Head]":
    task = asyncio.ensure_future(exchange.start())
    await asyncio.sleep(0)
    return task


async def cancelled(task: "asyncio.Task[Any]") -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("parts", [(), (SSE_HEAD[:20],), (SSE_HEAD,), (SSE_HEAD, EVENT)])
def test_cancel_frees_the_backend(run: Run, dial: MakeDialer, parts: tuple[bytes, ...]) -> None:
    """Before the head, in it, before the body, in it: the server sees the connection end."""

    async def main() -> None:
        async with FaultServer(then_silent(*parts)) as server:
            dialer = dial(server.port)
            exchange = dialer.open(POST)
            task: asyncio.Task[Any] = await begin(exchange)
            conn = await server.arrived()
            if SSE_HEAD in parts:
                assert (await task).status == 200
                if EVENT in parts:
                    assert await exchange.read() == EVENT
                task = asyncio.ensure_future(exchange.read())
                await asyncio.sleep(0)
            await cancelled(task)
            exchange.close()
            exchange.close()
            await conn.left.wait()
            await dialer.aclose()

    run(main)


def test_cancel_while_connecting(run: Run, dial: MakeDialer, full_backlog: int) -> None:
    async def main() -> None:
        dialer = dial(full_backlog)
        exchanges = [dialer.open(POST) for _ in range(6)]  # the lean client: 4 connecting, 2 waiting for a slot
        tasks = [await begin(exchange) for exchange in exchanges]
        for exchange, task in zip(exchanges, tasks, strict=True):
            await cancelled(task)
            exchange.close()
        late = dialer.open(POST)
        task = await begin(late)
        late.abort(ExchangeError(Fault.DIED, "it died"))
        with pytest.raises(ExchangeError, match="it died"):
            await task
        await dialer.aclose()

    run(main)


@pytest.mark.parametrize("steps", range(12))
def test_closed_at_every_step_of_the_loop(run: Run, dial: MakeDialer, steps: int) -> None:
    """By another task than the one that waits, from before the connect to after the head; nothing may linger."""

    async def main() -> None:
        async with FaultServer(then_silent(SSE_HEAD)) as server:
            dialer = dial(server.port)
            exchange = dialer.open(POST)
            task = asyncio.ensure_future(exchange.start())
            for _ in range(steps):
                await asyncio.sleep(0)
            exchange.close()
            (result,) = await asyncio.gather(task, return_exceptions=True)
            assert isinstance(result, Head) or "on our side" in str(result)
            await dialer.aclose()
            for conn in server.conns:
                await conn.left.wait()

    run(main)


def test_abort_wakes_whoever_waits(run: Run, dial: MakeDialer) -> None:
    error = ExchangeError(Fault.DIED, "silent for 120 s")

    async def main() -> None:
        async with FaultServer(then_silent()) as server:
            dialer = dial(server.port)
            exchange = dialer.open(POST)
            task = await begin(exchange)
            conn = await server.arrived()
            exchange.abort(error)
            for _ in range(2):
                with pytest.raises(ExchangeError) as caught:
                    await task
                assert caught.value is error
            with pytest.raises(ExchangeError, match="silent"):
                await exchange.read()
            await conn.left.wait()
            await dialer.aclose()

    run(main)


# --- work that goes on ----------------------------------------------------------------------------------------------


class Watching:
    """Hangs up at the first bytes with ``until`` in them."""

    def __init__(self, until: bytes = b"never") -> None:
        self.data = b""
        self.ended = asyncio.Event()
        self._until = until

    def heard(self, data: bytes) -> bool:
        self.data += data
        return self._until in data

    def over(self) -> None:
        self.ended.set()


@pytest.mark.parametrize("fault", [None, Fault.STALLED, Fault.DEADLINE, Fault.OCCUPIED])
def test_an_abandoned_call_is_over_when_the_backend_ends_it(run: Run, dial: MakeDialer, fault: Fault | None) -> None:
    async def script(conn: Conn) -> None:
        await conn.request()
        await conn.read_some.wait()
        await conn.send(LENGTH_HEAD + JSON_BODY)
        conn.fin()

    async def main() -> None:
        async with FaultServer(script) as server:
            dialer, watcher = dial(server.port), Watching()
            exchange = dialer.open(POST)
            task = await begin(exchange)
            conn = await server.arrived()
            await until(lambda: exchange.working)
            if fault is not None:
                exchange.abort(ExchangeError(fault, "not its end"))
                with pytest.raises(ExchangeError):
                    await task
            else:
                task.cancel()
                await asyncio.wait({task})
            assert exchange.working
            exchange.abandon(watcher)
            assert not conn.left.is_set()
            conn.read_some.set()
            await watcher.ended.wait()
            assert JSON_BODY in watcher.data
            exchange.close()
            await dialer.aclose()

    run(main)


def test_an_abandoned_call_is_reset_when_its_watcher_says_so(run: Run) -> None:
    """Closed in order, the first write of the backend would still succeed."""
    errors: list[ConnectionError] = []
    told = asyncio.Event()

    async def script(conn: Conn) -> None:
        await conn.request()
        await conn.read_some.wait()
        await conn.send(SSE_HEAD + EVENT)
        await conn.gone()
        try:
            await conn.send(EVENT)
        except ConnectionError as error:
            errors.append(error)
        told.set()

    async def main() -> None:
        async with FaultServer(script) as server:
            dialer, watcher = H1Dialer("127.0.0.1", server.port), Watching(b"data:")
            exchange = dialer.open(POST)
            task = await begin(exchange)
            await until(lambda: exchange.working)
            task.cancel()
            await asyncio.wait({task})
            exchange.abandon(watcher)
            assert exchange.local_port > 0
            conn = await server.arrived()
            conn.read_some.set()
            await told.wait()
            assert len(errors) == 1
            assert not watcher.ended.is_set(), "a hang-up is no end"
            await dialer.aclose()

    run(main)


def test_a_closed_dialer_ends_abandoned_calls(run: Run, dial: MakeDialer) -> None:
    async def main() -> None:
        async with FaultServer(then_silent()) as server:
            dialer = dial(server.port)
            exchange = dialer.open(POST)
            task = await begin(exchange)
            conn = await server.arrived()
            await until(lambda: exchange.working)
            task.cancel()
            await asyncio.wait({task})
            exchange.abandon(Watching())
            await dialer.aclose()
            await conn.left.wait()

    run(main)


def test_abort_delivers_what_is_buffered_first(run: Run, dial: MakeDialer) -> None:
    async def main() -> None:
        async with FaultServer(then_silent(SSE_HEAD, EVENT)) as server:
            dialer = dial(server.port)
            exchange = dialer.open(POST)
            await exchange.start()
            await until(lambda: buffered(exchange) == len(EVENT))
            exchange.abort(ExchangeError(Fault.DIED, "exited with -9"))
            assert await exchange.read() == EVENT
            with pytest.raises(ExchangeError, match="exited"):
                await exchange.read()
            exchange.close()
            await dialer.aclose()

    run(main)


@pytest.mark.parametrize("whole", [True, False])
def test_abort_after_the_end(run: Run, dial: MakeDialer, whole: bool) -> None:
    """The end of file of a killed server becomes its cause of death; a body whole by its length stays whole."""

    async def main() -> None:
        async with FaultServer(answer(LENGTH_HEAD + JSON_BODY if whole else SSE_HEAD + JSON_BODY)) as server:
            dialer = dial(server.port)
            exchange = dialer.open(POST)
            await exchange.start()
            assert await exchange.read() == JSON_BODY
            assert await exchange.read() == b""
            exchange.abort(ExchangeError(Fault.DIED, "exited with -9"))
            if whole:
                assert await exchange.read() == b""
            else:
                with pytest.raises(ExchangeError, match="exited"):
                    await exchange.read()
            await dialer.aclose()

    run(main)


def test_last_heard(run: Run, dial: MakeDialer) -> None:
    async def later() -> None:
        now = asyncio.get_running_loop().time  # uvloop counts milliseconds
        then = now()
        await until(lambda: now() > then)

    async def script(conn: Conn) -> None:
        await conn.request()
        await later()
        await conn.send(SSE_HEAD)
        await conn.read_some.wait()
        await later()
        await conn.send(EVENT)
        await conn.gone()

    async def main() -> None:
        async with FaultServer(script) as server:
            dialer = dial(server.port)
            exchange = dialer.open(POST)
            before = exchange.last_heard
            await exchange.start()
            at_head = exchange.last_heard
            assert at_head > before
            server.conns[0].read_some.set()
            assert await exchange.read() == EVENT
            assert exchange.last_heard > at_head
            exchange.close()
            await dialer.aclose()

    run(main)


# --- flow -----------------------------------------------------------------------------------------------------------


def buffered(exchange: Exchange) -> int:
    assert isinstance(exchange, H1Exchange | HttpxExchange)
    return exchange._answer.size


async def until(true: Callable[[], bool]) -> None:
    while not true():  # noqa: ASYNC110  nothing tells that a buffer has filled
        await asyncio.sleep(0.001)


def test_backpressure(run: Run, dial: MakeDialer) -> None:
    """A client that does not read holds little more than the high-water mark, and loses nothing."""
    body = bytes(range(256)) * 4096 * 16

    async def main() -> None:
        async with FaultServer(answer(SSE_HEAD + body)) as server:
            dialer = dial(server.port)
            exchange = dialer.open(POST)
            await exchange.start()
            got = b""
            await until(lambda: buffered(exchange) > HIGH_WATER)
            await asyncio.sleep(0.05)  # time to overrun the mark, were there no pause
            while data := await exchange.read():
                assert len(data) <= 2 * HIGH_WATER  # asyncio and uvloop read up to 256 KiB at once
                got += data
            assert got == body
            await dialer.aclose()

    run(main)


PIECES = [b"%d" % n * 5000 for n in range(20)]


@pytest.mark.parametrize("takes", [lambda _: True, lambda _: False, lambda data: b"7" not in data])
def test_what_comes_while_one_waits_is_offered_first(run: Run, dial: MakeDialer, takes: Offer) -> None:
    """Whoever takes it, it is all there once, and in order."""
    got = bytearray()

    def offered(data: bytes) -> bool:
        assert isinstance(data, bytes)
        if taken := takes(data):
            got.extend(data)
        return taken

    async def main() -> None:
        async with FaultServer(answer(SSE_HEAD, *PIECES)) as server:
            dialer = dial(server.port)
            exchange = dialer.open(POST)
            await exchange.start()
            while data := await exchange.read(offered):
                got.extend(data)
            exchange.close()
            await dialer.aclose()

    run(main)
    assert got == b"".join(PIECES)


def test_an_error_of_the_one_who_was_offered_is_its_own(run: Run, dial: MakeDialer) -> None:
    def broken(_: bytes) -> bool:
        raise LookupError("ours, not the backend's")

    async def main() -> None:
        told = asyncio.Event()

        async def script(conn: Conn) -> None:
            await conn.request()
            await conn.send(SSE_HEAD)
            await told.wait()  # somebody reads
            await conn.send(EVENT)
            await conn.gone()

        async with FaultServer(script) as server:
            dialer = dial(server.port)
            exchange = dialer.open(POST)
            await exchange.start()
            asyncio.get_running_loop().call_later(0.01, told.set)
            with pytest.raises(LookupError, match="ours"):
                await exchange.read(broken)
            exchange.close()
            await dialer.aclose()

    run(main)


def test_slots_are_held_until_the_first_byte(run: Run) -> None:
    async def main() -> None:
        async with FaultServer(then_silent_until_told) as server:
            dialer = H1Dialer("127.0.0.1", server.port, connects=2, grace=3600.0)
            exchanges = [dialer.open(POST) for _ in range(4)]
            tasks = [await begin(exchange) for exchange in exchanges]
            (await server.arrived(2)).read_some.set()
            assert (await tasks[1]).status == 200
            await server.arrived(3)
            exchanges[0].close()  # a slot of one that hangs up is free as well
            await server.arrived(4)
            assert len(server.conns) == 4
            await dialer.aclose()
            await asyncio.gather(*tasks, return_exceptions=True)

    run(main)


async def then_silent_until_told(conn: Conn) -> None:
    await conn.request()
    await conn.read_some.wait()
    await conn.send(SSE_HEAD)
    await conn.gone()


def test_slots_are_given_back_after_the_grace(run: Run) -> None:
    async def main() -> None:
        async with FaultServer(then_silent()) as server:
            dialer = H1Dialer("127.0.0.1", server.port, connects=1, grace=0.001)
            tasks = [await begin(dialer.open(POST)) for _ in range(5)]
            await server.arrived(5)  # none of them was answered
            await dialer.aclose()
            await asyncio.gather(*tasks, return_exceptions=True)

    run(main)


class Slow(ThreadingHTTPServer):
    """What mlx_lm.server stands on, with its backlog of 5, and an accept loop that has to wait for the GIL."""

    daemon_threads = False

    def get_request(self) -> tuple[Any, Any]:
        threading.Event().wait(0.005)
        return super().get_request()


class Hello(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(SSE_BODY)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass


@pytest.mark.slow
def test_burst_against_a_backlog_of_5(run: Run) -> None:
    server = Slow(("127.0.0.1", 0), Hello)
    assert server.request_queue_size == 5
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()

    async def main() -> None:
        dialer = H1Dialer("127.0.0.1", server.server_address[1])
        outcomes = await asyncio.gather(*(collect(dialer.open(POST)) for _ in range(64)))
        assert set(outcomes) == {WHOLE_SSE}
        await dialer.aclose()

    try:
        run(main)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_fetch(run: Run, dial: MakeDialer) -> None:
    async def main() -> None:
        async with FaultServer(answer(LENGTH_HEAD, JSON_BODY)) as server:
            dialer = dial(server.port)
            head, body = await fetch(dialer, POST, timeout=60)
            assert (head.status, body) == (200, JSON_BODY)
            assert head.get(b"content-type") == b"application/json"
            with pytest.raises(ExchangeError) as caught:
                await fetch(dialer, POST, limit=10, timeout=60)
            assert caught.value.fault is Fault.PROTOCOL
            await dialer.aclose()
        async with FaultServer(then_silent(SSE_HEAD, EVENT)) as server:
            dialer = dial(server.port)
            with pytest.raises(ExchangeError) as caught:
                await fetch(dialer, POST, timeout=0.05)
            assert caught.value.fault is Fault.STALLED
            await (await server.arrived()).left.wait()
            await dialer.aclose()

    run(main)


# --- without sockets: every split, every death ----------------------------------------------------------------------


class FakeTransport(asyncio.Transport):
    def __init__(self) -> None:
        super().__init__()
        self.aborted = False

    def writelines(self, list_of_data: Any) -> None:
        pass

    def abort(self) -> None:
        self.aborted = True


def feed(monkeypatch: pytest.MonkeyPatch, parts: list[bytes], *, reset: bool = False) -> Outcome:
    """All parts and the end arrive before the caller reads anything."""

    async def main() -> Outcome:
        async def create_connection(factory: Callable[[], asyncio.Protocol], host: str, port: int) -> None:
            protocol, transport = factory(), FakeTransport()
            protocol.connection_made(transport)
            for part in parts:
                if not transport.aborted:
                    protocol.data_received(part)
            if not reset and not transport.aborted:
                protocol.eof_received()
            assert reset or transport.aborted
            protocol.connection_lost(ConnectionResetError() if reset else None)

        monkeypatch.setattr(asyncio.get_running_loop(), "create_connection", create_connection)
        dialer = H1Dialer("127.0.0.1", 1)
        outcome = await collect(dialer.open(POST))
        await dialer.aclose()
        return outcome

    with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
        return runner.run(main())


LENGTH = LENGTH_HEAD + JSON_BODY
CHUNKED = CHUNKED_HEAD + chunks(EVENT[:40], EVENT[40:]) + b"0\r\nX-Trailer: t\r\n\r\n"
SSE = SSE_HEAD + EVENT
WIRES: dict[str, tuple[bytes, Outcome]] = {
    "close-delimited": (SSE, (200, EVENT, CLEAN)),
    "length": (LENGTH, (200, JSON_BODY, CLEAN)),
    "length, trailing data": (LENGTH + b"HTTP/1.1 200 OK\r\n\r\nmore", (200, JSON_BODY, CLEAN)),
    "chunked": (CHUNKED, (200, EVENT, CLEAN)),
    "chunked, trailing data": (CHUNKED + b"junk", (200, EVENT, CLEAN)),
    "interim": (b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + LENGTH, (200, JSON_BODY, CLEAN)),
    "both lengths": (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n",
        (None, b"", Fault.PROTOCOL),
    ),
    "no status line": (NO_STATUS_LINE, (None, b"", Fault.PROTOCOL)),
}


@pytest.mark.parametrize(("wire", "expected"), WIRES.values(), ids=WIRES.keys())
def test_every_split(monkeypatch: pytest.MonkeyPatch, wire: bytes, expected: Outcome) -> None:
    assert feed(monkeypatch, [wire]) == expected
    assert feed(monkeypatch, [wire[i : i + 1] for i in range(len(wire))]) == expected
    for cut in range(1, len(wire)):
        assert feed(monkeypatch, [wire[:cut], wire[cut:]]) == expected, cut


def died(wire: bytes, cut: int, *, reset: bool) -> Outcome:
    """What death after ``cut`` bytes must look like, told from the offsets alone."""
    body_at = wire.index(b"\r\n\r\n") + 4
    if cut == len(wire) and wire != SSE:
        return WIRES["length" if wire == LENGTH else "chunked"][1]
    if cut < body_at:
        return None, b"", Fault.RESET if reset else Fault.EOF_BEFORE_HEAD
    body = EVENT[: sum(1 for at in EVENT_AT if at < cut)] if wire == CHUNKED else wire[body_at:cut]
    if reset:
        return 200, body, Fault.RESET
    return 200, body, CLEAN if wire == SSE else Fault.INCOMPLETE


FIRST, SECOND = CHUNKED.index(EVENT[:40]), CHUNKED.index(EVENT[40:])
EVENT_AT = [*range(FIRST, FIRST + 40), *range(SECOND, SECOND + len(EVENT) - 40)]  # where its bytes are in CHUNKED


@pytest.mark.parametrize("reset", [False, True], ids=["eof", "reset"])
@pytest.mark.parametrize("wire", [SSE, LENGTH, CHUNKED], ids=["close-delimited", "length", "chunked"])
def test_death_at_every_byte(monkeypatch: pytest.MonkeyPatch, wire: bytes, reset: bool) -> None:
    for cut in range(len(wire) + 1):
        assert feed(monkeypatch, [wire[:cut]], reset=reset) == died(wire, cut, reset=reset), cut


@pytest.mark.parametrize("excess", [0, 1])
def test_head_limit_in_one_piece(monkeypatch: pytest.MonkeyPatch, excess: int) -> None:
    wire = b"HTTP/1.0 200 OK\r\nX: %b\r\n\r\n" % (b"x" * (HEAD_LIMIT - 1 + excess))
    expected = (None, b"", Fault.PROTOCOL) if excess else (200, b"", CLEAN)
    assert feed(monkeypatch, [wire]) == expected


def test_a_reset_connect_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []

    async def sleep(delay: float) -> None:
        slept.append(delay)

    async def attempt(failures: list[Exception]) -> Outcome:
        async def create_connection(factory: Callable[[], asyncio.Protocol], host: str, port: int) -> None:
            if failures:
                raise failures.pop(0)
            protocol = factory()
            protocol.connection_made(FakeTransport())
            protocol.data_received(LENGTH)
            protocol.connection_lost(None)

        monkeypatch.setattr(asyncio.get_running_loop(), "create_connection", create_connection)
        monkeypatch.setattr(asyncio, "sleep", sleep)
        slept.clear()
        dialer = H1Dialer("127.0.0.1", 1, jitter=lambda: 0.25)
        outcome = await collect(dialer.open(POST))
        monkeypatch.undo()
        await dialer.aclose()
        return outcome

    tries = len(RETRY_PAUSES)
    assert asyncio.run(attempt([ConnectionResetError(), ConnectionAbortedError()])) == (200, JSON_BODY, CLEAN)
    assert slept == [pause * 0.75 for pause in RETRY_PAUSES[:2]]
    assert asyncio.run(attempt([ConnectionResetError()] * tries)) == (200, JSON_BODY, CLEAN)
    assert asyncio.run(attempt([ConnectionResetError()] * (tries + 1))) == (None, b"", Fault.CONNECT_RESET)
    assert slept == [pause * 0.75 for pause in RETRY_PAUSES]
    assert asyncio.run(attempt([ConnectionRefusedError(), OSError()])) == (None, b"", Fault.REFUSED)
    assert slept == []

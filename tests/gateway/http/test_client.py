"""The client's side of a request, with an ASGI server that records: heads once, whole bodies, nothing after the end."""

import asyncio
import json
from collections.abc import Callable, Iterable

import pytest
from starlette.types import Message, Scope

from gateway.api.errors import Code, GatewayError
from gateway.http import client as client_module
from gateway.http.body_memory import BodyMemory, OutOfBodyMemory, Share
from gateway.http.client import LINK, SSE_HEADERS, ClientConnection, ClientLeft, KeepAlive, TooLarge

OOM = GatewayError(Code.BACKEND_OOM, "m:0 ran out of memory", model="m", backend="m:0", retry_after=3.0)


class Wire:
    """``messages`` that the server was sent; it checks their order as a real one would."""

    def __init__(self, received: Iterable[Message] = ()) -> None:
        self.messages: list[Message] = []
        self.limiter: asyncio.Event | None = None  # while unset, the client does not read
        self.knocked = asyncio.Event()  # somebody wants to send
        self.news = asyncio.Event()
        self._received = list(received)

    async def receive(self) -> Message:
        if self._received:
            return self._received.pop(0)
        await asyncio.get_running_loop().create_future()
        raise AssertionError("nothing more comes")

    async def send(self, message: Message) -> None:
        self.knocked.set()
        if self.limiter is not None:
            await self.limiter.wait()
        kinds = [m["type"] for m in self.messages]
        assert (message["type"] == "http.response.start") == (not kinds), "one head, and first"
        assert not self.body_complete, "nothing after the end"
        self.messages.append(message)
        self.news.set()

    @property
    def body_complete(self) -> bool:
        return len(self.messages) > 1 and not self.messages[-1]["more_body"]

    @property
    def status(self) -> int:
        return int(self.messages[0]["status"])

    @property
    def headers(self) -> dict[bytes, bytes]:
        pairs = self.messages[0]["headers"]
        assert len(pairs) == len(dict(pairs)), "each header once"
        return dict(pairs)

    @property
    def body(self) -> bytes:
        return b"".join(m["body"] for m in self.messages[1:])


def client(wire: Wire, headers: Iterable[tuple[bytes, bytes]] = ()) -> ClientConnection:
    scope: Scope = {"type": "http", "method": "POST", "path": "/", "headers": list(headers)}
    return ClientConnection(scope, wire.receive, wire.send, "req-1")


def body(data: bytes, *, more: bool = False) -> Message:
    return {"type": "http.request", "body": data, "more_body": more}


LEFT: Message = {"type": "http.disconnect"}


def share(total: int = 1 << 30) -> Share:
    return BodyMemory(total).share()


# -- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "parts", [[b"hello"], [b"he", b"llo"], [b"", b"h", b"", b"ello", b""], [bytes([c]) for c in b"hello"]]
)
async def test_the_body_in_any_pieces(parts: list[bytes]) -> None:
    messages = [body(part, more=i + 1 < len(parts)) for i, part in enumerate(parts)]
    assert await client(Wire(messages)).read_body(5, share()) == b"hello"


async def test_no_body_at_all() -> None:
    assert await client(Wire([{"type": "http.request"}])).read_body(0, share()) == b""


@pytest.mark.parametrize("parts", [[b"hello!"], [b"hello", b"!"]])
async def test_a_body_over_the_limit(parts: list[bytes]) -> None:
    wire = Wire([body(part, more=True) for part in parts])
    with pytest.raises(TooLarge):
        await client(wire).read_body(5, share())


async def test_a_length_over_the_limit_is_refused_before_a_byte_is_read() -> None:
    with pytest.raises(TooLarge):
        await client(Wire(), [(b"content-length", b"6")]).read_body(5, share())


@pytest.mark.parametrize("length", [b"5", b"", b"many", b"-1"])
async def test_a_length_that_says_nothing_is_no_reason(length: bytes) -> None:
    one = client(Wire([body(b"hello")]), [(b"content-length", length)])
    assert await one.read_body(5, share()) == b"hello"


async def test_a_body_for_which_there_is_no_memory_is_refused_before_a_byte_is_read() -> None:
    with pytest.raises(OutOfBodyMemory):
        await client(Wire(), [(b"content-length", b"6")]).read_body(9, share(5))


async def test_memory_is_taken_as_a_body_comes() -> None:
    memory = BodyMemory(10)
    others, own = memory.share(), memory.share()
    others.resize(4)
    with pytest.raises(OutOfBodyMemory):
        await client(Wire([body(b"hello", more=True), body(b"yo", more=True)])).read_body(9, own)
    assert memory.held == 9
    own.release()
    assert memory.held == 4


async def test_a_client_that_leaves_while_it_sends() -> None:
    with pytest.raises(ClientLeft):
        await client(Wire([body(b"he", more=True), LEFT])).read_body(5, share())


async def test_leaving_is_told_with_the_disconnect_only() -> None:
    told: list[str] = []
    client(Wire([body(b""), LEFT])).on_leave(lambda: told.append("left"))
    unwatch = client(Wire([body(b"")])).on_leave(lambda: told.append("still there"))
    gone = client(Wire([body(b""), LEFT]))
    gone.on_leave(lambda: told.append("taken back"))()
    for _ in range(5):
        await asyncio.sleep(0)
    unwatch()
    for _ in range(5):
        await asyncio.sleep(0)
    assert told == ["left"]


async def test_headers_of_the_request() -> None:
    one = client(Wire(), [(b"a", b"1"), (b"a", b"2")])
    assert one.header(b"a") == b"1"
    assert one.header(b"b") == b""


class Plug:
    """A link that records."""

    def __init__(self) -> None:
        self.ready = True
        self.pushed: list[bytes] = []
        self.watching: list[Callable[[], None]] = []

    def push(self, data: bytes) -> None:
        self.pushed.append(data)

    def on_leave(self, callback: Callable[[], None]) -> Callable[[], None]:
        self.watching.append(callback)
        return lambda: self.watching.remove(callback)


async def test_with_a_link_nothing_waits_only_to_hear_of_the_end() -> None:
    plug, told = Plug(), []
    scope: Scope = {"type": "http", "headers": [], "extensions": {LINK: {"link": plug}}}
    before = asyncio.all_tasks()
    unwatch = ClientConnection(scope, Wire().receive, Wire().send, "req-1").on_leave(lambda: told.append("left"))
    assert scope["extensions"] == {}
    assert asyncio.all_tasks() == before
    plug.watching[0]()
    assert told == ["left"]
    unwatch()
    assert plug.watching == []


async def test_what_is_pushed_passes_by_no_write_that_is_under_way() -> None:
    wire, plug = Wire(), Plug()
    one = ClientConnection(
        {"type": "http", "headers": [], "extensions": {LINK: {"link": plug}}}, wire.receive, wire.send, "r"
    )
    wire.limiter = asyncio.Event()
    writing = asyncio.ensure_future(one.write(b"a"))
    await wire.knocked.wait()
    assert not one.ready
    wire.limiter.set()
    await writing
    before = one.last_sent
    await asyncio.sleep(0.001)
    one.push(b"b")
    assert plug.pushed == [b"b"]
    assert one.last_sent > before
    plug.ready = False
    assert not one.ready
    plug.ready = True
    await one.finish()
    assert not one.ready, "it has ended"


async def test_without_a_link_nothing_is_pushed() -> None:
    wire = Wire()
    one = client(wire)
    await one.write(b"a")
    assert not one.ready


# -- answering -------------------------------------------------------------------------------------------------------


async def test_a_stream() -> None:
    wire = Wire()
    one = client(wire)
    one.extra = [(b"x-gateway-backend", b"m:0")]
    await one.write(b": hi\n\n")
    one.extra = [(b"too", b"late")]
    await one.write(b"data: 1\n\n")
    await one.finish()
    assert (wire.status, one.status, wire.body_complete, one.body_complete) == (200, 200, True, True)
    assert wire.headers == {**dict(SSE_HEADERS), b"x-gateway-backend": b"m:0", b"x-request-id": b"req-1"}
    assert wire.body == b": hi\n\ndata: 1\n\n"


async def test_nothing_is_written_after_the_end() -> None:
    wire = Wire()
    one = client(wire)
    await one.write(b"data: 1\n\n")
    await one.finish()
    await one.write(b"data: 2\n\n")
    await one.fail(OOM)
    assert wire.body == b"data: 1\n\n"


async def test_an_answer_in_one_piece() -> None:
    wire = Wire()
    one = client(wire)
    one.extra = [(b"x-gateway-model", b"m")]
    await one.answer(200, b"{}")
    assert wire.headers == {
        b"content-type": b"application/json",
        b"content-length": b"2",
        b"x-gateway-model": b"m",
        b"x-request-id": b"req-1",
    }
    assert wire.body == b"{}"
    assert wire.body_complete


async def test_an_error_is_a_status_while_it_can_be() -> None:
    wire = Wire()
    one = client(wire)
    await one.fail(OOM)
    assert (wire.status, one.status, wire.body_complete) == (503, 503, True)
    assert wire.headers[b"retry-after"] == b"3"
    assert int(wire.headers[b"content-length"]) == len(wire.body)
    assert json.loads(wire.body)["error"]["request_id"] == "req-1"


async def test_else_it_is_the_last_event() -> None:
    wire = Wire()
    one = client(wire)
    await one.write(b"data: 1\n\n")
    await one.fail(OOM)
    assert wire.status == 200
    assert wire.body_complete
    first, error, done, rest = wire.body.split(b"\n\n")
    assert (first, done, rest) == (b"data: 1", b"data: [DONE]", b"")
    assert json.loads(error.removeprefix(b"data: "))["error"]["code"] == "backend_oom"


async def test_writes_at_the_same_time_make_one_head_and_whole_events() -> None:
    wire = Wire()
    wire.limiter = asyncio.Event()
    one = client(wire)
    writes = [asyncio.ensure_future(one.write(b"data: %d\n\n" % i)) for i in range(5)]
    await asyncio.sleep(0)
    wire.limiter.set()
    await asyncio.gather(*writes)
    assert wire.body == b"".join(b"data: %d\n\n" % i for i in range(5))


# -- keeping alive ---------------------------------------------------------------------------------------------------


async def until(wire: Wire, text: bytes, times: int) -> None:
    while wire.body.count(text) < times:
        wire.news.clear()
        await wire.news.wait()


async def test_the_first_comment_opens_with_200() -> None:
    wire = Wire()
    one = client(wire)
    keepalive = KeepAlive(one, 0.01)
    assert not one.headers_sent
    await until(wire, b": keepalive\n\n", 3)
    keepalive.stop()
    assert wire.status == 200
    assert wire.headers[b"content-type"].startswith(b"text/event-stream")
    await one.fail(OOM)
    assert wire.body.endswith(b"data: [DONE]\n\n")


async def test_what_it_waits_for_is_told_while_it_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "HEADERS_HELD", 0.05)
    monkeypatch.setattr(client_module, "WAIT_INTERVAL", 0.01)
    wire, seconds = Wire(), iter(range(1000))
    one = client(wire)
    loop = asyncio.get_running_loop()
    one.keepalive, began = KeepAlive(one, 3600.0), loop.time()
    stop = one.waits(lambda: f"loading, {next(seconds)} s so far")
    await until(wire, b": loading, ", 3)
    assert loop.time() - began >= 0.05, "until then a refusal has a status of its own"
    assert wire.body.startswith(b": loading, 0 s so far\n\n: loading, 1 s so far\n\n")
    stop()
    told = wire.body.count(b": ")
    other = one.waits(lambda: "busy")
    await until(wire, b": busy\n\n", 2)
    other()
    one.keepalive.stop()
    assert wire.body.count(b": loading") == told, "what is over is told no more"


async def test_without_comments_nothing_is_told() -> None:
    wire = Wire()
    client(wire).waits(lambda: "busy")()
    assert not wire.messages


async def test_it_never_writes_after_the_end() -> None:
    wire = Wire()
    one = client(wire)
    keepalive = KeepAlive(one, 0.005)
    await one.write(b"data: 1\n\n")
    await until(wire, b": keepalive\n\n", 1)
    await one.finish()
    count = len(wire.messages)
    one.last_sent = keepalive._started_at = float("-inf")  # nothing went out for ever so long
    keepalive._tick()
    keepalive._timer.cancel()
    assert keepalive._sending is not None
    await keepalive._sending
    assert len(wire.messages) == count


async def test_stop_ends_a_comment_that_waits_for_a_slow_client() -> None:
    wire = Wire()
    one = client(wire)
    await one.write(b"data: 1\n\n")
    wire.limiter = asyncio.Event()
    wire.knocked.clear()
    keepalive = KeepAlive(one, 0.001)
    await wire.knocked.wait()
    sending = keepalive._sending
    assert sending is not None
    keepalive.stop()
    await asyncio.wait({sending})
    assert sending.cancelled()
    wire.limiter.set()
    await one.finish()
    assert wire.body == b"data: 1\n\n"


async def test_only_one_comment_at_a_time_waits_for_a_slow_client() -> None:
    wire = Wire()
    one = client(wire)
    await one.write(b"data: 1\n\n")
    wire.limiter = asyncio.Event()
    wire.knocked.clear()
    keepalive = KeepAlive(one, 0.001)
    await wire.knocked.wait()
    sending = keepalive._sending
    assert sending is not None
    for _ in range(3):
        keepalive._tick()
    assert keepalive._sending is sending
    keepalive.stop()
    wire.limiter.set()


async def test_a_client_that_does_not_read_is_looked_at_no_more_often() -> None:
    wire = Wire()
    one = client(wire)
    await one.write(b"data: 1\n\n")
    wire.limiter = asyncio.Event()
    keepalive = KeepAlive(one, 3600.0)
    for _ in range(2):  # the first comment is stuck when the second tick comes
        one.last_sent = keepalive._started_at = float("-inf")
        keepalive._timer.cancel()
        keepalive._tick()
        await asyncio.sleep(0)
        assert keepalive._timer.when() > asyncio.get_running_loop().time() + 3000
    keepalive.stop()


async def test_who_was_just_written_to_needs_no_comment() -> None:
    wire = Wire()
    one = client(wire)
    keepalive = KeepAlive(one, 3600.0)
    await one.write(b"data: 1\n\n")
    keepalive._tick()
    keepalive.stop()
    assert keepalive._sending is None
    assert wire.body == b"data: 1\n\n"


async def test_stop_before_the_first_comment() -> None:
    wire = Wire()
    keepalive = KeepAlive(client(wire), 0.001)
    keepalive.stop()
    assert keepalive._timer.cancelled()
    assert wire.messages == []

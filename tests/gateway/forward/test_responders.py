"""The three ways of answering, fed by exchanges of every sort: what goes out, when, and what may still be tried."""

import json
from collections.abc import Sequence
from typing import Any

import pytest
from starlette.types import Message

from backends.upstream.exchange import ExchangeError, Fault, Head, Offer
from gateway.api.kinds import Kind
from gateway.forward.responders import COMMENTS_AFTER, Assembled, Responder, Streamed, Whole, responder_for
from gateway.http.client import ClientConnection
from gateway.request import ParsedRequest, parse
from gateway.stream.aggregate import MAX_ANSWER
from gateway.stream.interpreter import Completeness
from gateway.stream.relay import Seen
from gateway.stream.unstreamed import UnstreamedAnswer

RESET = ExchangeError(Fault.RESET, "reset by peer")
COMMENT = b": keepalive 1/2\n\n"
DONE = b"data: [DONE]\n\n"


def chunk(delta: dict[str, Any], finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return b"data: " + json.dumps({"id": "c1", "created": 7, "model": "x", "choices": [choice]}).encode() + b"\n\n"


ROLE, HEL, LO, STOP = (
    chunk({"role": "assistant"}),
    chunk({"content": "Hel"}),
    chunk({"content": "lo"}),
    chunk({}, "stop"),
)
USAGE = b'data: {"id": "c1", "choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}\n\n'


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Upstream:
    """Gives its parts one by one; ``clock`` moves by ``each`` before every one. An error among them is raised."""

    def __init__(self, parts: Sequence[bytes | ExchangeError], clock: Clock | None = None, each: float = 0.0) -> None:
        self.last_heard = 0.0
        self.pieces = 0
        self.local_port = 0
        self.waiting_since = 0.0
        self.left = list(parts)
        self._clock = clock
        self._each = each

    async def start(self) -> Head:
        return Head(200, ())

    async def read(self, offer: Offer | None = None) -> bytes:
        while True:
            if self._clock is not None:
                self._clock.now += self._each
            if not self.left:
                return b""
            part = self.left.pop(0)
            if isinstance(part, ExchangeError):
                raise part
            if offer is None or not offer(part):
                return part

    def abort(self, error: ExchangeError) -> None:
        pass

    def close(self) -> None:
        pass


class Scene:
    """A client, a clock, and the reply between them and an upstream."""

    def __init__(self, *, remember: bool = False, **request: Any) -> None:
        self.sent: list[Message] = []
        self.clock = Clock()
        self.parsed = parsed(**request)
        scope = {"type": "http", "headers": []}
        self.client = ClientConnection(scope, self._receive, self._send, "req-1")
        self.responder: Responder = responder_for(self.client, self.parsed, self.clock, remember=remember)
        self.responder.attempt("public")

    async def _receive(self) -> Message:
        raise AssertionError("the body was read already")

    async def _send(self, message: Message) -> None:
        self.sent.append(message)

    @property
    def body(self) -> bytes:
        return b"".join(m["body"] for m in self.sent[1:])

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    def over(self) -> bool:
        return bool(self.sent) and not self.sent[-1].get("more_body", True)


def parsed(**request: Any) -> ParsedRequest:
    body = {"model": "public", "messages": [{"role": "user", "content": "hi"}], **request}
    return parse(json.dumps(body).encode(), Kind.CHAT)


def texts(body: bytes) -> str:
    events = [json.loads(e.removeprefix(b"data: ")) for e in body.split(b"\n\n") if e.startswith(b"data: {")]
    return "".join(c["delta"].get("content") or "" for event in events for c in event["choices"])


@pytest.mark.parametrize(
    ("request_", "expected", "streams"),
    [
        ({"stream": True}, Streamed, True),
        ({"stream": True, "logprobs": True}, Streamed, True),
        ({}, Assembled, True),
        ({"logprobs": True}, Whole, False),
    ],
)
async def test_how_each_request_is_answered(request_: dict[str, Any], expected: type, streams: bool) -> None:
    responder = Scene(**request_).responder
    assert type(responder) is expected
    assert (responder.upstream_streams, responder.seen, responder.first_content_at, responder.usage) == (
        streams,
        Seen.WAITING,
        None,
        None,
    )


# -- Streamed --------------------------------------------------------------------------------------------------------


async def test_a_stream_is_sent_as_it_comes() -> None:
    scene = Scene(stream=True)
    end = await scene.responder.take(Upstream([ROLE, HEL, LO, STOP, USAGE, DONE], scene.clock, each=1.0))
    assert end.verdict is Completeness.COMPLETE
    assert scene.responder.first_content_at == 102.0
    assert scene.responder.seen is Seen.DONE
    assert not scene.over()
    await scene.responder.deliver(end.data)
    assert scene.over()
    assert texts(scene.body) == "Hello"
    assert scene.body.endswith(DONE)
    assert scene.responder.usage == {"prompt_tokens": 3, "completion_tokens": 2}


async def test_what_a_stream_lacks_is_delivered() -> None:
    scene = Scene(stream=True)
    end = await scene.responder.take(Upstream([HEL, STOP]))
    assert (end.verdict, end.data) == (Completeness.COMPLETE, DONE)
    await scene.responder.deliver(end.data)
    assert scene.body.endswith(DONE)


async def test_what_comes_after_done_is_not_read() -> None:
    scene = Scene(stream=True)
    upstream = Upstream([HEL, DONE, LO])
    await scene.responder.take(upstream)
    assert upstream.left == [LO]


async def test_the_last_of_a_stream_is_left_to_the_delivery() -> None:
    """So that the slot can be given back first: the upstream has ended."""
    scene = Scene(stream=True)
    end = await scene.responder.take(Upstream([HEL, LO + STOP + USAGE + DONE]))
    assert (end.verdict, texts(scene.body), texts(end.data)) == (Completeness.COMPLETE, "Hel", "lo")
    scene = Scene(stream=True)
    end = await scene.responder.take(UnstreamedAnswer(Upstream([json.dumps(WHOLE).encode()]), Kind.CHAT))
    assert (end.verdict, scene.sent, texts(end.data)) == (Completeness.COMPLETE, [], "Hi")


@pytest.mark.parametrize("parts", [[], [COMMENT], [ROLE], [ROLE, COMMENT, RESET], [b'data: {"choices"']])
async def test_an_attempt_without_content_leaves_no_trace(parts: list[bytes | ExchangeError]) -> None:
    scene = Scene(stream=True)
    try:
        await scene.responder.take(Upstream(parts))
    except ExchangeError:
        assert parts[-1] is RESET
    assert scene.responder.end().verdict is Completeness.TRUNCATED
    assert scene.sent == []
    assert scene.responder.seen is Seen.WAITING
    scene.responder.attempt("other")
    end = await scene.responder.take(Upstream([HEL, LO, STOP, DONE]))
    await scene.responder.deliver(end.data)
    assert texts(scene.body) == "Hello"
    assert b'"other"' in scene.body


async def test_comments_of_a_quick_answer_do_not_commit_to_a_200() -> None:
    scene = Scene(stream=True)
    await scene.responder.take(Upstream([COMMENT] * 4, scene.clock, each=COMMENTS_AFTER / 8))
    assert scene.sent == []


async def test_comments_of_a_slow_one_do_and_another_attempt_is_still_possible() -> None:
    scene = Scene(stream=True)
    await scene.responder.take(Upstream([COMMENT, COMMENT], scene.clock, each=COMMENTS_AFTER))
    assert scene.body == COMMENT * 2
    assert scene.responder.seen is Seen.OPEN
    assert scene.responder.first_content_at is None
    scene.responder.attempt("public")
    end = await scene.responder.take(Upstream([COMMENT, HEL, STOP, DONE]))  # open already: comments pass at once
    await scene.responder.deliver(end.data)
    assert scene.body.count(COMMENT) == 3
    assert texts(scene.body) == "Hel"


async def test_when_the_first_content_came() -> None:
    """Beside a comment, in the same chunk, it counts; a role, or a comment alone, does not."""
    scene = Scene(stream=True)
    await scene.responder.take(Upstream([ROLE, COMMENT, COMMENT + HEL, LO, STOP, DONE], scene.clock, each=1.0))
    assert scene.responder.first_content_at == 103.0
    for parts in ([ROLE], [COMMENT], []):
        scene = Scene(stream=True)
        await scene.responder.take(Upstream(parts))
        assert scene.responder.first_content_at is None


async def test_a_stream_that_breaks_after_its_content() -> None:
    scene = Scene(stream=True)
    with pytest.raises(ExchangeError):
        await scene.responder.take(Upstream([HEL, RESET]))
    assert scene.responder.end().verdict is Completeness.TRUNCATED
    assert scene.responder.seen is Seen.SPEAKING
    with pytest.raises(RuntimeError):
        scene.responder.attempt("public")


async def test_a_stream_that_breaks_after_its_finish_reason_was_whole() -> None:
    scene = Scene(stream=True)
    with pytest.raises(ExchangeError):
        await scene.responder.take(Upstream([HEL, STOP, RESET]))
    end = scene.responder.end()
    assert end.verdict is Completeness.COMPLETE
    await scene.responder.deliver(end.data)
    assert scene.body.endswith(DONE)
    assert scene.over()


async def test_how_long_another_would_take_to_come_as_far() -> None:
    """The waits for what came; not for what did not, nor the time that the client took to take it."""
    scene = Scene(stream=True, remember=True)

    async def slow(message: Message) -> None:
        scene.sent.append(message)
        scene.clock.now += 1000.0

    scene.client._send = slow
    scene.clock.now += 3.0  # until the head of the answer
    with pytest.raises(ExchangeError):
        await scene.responder.take(Upstream([ROLE, COMMENT, HEL, LO, RESET], scene.clock, each=1.0))
    assert scene.responder.catch_up == 7.0
    assert (
        Scene(stream=True).responder.catch_up,
        Scene().responder.catch_up,
        Scene(logprobs=True).responder.catch_up,
    ) == (
        None,
        None,
        None,
    )


async def test_an_error_event_ends_the_reading() -> None:
    scene = Scene(stream=True)
    upstream = Upstream([HEL + b'data: {"error": {"message": "broken", "code": "backend_oom"}}\n\n', LO])
    end = await scene.responder.take(upstream)
    assert end.verdict is Completeness.FAILED
    assert end.error is not None
    assert end.error.code == "backend_oom"
    assert texts(scene.body) == "Hel"
    assert upstream.left == [LO]


# -- Assembled -------------------------------------------------------------------------------------------------------


async def test_a_stream_becomes_one_answer() -> None:
    scene = Scene()
    end = await scene.responder.take(Upstream([COMMENT, HEL, LO, STOP, USAGE, DONE], scene.clock, each=1.0))
    assert (end.verdict, scene.sent) == (Completeness.COMPLETE, [])
    assert scene.responder.first_content_at == 102.0
    assert scene.responder.seen is Seen.WAITING
    await scene.responder.deliver(end.data)
    assert scene.over()
    answer = scene.json
    assert (answer["model"], answer["object"]) == ("public", "chat.completion")
    assert answer["choices"][0]["message"]["content"] == "Hello"
    assert answer["usage"] == scene.responder.usage == {"prompt_tokens": 3, "completion_tokens": 2}


async def test_nothing_of_a_failed_attempt_is_in_the_answer() -> None:
    scene = Scene()
    with pytest.raises(ExchangeError):
        await scene.responder.take(Upstream([HEL, RESET], scene.clock, each=1.0))
    assert scene.responder.end().verdict is Completeness.TRUNCATED
    assert scene.responder.seen is Seen.WAITING
    scene.responder.attempt("other")
    assert scene.responder.first_content_at is None
    end = await scene.responder.take(Upstream([LO, STOP, DONE]))
    await scene.responder.deliver(end.data)
    assert scene.json["choices"][0]["message"]["content"] == "lo"
    assert scene.json["model"] == "other"


# -- Whole -----------------------------------------------------------------------------------------------------------

WHOLE = {
    "id": "c1",
    "model": "x",
    "choices": [
        {"index": 0, "message": {"role": "assistant", "content": "Hi"}, "finish_reason": "stop", "logprobs": {}}
    ],
    "usage": {"prompt_tokens": 3, "completion_tokens": 1},
}


async def test_an_answer_in_one_piece() -> None:
    scene = Scene(logprobs=True)
    data = json.dumps(WHOLE).encode()
    end = await scene.responder.take(Upstream([data[:9], data[9:]], scene.clock, each=1.0))
    assert (end.verdict, scene.responder.first_content_at) == (Completeness.COMPLETE, 103.0)
    await scene.responder.deliver(end.data)
    assert scene.json == {**WHOLE, "model": "public", "object": "chat.completion"}
    assert scene.responder.usage == WHOLE["usage"]


@pytest.mark.parametrize(
    "body",
    [b"", b"{", json.dumps(WHOLE).encode()[:-1], b"[]", b"{}", b'{"choices": [{"finish_reason": null}]}', b'"x"'],
)
async def test_half_an_answer_is_none(body: bytes) -> None:
    scene = Scene(logprobs=True)
    end = await scene.responder.take(Upstream([body]))
    assert end.verdict is Completeness.TRUNCATED
    assert scene.responder.end() == end
    assert scene.sent == []


async def test_an_error_with_status_200() -> None:
    scene = Scene(logprobs=True)
    end = await scene.responder.take(Upstream([b'{"error": "broken"}']))
    assert end.verdict is Completeness.FAILED
    assert end.error is not None
    assert end.error.message == "broken"
    scene.responder.attempt("public")
    assert scene.responder.end().verdict is Completeness.TRUNCATED


async def test_an_answer_that_breaks_off() -> None:
    scene = Scene(logprobs=True)
    with pytest.raises(ExchangeError):
        await scene.responder.take(Upstream([b'{"choices"', RESET]))
    assert scene.responder.end().verdict is Completeness.TRUNCATED


async def test_an_answer_without_end_is_stopped() -> None:
    scene = Scene(logprobs=True)
    upstream = Upstream([b"x" * (MAX_ANSWER // 2 + 1)] * 5)
    with pytest.raises(ExchangeError) as caught:
        await scene.responder.take(upstream)
    assert caught.value.fault is Fault.PROTOCOL
    assert len(upstream.left) == 3


async def test_usage_that_is_no_object_is_none() -> None:
    scene = Scene(logprobs=True)
    await scene.responder.take(Upstream([json.dumps({**WHOLE, "usage": 5}).encode()]))
    assert scene.responder.usage is None

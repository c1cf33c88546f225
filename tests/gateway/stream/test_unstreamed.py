"""Answers in one piece, given on as the stream they should have been: read back by what reads streams."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.upstream.exchange import ExchangeError, Fault, Head, Offer
from gateway.api.kinds import Kind
from gateway.stream.aggregate import Aggregator
from gateway.stream.interpreter import Completeness, End
from gateway.stream.relay import Relay
from gateway.stream.unstreamed import UnstreamedAnswer, as_stream, is_unstreamed, read_whole

USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
CALL = {"id": "c", "type": "function", "function": {"name": "look_up", "arguments": '{"word": "x"}'}}


class Source:
    """Gives its parts one by one; an error among them is raised."""

    def __init__(self, *parts: bytes | ExchangeError) -> None:
        self.left = list(parts)

    async def read(self, _offer: Offer | None = None) -> bytes:
        part = self.left.pop(0) if self.left else b""
        if isinstance(part, ExchangeError):
            raise part
        return part


def completion(message: object, finish: str | None = "stop", **more: Any) -> bytes:
    choice = {"index": 0, "message": message, "finish_reason": finish}
    head = {"id": "c1", "object": "chat.completion", "created": 7, "model": "theirs"}
    return json.dumps({**head, "choices": [choice], "usage": USAGE, **more}).encode()


def assembled(body: bytes, kind: Kind = Kind.CHAT) -> tuple[End, dict[str, Any]]:
    """How it ended, and the answer if it is whole."""
    assembler = Aggregator(kind, "ours")
    assembler.attempt("ours")
    assembler.feed(as_stream(body, kind))
    end = assembler.end()
    return end, assembler.answer() if end.verdict is Completeness.COMPLETE else {}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (b"application/json", True),
        (b"application/json; charset=utf-8", True),
        (b"Application/JSON", True),
        (b"text/event-stream", False),
        (b"", False),
        (b"application/x-ndjson", False),
    ],
)
def test_what_is_in_one_piece(given: bytes, expected: bool) -> None:
    assert is_unstreamed(Head(200, ((b"content-type", given),))) is expected


# -- answers -----------------------------------------------------------------------------------------------------------


def test_a_chat_is_put_together_again_as_it_was() -> None:
    end, answer = assembled(completion({"role": "assistant", "content": "Hello", "reasoning": "hm"}))
    assert end.verdict is Completeness.COMPLETE
    (choice,) = answer["choices"]
    assert (choice["message"]["content"], choice["message"]["reasoning"]) == ("Hello", "hm")
    assert choice["finish_reason"] == "stop"
    assert (answer["id"], answer["created"], answer["model"], answer["usage"]) == ("c1", 7, "ours", USAGE)
    assert answer["object"] == "chat.completion"


def test_a_chat_as_a_stream() -> None:
    relay = Relay(Kind.CHAT, "ours", include_usage=True)
    out = relay.feed(as_stream(completion({"role": "assistant", "content": "Hello"}), Kind.CHAT))
    end = relay.end()
    events = [json.loads(e[6:]) for e in (out.data + end.data).decode().split("\n\n")[:-1] if e != "data: [DONE]"]
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": "Hello"}
    assert events[-1]["usage"] == USAGE
    assert (out.data + end.data).endswith(b"data: [DONE]\n\n")
    assert all("message" not in choice for event in events for choice in event["choices"])


def test_tool_calls_are_counted() -> None:
    message = {"role": "assistant", "content": None, "tool_calls": [CALL, {**CALL, "id": "d"}, {**CALL, "index": 2}]}
    relay = Relay(Kind.CHAT, "ours")
    (event,) = [
        json.loads(line[6:])
        for line in relay.feed(as_stream(completion(message, "tool_calls"), Kind.CHAT)).data.decode().splitlines()
        if line.startswith("data: {")
    ]
    assert [call["index"] for call in event["choices"][0]["delta"]["tool_calls"]] == [0, 1, 2]
    end, answer = assembled(completion(message, "tool_calls"))
    assert end.verdict is Completeness.COMPLETE
    calls = answer["choices"][0]["message"]["tool_calls"]
    assert [(call["id"], call["function"]) for call in calls] == [(i, CALL["function"]) for i in "cdc"]


def test_two_choices() -> None:
    choices = [
        {"index": i, "message": {"role": "assistant", "content": word}, "finish_reason": "stop"}
        for i, word in enumerate(("one", "two"))
    ]
    _, answer = assembled(completion({}, choices=choices))
    assert [choice["message"]["content"] for choice in answer["choices"]] == ["one", "two"]


def test_a_text_completion() -> None:
    body = {"object": "text_completion", "choices": [{"index": 0, "text": "Hello", "finish_reason": "length"}]}
    end, answer = assembled(json.dumps(body).encode(), Kind.COMPLETION)
    assert end.verdict is Completeness.COMPLETE
    assert (answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]) == ("Hello", "length")


@pytest.mark.parametrize("kind", list(Kind))
@pytest.mark.parametrize(
    "body",
    [
        b'{"error": {"message": "sorry", "code": "overloaded"}}',
        b'{"error": "sorry"}',
        b'{"error": {"message": "sorry"}, "choices": null}',
        b'{"choices": [{"index": 0, "finish_reason": "error", "error": {"message": "sorry"}}]}',
    ],
)
def test_the_text_of_an_error_is_kept(body: bytes, kind: Kind) -> None:
    end, _ = assembled(body, kind)
    assert end.verdict is Completeness.FAILED
    assert end.error is not None
    assert (end.error.message, end.error.protocol) == ("sorry", False)


@pytest.mark.parametrize("kind", list(Kind))
def test_the_text_of_a_flat_error_is_kept(kind: Kind) -> None:
    end, _ = assembled(b'{"object": "error", "message": "sorry"}', kind)
    assert end.verdict is Completeness.FAILED
    assert end.error is not None
    assert end.error.message == "sorry"


def test_an_answer_without_a_finish_is_not_whole() -> None:
    assert assembled(completion({"role": "assistant", "content": "Hel"}, None))[0].verdict is Completeness.TRUNCATED


# -- what is none ------------------------------------------------------------------------------------------------------

NONE = [b"", b"{", b"[]", b"null", b"7", b'"text"', b"\xff\xfe", b"<html>", b"[" * 100_000, b'{"choices": []}', b"{}"]


@pytest.mark.parametrize("kind", list(Kind))
@pytest.mark.parametrize("body", NONE)
def test_what_is_no_answer_ends_as_a_stream_without_an_end(body: bytes, kind: Kind) -> None:
    assert assembled(body, kind)[0].verdict in (Completeness.TRUNCATED, Completeness.EMPTY)


@pytest.mark.parametrize("kind", list(Kind))
@pytest.mark.parametrize("choices", ["text", {"a": 1}, [7], [[]], [{"index": "0"}], [{"message": "text"}]])
def test_choices_that_make_no_sense(choices: object, kind: Kind) -> None:
    end, _ = assembled(json.dumps({"choices": choices}).encode(), kind)
    assert end.verdict in (Completeness.FAILED, Completeness.TRUNCATED)


def test_choices_that_are_a_number() -> None:
    assert assembled(b'{"choices": 7}')[0].verdict is Completeness.FAILED


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
MESSAGES = st.fixed_dictionaries({}, optional={"role": VALUES, "content": VALUES, "tool_calls": VALUES})
CHOICES = st.fixed_dictionaries(
    {}, optional={"index": VALUES, "message": MESSAGES | VALUES, "text": VALUES, "finish_reason": VALUES}
)


@given(
    body=st.fixed_dictionaries(
        {}, optional={"choices": st.lists(CHOICES | VALUES, max_size=3), "usage": VALUES, "error": VALUES}
    ),
    kind=st.sampled_from(list(Kind)),
)
def test_whatever_comes_is_an_answer_or_said_to_be_none(body: dict[str, Any], kind: Kind) -> None:
    end, answer = assembled(json.dumps(body).encode(), kind)
    assert (end.verdict is Completeness.COMPLETE) == bool(answer)
    assert (end.verdict is Completeness.FAILED) == (end.error is not None)


# -- reading -----------------------------------------------------------------------------------------------------------


async def test_it_is_read_once_and_then_at_its_end() -> None:
    body = completion({"content": "x"})
    one = UnstreamedAnswer(Source(body[:9], body[9:]), Kind.CHAT)
    assert await one.read() == as_stream(body, Kind.CHAT)
    assert await one.read() == b""
    assert await one.read() == b""


async def test_what_breaks_is_broken() -> None:
    reset = ExchangeError(Fault.RESET, "reset by peer")
    with pytest.raises(ExchangeError) as caught:
        await UnstreamedAnswer(Source(b"{", reset), Kind.CHAT).read()
    assert caught.value is reset


async def test_too_large() -> None:
    source = Source(b'{"a": 1}  ', b"x", b"never read")
    with pytest.raises(ExchangeError) as caught:
        await read_whole(source, 10)
    assert (caught.value.fault, "10 bytes" in caught.value.detail) == (Fault.PROTOCOL, True)
    assert source.left == [b"never read"]
    assert await read_whole(Source(b'{"a": 1}  '), 10) == b'{"a": 1}  ', "the limit itself is allowed"

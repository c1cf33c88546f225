"""Chunks told by their bytes: what is passed so means what it would mean parsed, whatever stands in it."""

import itertools
import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gateway.api.kinds import Kind
from gateway.stream.aggregate import Aggregator
from gateway.stream.relay import Relay
from gateway.stream.template import MARK, Repeats, template_of


def chunk(text: str = "word", *, kind: Kind = Kind.CHAT, field: str = "content", ascii_only: bool = True) -> bytes:
    """As mlx_lm.server writes it."""
    told: dict[str, Any] = {"text": text} if kind is Kind.COMPLETION else {"delta": {"role": "assistant", field: text}}
    choices = [{"index": 0, "finish_reason": None, **told}]
    body = {"id": "chatcmpl-1", "model": "default_model", "created": 7, "choices": choices}
    return json.dumps(body, ensure_ascii=ascii_only).encode()


def event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"


KINDS = [(Kind.CHAT, "content"), (Kind.CHAT, "reasoning"), (Kind.CHAT, "refusal"), (Kind.COMPLETION, "text")]


@pytest.mark.parametrize(("kind", "field"), KINDS)
@pytest.mark.parametrize(
    "text", ["", "x", '"content": "', "\\", '\\"', "\n\n", "data: [DONE]", "ä☃😀\u2028", MARK.decode()]
)
def test_a_chunk_that_differs_in_its_text_only(kind: Kind, field: str, text: str) -> None:
    template = template_of(chunk(kind=kind, field=field), kind)
    assert template is not None
    assert template.field == field
    repeats = template.run([b"data: " + chunk(text, kind=kind, field=field)])
    assert repeats is not None
    assert repeats.texts == [text]
    assert template.like(repeats.escaped[0]) == json.loads(chunk(text, kind=kind, field=field))


@pytest.mark.parametrize(
    "other",
    [
        chunk().replace(b"null", b'"stop"'),
        chunk().replace(b'"created": 7', b'"created": 8'),
        chunk().replace(b'"word"', b'"word", "tool_calls": []'),
        chunk().replace(b'"word"', b'"a\\ud83d"'),  # half an emoji: legal to json, not to orjson
        chunk().replace(b'"word"', b'"a\nb"'),
        chunk().replace(b'"word"', b'"\xff"'),
        chunk().replace(b'"word"', b'"a", "content": "b"'),
        chunk().replace(b'"word"', b'"'),  # the quote before the text and the one after it are the same
        chunk().replace(b'"word"', b"null"),
        b"[DONE]",
        b"",
    ],
)
def test_anything_else_has_to_be_parsed(other: bytes) -> None:
    template = template_of(chunk(), Kind.CHAT)
    assert template is not None
    like = b"data: " + chunk("a")
    for raw in (b"data: " + other, b": " + other):
        assert template.run([raw]) is None
        assert template.run([like, like, raw, like]) == Repeats(template, ["a"] * 2, [b"a"] * 2)
        assert template.run([raw, like], 1) == Repeats(template, ["a"], [b"a"])


@pytest.mark.parametrize("choice", [{"index": 0}, {"index": 0, "delta": None}])
def test_a_chunk_without_a_delta_makes_no_stamp(choice: dict[str, object]) -> None:
    bare = json.dumps({"choices": [choice]}).encode()
    assert template_of(bare, Kind.CHAT) is None
    relay = Relay(Kind.CHAT, "m")
    relay.feed(b"data: " + chunk() + b"\n\n")
    assert relay.feed(b"data: " + bare + b"\n\n").failure is None


def test_texts_that_would_pass_only_together_do_not_pass() -> None:
    """In one list these are three values too, the second a list of its own."""
    template = template_of(chunk(), Kind.CHAT)
    assert template is not None
    raws = [b"data: " + chunk().replace(b"word", part) for part in (b'a",["b', b"c", b'd"],"e')]
    assert template.run(raws) is None
    assert template.run(raws[1:]) == Repeats(template, ["c"], [b"c"])


@pytest.mark.parametrize(
    "data",
    [
        chunk().replace(b"null", b'"stop"'),
        chunk().replace(b'"index": 0', b'"index": 1'),
        chunk().replace(b'"word"', b'"word", "reasoning": "more"'),
        chunk().replace(b'"word"', b'"word", "tool_calls": [{"index": 0, "function": {"name": "f"}}]'),
        chunk().replace(b'"created": 7', b'"created": 7, "usage": {"prompt_tokens": 1}'),
        chunk().replace(b'"created": 7', b'"created": 7, "error": null'),
        chunk().replace(b'"finish_reason": null', b'"finish_reason": null, "logprobs": {"content": []}'),
        chunk().replace(b'"choices": [', b'"choices": [{"index": 1, "delta": {}}, '),
        chunk().replace(b'"created"', b'\n"created"'),
        chunk(""),
        json.dumps({"choices": []}).encode(),
    ],
)
def test_what_makes_no_stamp(data: bytes) -> None:
    assert template_of(data, Kind.CHAT) is None


def test_the_text_is_found_where_it_is_and_not_where_its_name_stands_too() -> None:
    twice = chunk().replace(b'"created": 7', b'"created": 7, "content": "word"')
    template = template_of(twice, Kind.CHAT)
    assert template is not None
    assert template.like(b"other")["choices"][0]["delta"]["content"] == "other"
    assert template.like(b"other")["content"] == "word"


texts = st.lists(st.text(max_size=8), min_size=1, max_size=12)
ENDING = event(chunk("").replace(b"null", b'"stop"')) + b"data: [DONE]\n\n"


@pytest.mark.parametrize(("kind", "field"), KINDS)
@given(said=texts, cuts=st.lists(st.integers(0, 4000), max_size=6), ascii_only=st.booleans())
@example(said=["a", "b", "c"], cuts=[], ascii_only=True)
def test_the_client_gets_the_same_with_stamps_and_without(  # noqa: PLR0917 - by name, all of them
    kind: Kind, field: str, said: list[str], cuts: list[int], ascii_only: bool
) -> None:
    """The other way: parsed one by one, since ``created`` differs in every chunk."""
    ending = event(chunk("", kind=kind, field=field).replace(b"null", b'"stop"')) + b"data: [DONE]\n\n"
    same = [event(chunk(text, kind=kind, field=field, ascii_only=ascii_only)) for text in said]
    differ = [one.replace(b'"created": 7', b'"created": %d' % (7 + i)) for i, one in enumerate(same)]
    assert texts_of(pieces(b"".join(same) + ending, cuts), kind, field) == said_of(said)
    assert texts_of(pieces(b"".join(differ) + ending, cuts), kind, field) == said_of(said)


def pieces(stream: bytes, cuts: list[int]) -> list[bytes]:
    bounds = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    return [stream[a:b] for a, b in itertools.pairwise(bounds)]


def texts_of(parts: list[bytes], kind: Kind, field: str) -> tuple[str, str]:
    """What a client reads: from the stream, and from the answer in one piece."""
    relay, assembler = Relay(kind, "public"), Aggregator(kind, "public")
    out = b""
    for part in parts:
        out += relay.feed(part).data
        assembler.feed(part)
    events = [json.loads(line[6:]) for line in out.split(b"\n\n") if line and line != b"data: [DONE]"]
    assert {one["model"] for one in events} == {"public"}
    assert [one["choices"][0]["finish_reason"] for one in events][-1] == "stop"
    choice = assembler.answer()["choices"][0]
    whole = choice["text"] if kind is Kind.COMPLETION else choice["message"].get(field, "")
    if kind is Kind.CHAT:
        roles = [one["choices"][0]["delta"].get("role") for one in events]
        assert roles == ["assistant", *[None] * (len(roles) - 1)]
        return "".join(one["choices"][0]["delta"].get(field, "") for one in events), whole
    return "".join(one["choices"][0]["text"] for one in events), whole


def said_of(said: list[str]) -> tuple[str, str]:
    return "".join(said), "".join(said)


@pytest.mark.parametrize("kind", Kind)
def test_chunks_whose_choice_has_no_index_are_of_the_first(kind: Kind) -> None:
    """Some servers leave it out."""
    told: dict[str, Any] = {"text": "a"} if kind is Kind.COMPLETION else {"delta": {"content": "a"}}
    data = event(json.dumps({"id": "1", "created": 7, "choices": [told]}).encode())
    relay, aggregator = Relay(kind, "public"), Aggregator(kind, "public")
    for _ in range(3):
        sent = relay.feed(data).data
        aggregator.feed(data)
        (choice,) = json.loads(sent.removeprefix(b"data: "))["choices"]
        assert choice["index"] == 0
    (answer,) = aggregator.answer()["choices"]
    assert (answer["message"]["content"] if kind is Kind.CHAT else answer["text"]) == "aaa"

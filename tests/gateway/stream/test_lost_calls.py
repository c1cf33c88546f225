"""Which answers lack a tool call, and which only talk about one."""

import json
import time
from typing import Any

import pytest

from gateway.api.kinds import Kind
from gateway.stream.interpreter import Completeness
from gateway.stream.lost_calls import MIN_WITHHELD, Doubt, Ending, cut_off, doubt, ends_in_markup
from gateway.stream.relay import Relay, Seen


@pytest.mark.parametrize(
    ("ending", "expected"),
    [
        (Ending("stop", said=True, withheld=50), Doubt.NONE),  # thoughts and marks are not text
        (Ending("stop", said=False, withheld=50), Doubt.NONE),
        (Ending("length", said=True, withheld=0), Doubt.NONE),
        (Ending("length", said=True, withheld=1), Doubt.NONE),
        (Ending("length", said=True, withheld=2), Doubt.ASK_LOG),
        (Ending("length", said=True, withheld=None), Doubt.ASK_LOG),
        (Ending("max_tokens", said=False, withheld=None), Doubt.ASK_LOG),
        (Ending("length", said=False, withheld=MIN_WITHHELD - 1), Doubt.ASK_LOG),
        (Ending("length", calls=True, withheld=90), Doubt.ASK_LOG_IF_ALONE),
        (Ending("tool_calls", calls=True), Doubt.ASK_LOG_IF_ALONE),
        (Ending("stop", said=True, markup=True), Doubt.LOST),
        (Ending("tool_calls", calls=True, said=True, markup=True), Doubt.ASK_LOG_IF_ALONE),
        (Ending(None, said=True), Doubt.NONE),
        (
            Ending("stop", said=True, hollow=True),
            Doubt.NONE,
        ),  # others open with a chunk without text, or beat with them
    ],
)
def test_what_an_ending_says(ending: Ending, expected: Doubt) -> None:
    assert doubt(ending, is_mlx=False) is expected
    assert doubt(ending, is_mlx=True) is (Doubt.LOST if ending.hollow else expected)


def test_an_answer_that_was_withheld_whole() -> None:
    """Other servers hide the thoughts of a model, and count them."""
    ending = Ending("length", said=False, withheld=MIN_WITHHELD)
    assert (doubt(ending, is_mlx=True), doubt(ending, is_mlx=False)) == (Doubt.LOST, Doubt.NONE)


@pytest.mark.parametrize(
    ("ending", "expected"),
    [
        (Ending("tool_calls"), False),
        (Ending("length", withheld=20), True),
        (Ending("length", withheld=None), True),
        (Ending("length", withheld=20, hollow=True), False),
        (Ending("length", withheld=0, said=True, markup=True), True),
        (Ending("stop", withheld=0, said=True, markup=True), False),
        (Ending("length", withheld=20, calls=True), True),
        (Ending("length", withheld=0, calls=True), False),
    ],
)
def test_what_ended_a_lost_call(ending: Ending, expected: bool) -> None:
    assert cut_off(ending) is expected


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>\n{"name": "f", "argu',
        'I will look.\n\n<tool_call>{"name": "f", "arguments": {}}',
        "<tool_call>\n<function=f>\n<parameter=path>\n/etc",
        "<tool_call>f\n<arg_key>path</arg_key>",
        "  <|tool_call_start|>[f(a=1",
        "<function=f>{",
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0",
        '<tool_call>{"name": "f"}</tool_call>\n<tool_call>{"name": "g"',
        '```\nexample\n```\n<tool_call>{"name": "f"',
    ],
)
def test_a_call_that_is_not_closed(text: str) -> None:
    assert ends_in_markup(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "The model writes `<tool_call>` and then JSON.",
        "Calls begin with <tool_call>{ in this format.",
        "<tool_call> is how calls begin in this format.",
        "<tool_call>\n\nis the mark that",
        'For example:\n```\n<tool_call>\n{"name": "f"',
        '~~~xml\n<tool_call>{"name": "f"',
        '<tool_call>{"name": "f", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f"}</tool_call> and then <tool_call>',
        "if a < tool_call > b:\n    pass",
        "[TOOL_CALLS] f",
    ],
)
def test_talk_of_calls(text: str) -> None:
    assert not ends_in_markup(text)


def test_looking_for_markup_is_linear() -> None:
    began = time.perf_counter()
    for hostile in ("<tool_call>" + " " * 1_000_000, "\n<tool_call>\n" * 100_000, "<function=" * 100_000, "\t" * 10**6):
        ends_in_markup(hostile)
    assert time.perf_counter() - began < 2.0


def chunk(delta: dict[str, Any], finish: str | None = None, **more: Any) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return b"data: " + json.dumps({"id": "c", "choices": [choice], **more}).encode() + b"\n\n"


USAGE = b'data: {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 20, "total_tokens": 21}}\n\n'
DONE = b"data: [DONE]\n\n"


def test_the_finish_of_a_cut_answer_waits_for_its_end() -> None:
    """So that it can still be asked for again, or told."""
    one = Relay(Kind.CHAT, "public", tools=True)
    for part in (chunk({"role": "assistant"}), chunk({}, "length"), USAGE):
        assert one.feed(part).data == b""
        assert one.state is Seen.WAITING
    out = one.feed(DONE)
    assert (one.end().verdict, one.end().ending) == (Completeness.COMPLETE, Ending("length", withheld=20))
    assert [b'"finish_reason":"length"' in event for event in out.data.split(b"\n\n")[:-1]] == [False, True, False]
    one.retract(Seen.WAITING)
    one.attempt()  # allowed: nothing was delivered
    assert one.feed(chunk({"content": "a"})).data


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([chunk({"role": "assistant"}), chunk({"content": "a"})], False),
        ([chunk({"content": "a"}), chunk({"role": "assistant"})], True),
        ([chunk({"content": "a"}), b": beat\n\n", b"data:\n\n", USAGE], False),
    ],
)
def test_chunks_without_anything_in_them(parts: list[bytes], expected: bool) -> None:
    one = Relay(Kind.CHAT, "public", tools=True)
    for part in [*parts, chunk({}, "stop"), chunk({})]:
        one.feed(part)
    assert one.end().ending.hollow is expected


@pytest.mark.parametrize("last", [chunk({}, "stop"), chunk({"content": "b"}, "length")])
def test_other_ends_do_not_wait(last: bytes) -> None:
    one = Relay(Kind.CHAT, "public", tools=True)
    one.feed(chunk({"content": "a"}))
    assert b"finish_reason" in one.feed(last).data


def test_without_tools_nothing_waits() -> None:
    one = Relay(Kind.CHAT, "public")
    one.feed(chunk({"content": "a"}))
    assert one.feed(chunk({}, "length")).data
    assert not one.end().ending.markup


@pytest.mark.parametrize("reads", [1, 3, 1000])
def test_markup_is_found_however_it_is_split(reads: int) -> None:
    text = 'I will look.\n<tool_call>{"name": "look", "arguments": {"path": "/a'
    stream = b"".join(chunk({"content": piece}) for piece in text) + chunk({}, "length") + USAGE + DONE
    one = Relay(Kind.CHAT, "public", tools=True)
    for at in range(0, len(stream), len(stream) // reads + 1):
        one.feed(stream[at : at + len(stream) // reads + 1])
    ending = one.end().ending
    assert (ending.markup, ending.cut, ending.said) == (True, True, True)

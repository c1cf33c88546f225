"""Going on with an answer: what is matched, what is sent, and that nothing wrong ever is."""

import json
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.api.kinds import Kind
from gateway.stream.interpreter import Completeness
from gateway.stream.relay import Relay, Seen
from gateway.stream.resume import MAX_CHARS, MAX_CHUNKS, Outcome, Proof, Tally, deterministic, outcome_of

Json = dict[str, Any]
DONE = b"data: [DONE]\n\n"


def event(value: object) -> bytes:
    return f"data: {json.dumps(value)}\n\n".encode()


def chat(delta: Json, finish: str | None = None, answer_id: str = "a") -> bytes:
    choice = {"index": 0, "delta": {"role": "assistant", **delta}, "finish_reason": finish}
    return event({"id": answer_id, "created": 1, "choices": [choice]})


def text(value: str, finish: str | None = None, answer_id: str = "a") -> bytes:
    return event({"id": answer_id, "created": 1, "choices": [{"index": 0, "text": value, "finish_reason": finish}]})


def call(arguments: str, name: str = "", call_id: str = "c", index: int = 0) -> Json:
    function = {"name": name, "arguments": arguments} if name else {"arguments": arguments}
    return {"tool_calls": [{"index": index, "id": call_id, "type": "function", "function": function}]}


def usage(tokens: int) -> bytes:
    return event({"id": "u", "choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": tokens}})


def relay(kind: Kind = Kind.CHAT) -> Relay:
    return Relay(kind, "public", include_usage=True, remember=True)


def last_byte_at(data: bytes) -> tuple[dict[Any, str], list[Json]]:
    """All texts that a client puts together, by channel; and the events."""
    events = [json.loads(part[6:]) for part in data.split(b"\n\n") if part.startswith(b"data: {")]
    texts: dict[Any, str] = {}

    def add(channel: Any, value: str | None) -> None:
        if value:
            texts[channel] = texts.get(channel, "") + value

    for one in events:
        for choice in one["choices"]:
            add("text", choice.get("text"))
            delta = choice.get("delta", {})
            for name in ("content", "reasoning", "role"):
                add(name, delta.get(name))
            for made in delta.get("tool_calls", ()):
                for name in ("name", "arguments"):
                    add((made["index"], name), made.get("function", {}).get(name))
    return texts, events


STORY = [
    chat({}),
    chat({"reasoning": "let me "}),
    chat({"reasoning": "see"}),
    chat({"content": "Grüße "}),
    chat({"content": "aus 日本 🙂"}),
    chat(call('{"a":', "f")),
    chat(call(" 1}")),
    chat(call("{}", "g", "d", 1)),
    chat({}, "tool_calls"),
    usage(7),
    DONE,
]
WHOLE = last_byte_at(relay().feed(b"".join(STORY)).data)[0]


@pytest.mark.parametrize("cut", range(2, len(STORY) - 2))
def test_it_goes_on_wherever_it_was_cut(cut: int) -> None:
    one = relay()
    before = one.feed(b"".join(STORY[:cut])).data
    assert (one.state, one.resumable) == (Seen.SPEAKING, True)
    one.resume()
    second = [part.replace(b'"id": "a"', b'"id": "b"').replace(b'"id": "c"', b'"id": "x"') for part in STORY]
    for again in range(cut):
        assert one.feed(b"".join(second[:again])).data == b""
        assert one.resumable, "the client has got no more"
        one.resume()
    after = one.feed(b"".join(second)).data
    assert not one.resumable, "it has now"
    texts, events = last_byte_at(before + after)
    assert texts == WHOLE
    assert {one["id"] for one in events} == {"a"}
    calls = [made for one in events for choice in one["choices"] for made in choice["delta"].get("tool_calls", ())]
    assert len({made["id"] for made in calls if made["index"] == 0 and "id" in made}) == 1
    assert events[-1]["usage"]["completion_tokens"] == 7
    assert after.endswith(DONE)
    assert (one.end().verdict, one.diverged, one.replaying) == (Completeness.COMPLETE, False, False)
    assert one.matched > 0


def pieces(whole: str, cuts: list[int]) -> list[str]:
    edges = [0, *sorted({cut % (len(whole) + 1) for cut in cuts}), len(whole)]
    return [whole[a:b] for a, b in pairwise(edges) if a < b]


CUTS = st.lists(st.integers(0, 100), max_size=8)
MAKERS: dict[Kind, Callable[..., bytes]] = {Kind.CHAT: lambda t, *a: chat({"content": t}, *a), Kind.COMPLETION: text}


@given(
    whole=st.text(min_size=1, max_size=30),
    first=CUTS,
    second=CUTS,
    delivered=st.integers(1, 8),
    kind=st.sampled_from(Kind),
)
def test_any_split_of_the_same_text(
    *, whole: str, first: list[int], second: list[int], delivered: int, kind: Kind
) -> None:
    make, channel = MAKERS[kind], "content" if kind is Kind.CHAT else "text"
    one = relay(kind)
    before = one.feed(b"".join(make(part) for part in pieces(whole, first)[:delivered])).data
    one.resume()
    after = b"".join(one.feed(make(part)).data for part in pieces(whole, second))
    end = one.feed(make("", "stop") + DONE)
    assert last_byte_at(before + after + end.data)[0][channel] == whole
    assert end.failure is None
    assert one.end().verdict is Completeness.COMPLETE


@given(
    delivered=st.text("ab", min_size=1, max_size=12),
    other=st.text("ab", max_size=12),
    first=CUTS,
    second=CUTS,
    kind=st.sampled_from(Kind),
)
def test_another_text_is_never_sent(
    *, delivered: str, other: str, first: list[int], second: list[int], kind: Kind
) -> None:
    make, channel = MAKERS[kind], "content" if kind is Kind.CHAT else "text"
    one = relay(kind)
    before = one.feed(b"".join(make(part) for part in pieces(delivered, first))).data
    one.resume()
    out = one.feed(b"".join(make(part) for part in pieces(other, second)) + make("", "stop") + DONE)
    if other.startswith(delivered):
        assert last_byte_at(before + out.data)[0][channel] == other
        assert one.end().verdict is Completeness.COMPLETE
    else:
        assert out.data == b""
        assert one.diverged
        assert one.end().verdict is Completeness.FAILED


LOGPROBS = event({"id": "a", "choices": [{"index": 0, "delta": {}, "logprobs": {"content": [{}]}}]})
CHANNELS = ("reasoning", "content", ("name", 0), ("arguments", 0), ("name", 1), ("arguments", 1))
Spoken = list[tuple[Any, str]]


def delta_of(spoken: Spoken, call_id: str) -> Json:
    """One delta for a stretch of an answer, over however many channels it goes."""
    delta: Json = {}
    calls: dict[int, Json] = {}
    for channel, char in spoken:
        if isinstance(channel, str):
            delta[channel] = delta.get(channel, "") + char
            continue
        name, index = channel
        made = calls.setdefault(index, {"index": index, "id": f"{call_id}{index}", "type": "function", "function": {}})
        made["function"][name] = made["function"].get(name, "") + char
    return delta | ({"tool_calls": list(calls.values())} if calls else {})


def split(spoken: Spoken, cuts: list[int], call_id: str) -> list[bytes]:
    edges = [0, *sorted({cut % (len(spoken) + 1) for cut in cuts}), len(spoken)]
    return [chat(delta_of(spoken[a:b], call_id), answer_id=call_id) for a, b in pairwise(edges) if a < b]


@given(
    spoken=st.lists(st.tuples(st.sampled_from(CHANNELS), st.sampled_from("ab")), min_size=1, max_size=24),
    first=CUTS,
    second=CUTS,
    delivered=st.integers(1, 8),
    reads=st.integers(1, 200),
)
def test_any_split_of_the_same_answer_over_all_channels(
    *, spoken: Spoken, first: list[int], second: list[int], delivered: int, reads: int
) -> None:
    end = chat({}, "stop", "p") + DONE
    expected = last_byte_at(relay().feed(b"".join(split(spoken, [], "x")) + end).data)[0]
    one = relay()
    out = one.feed(b"".join(split(spoken, first, "x")[:delivered])).data
    one.resume()
    replay = b"".join(split(spoken, second, "p")) + end
    for begin in range(0, len(replay), reads):
        out += one.feed(replay[begin : begin + reads]).data
    texts, events = last_byte_at(out)
    assert texts == expected
    assert one.end().verdict is Completeness.COMPLETE
    ids: dict[int, set[str]] = {}
    for event in events:
        for made in event["choices"][0]["delta"].get("tool_calls", ()):
            ids.setdefault(made["index"], set()).update([made["id"]] if "id" in made else [])
    assert all(len(each) == 1 for each in ids.values()), "a call keeps the id under which it was begun"


@given(
    spoken=st.lists(st.tuples(st.sampled_from(CHANNELS), st.sampled_from("ab")), min_size=1, max_size=16),
    second=CUTS,
    data=st.data(),
)
def test_a_difference_anywhere_in_what_was_delivered_is_found(
    *, spoken: Spoken, second: list[int], data: st.DataObject
) -> None:
    """A character changed, or moved to another channel, or left out at the end."""
    place = data.draw(st.integers(0, len(spoken) - 1))
    channel, char = spoken[place]
    other = data.draw(st.sampled_from([c for c in CHANNELS if c != channel]))
    changed = data.draw(
        st.sampled_from(
            [
                [*spoken[:place], (channel, "c"), *spoken[place + 1 :]],
                [*spoken[:place], (other, char), *spoken[place + 1 :]],
                spoken[:place],
            ]
        )
    )
    one = relay()
    one.feed(b"".join(split(spoken, [], "x")))
    one.resume()
    out = one.feed(b"".join(split(changed, second, "p")) + chat({}, "stop", "p") + DONE)
    assert out.data == b""
    assert one.diverged
    assert one.end().verdict is Completeness.FAILED


@pytest.mark.parametrize(
    "spoiler",
    [
        chat({"audio": {"data": "x"}}),
        chat({"function_call": {"name": "f"}}),
        chat({"tool_calls": [{"index": 0, "id": "c", "function": {"name": "f", "strict": True}}]}),
        chat(call("{}", "f", "c")) + chat(call("{}", "g", "d")),  # two calls under one index
        event({"id": "a", "choices": [{"index": 1, "delta": {"content": "x"}}]}),
        event({"id": "a", "choices": [{"index": 0, "delta": {"content": "x"}, "logprobs": {"content": [{}]}}]}),
    ],
)
@pytest.mark.parametrize(
    "failed", [b"", event({"choices": [{"index": 0, "delta": {}, "logprobs": {"content": [{}]}}]})]
)
def test_what_cannot_be_compared_is_not_resumed(spoiler: bytes, failed: bytes) -> None:
    one = relay()
    one.feed(failed)
    one.attempt()  # of one that failed before its content nothing counts
    told = []
    for part in (STORY[3], spoiler, STORY[4]):
        one.feed(part)
        told.append(one.resumable)
    assert told == [True, False, False]
    with pytest.raises(RuntimeError):
        one.resume()


def test_nor_is_what_was_kept_until_the_first_text() -> None:
    one = relay()
    one.feed(LOGPROBS + STORY[3])
    assert (one.state, one.resumable) == (Seen.SPEAKING, False)


def test_what_cannot_be_compared_differs() -> None:
    one = relay()
    one.feed(STORY[3])
    one.resume()
    assert one.feed(chat({"audio": {"data": "x"}})).data == b""
    assert (one.diverged, one.resumable) == (True, False)


def test_what_comes_after_the_splice_may_be_anything() -> None:
    one = relay()
    one.feed(STORY[3])
    one.resume()
    assert b"audio" in one.feed(STORY[3] + chat({"audio": {"data": "x"}})).data


def test_no_empty_text_is_left_of_a_chunk() -> None:
    """The Vercel SDK begins a new part of reasoning even with an empty one."""
    one = relay()
    one.feed(chat({"reasoning": "ab"}) + chat({"content": "c"}))
    one.resume()
    (straddling,) = last_byte_at(one.feed(chat({"reasoning": "ab", "content": "cd"})).data)[1]
    assert straddling["choices"][0]["delta"] == {"content": "d"}


def test_a_call_of_which_the_client_has_only_the_id() -> None:
    one = relay()
    before = one.feed(STORY[3] + chat({"tool_calls": [{"index": 0, "id": "c", "type": "function"}]})).data
    one.resume()
    after = one.feed(STORY[3] + chat(call("{}", "f", "x"))).data
    made = [m for e in last_byte_at(before + after)[1] for m in e["choices"][0]["delta"].get("tool_calls", ())]
    assert [m.get("id") for m in made] == ["c", None]
    assert made[1]["function"] == {"name": "f", "arguments": "{}"}


def test_a_new_call_under_an_old_index_is_a_new_call() -> None:
    one = relay()
    one.feed(chat(call("{}", "f", "c")))
    one.resume()
    out = one.feed(chat(call("{}", "f", "x")) + chat(call("[]", "g", "y"))).data
    (made,) = last_byte_at(out)[1][0]["choices"][0]["delta"]["tool_calls"]
    assert (made["id"], made["function"]) == ("y", {"name": "g", "arguments": "[]"})


def test_only_what_was_generated_again_is_counted_as_wasted() -> None:
    one = relay()
    one.feed(chat(call("{", "f")))
    one.resume()
    one.feed(chat(call("{", "f", "x")) + chat(call("}", "", "x")) + chat({}) + chat({}, "tool_calls") + DONE)
    assert one.matched == 1


@pytest.mark.parametrize(
    "replay",
    [
        [chat({"reasoning": "other"})],
        [chat({"content": "Grüße "}), chat({}, "stop")],  # without its reasoning
        [*STORY[:5], chat(call('{"a":', "h"))],
        [*STORY[:5], chat(call('{"b":', "f"))],
        [*STORY[:4], chat({}, "stop"), DONE],
        [*STORY[:4], DONE],
        [*STORY[:4], chat({"content": "aus 日本 🙂 und mehr"})],  # the call is still to come
    ],
)
def test_what_is_not_the_same(replay: list[bytes]) -> None:
    one = relay()
    one.feed(b"".join(STORY[:6]))
    one.resume()
    out = one.feed(b"".join(replay))
    assert out.data == b""
    assert one.diverged
    assert one.end().verdict is Completeness.FAILED


def test_a_second_upstream_that_just_stops() -> None:
    one = relay()
    one.feed(b"".join(STORY[:6]))
    one.resume()
    assert one.feed(STORY[1]).data == b""
    assert (one.replaying, one.diverged, one.end().verdict) == (True, False, Completeness.TRUNCATED)


def test_too_long_an_answer_is_not_remembered() -> None:
    one = relay()
    for count in range(1, MAX_CHUNKS + 3):
        one.feed(chat({"content": "x"}))
        assert one.resumable is (count <= MAX_CHUNKS)


def test_without_being_asked_nothing_is_remembered() -> None:
    one = Relay(Kind.CHAT, "public")
    one.feed(chat({"content": "x"}))
    assert not one.resumable
    with pytest.raises(RuntimeError):
        one.resume()
    with pytest.raises(RuntimeError):
        relay().resume()


# -- who can be resumed -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "default", "expected"),
    [
        ({}, 0.0, True),
        ({}, 0.7, False),
        ({"temperature": 0}, 0.7, True),
        ({"temperature": 0.8}, 0.0, False),
        ({"temperature": 0.8, "seed": 0}, 0.0, True),
        ({"adapters": "x"}, 0.0, False),
        ({"draft_model": "x", "seed": 1}, 0.0, False),
    ],
)
def test_determinism(params: Json, default: float, expected: bool) -> None:
    assert deterministic(params.get, default) is expected


def test_outcomes_are_counted() -> None:
    tally = Tally()
    for outcome, wasted in ((Outcome.SPLICED, 5), (Outcome.DIVERGED, 2), (Outcome.FAILED, 0)):
        tally.count(outcome, wasted)
    assert (tally.tried, tally.spliced, tally.diverged, tally.failed, tally.wasted) == (3, 1, 1, 1, 7)
    assert outcome_of(replaying=False, diverged=False, asked=True) is Outcome.SPLICED
    assert outcome_of(replaying=True, diverged=False, asked=True) is Outcome.FAILED
    assert outcome_of(replaying=False, diverged=False, asked=False) is Outcome.FAILED
    assert outcome_of(replaying=True, diverged=True, asked=True) is Outcome.DIVERGED
    assert [proof for proof in Proof if not proof.allows_resume] == [Proof.OFF]
    assert [proof for proof in Proof if not proof.needs_idle] == [Proof.VERIFIED]


def test_what_a_choice_holds_besides_is_not_compared() -> None:
    one = relay(Kind.COMPLETION)
    one.feed(event({"choices": [{"index": 0, "delta": {"content": "a"}, "text": "b"}]}))
    assert not one.resumable


def test_a_long_answer_is_not_kept_whatever_the_size_of_its_chunks() -> None:
    one = relay()
    half = chat({"content": "x" * (MAX_CHARS // 2)})
    one.feed(half + half)
    assert one.resumable
    one.feed(chat({"content": "y"}))
    assert not one.resumable

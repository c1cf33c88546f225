"""One JSON answer out of a stream: what it holds, and that it is only called whole on evidence."""

import json
from copy import deepcopy
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.api.kinds import Kind
from gateway.stream.aggregate import MAX_ANSWER, MAX_CALLS, Aggregator, fix_json, whole_answer
from gateway.stream.interpreter import Completeness, End
from gateway.stream.lost_calls import Ending
from gateway.stream.relay import Relay, Seen

DONE = b"data: [DONE]\n\n"
ENVELOPE = {"id": "chatcmpl-1", "system_fingerprint": "0.32.2", "model": "/models/tiny", "created": 1790000000}


def event(value: object) -> bytes:
    return f"data: {json.dumps(value)}\n\n".encode()


def chunk(finish: str | None = None, index: int = 0, **delta: Any) -> bytes:
    choice = {"index": index, "finish_reason": finish, "delta": {"role": "assistant", **delta}}
    return event({**ENVELOPE, "object": "chat.completion.chunk", "choices": [choice]})


def text(value: str, finish: str | None = None, **more: Any) -> bytes:
    choice = {"index": 0, "finish_reason": finish, "text": value, **more}
    return event({**ENVELOPE, "id": "cmpl-1", "object": "text_completion", "choices": [choice]})


USAGE = {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12}
USAGE_EVENT = event({**ENVELOPE, "object": "chat.completion", "choices": [], "usage": USAGE})


def call(
    index: int | None = 0, call_id: str | None = None, name: str | None = None, arguments: Any = None
) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    out: dict[str, Any] = {"function": {key: value for key, value in function.items() if value is not None}}
    return out | ({} if index is None else {"index": index}) | ({"id": call_id, "type": "function"} if call_id else {})


CHAT = (
    b": keepalive 4/8\n\n"
    + chunk(reasoning="hm, ")
    + chunk(reasoning="well")
    + chunk(content="Gr\u00fc\u00dfe")
    + chunk(content=" \u2603\u2028\U0001f600")
    + chunk("stop")
    + USAGE_EVENT
    + DONE
)


def run(stream: bytes, kind: Kind = Kind.CHAT) -> tuple[dict[str, Any], End]:
    one = Aggregator(kind, "public")
    one.feed(stream)
    return one.answer(), one.end()


def message(*chunks: bytes) -> dict[str, Any]:
    answer, end = run(b"".join(chunks) + chunk("stop"))
    assert end.verdict is Completeness.COMPLETE
    found: dict[str, Any] = answer["choices"][0]["message"]
    return found


def test_a_chat_of_mlx_lm_server() -> None:
    answer, end = run(CHAT)
    assert end == End(Completeness.COMPLETE)
    assert answer == {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1790000000,
        "model": "public",
        "system_fingerprint": "0.32.2",
        "choices": [
            {
                "index": 0,
                "message": {
                    "role": "assistant",
                    "content": "Gr\u00fc\u00dfe \u2603\u2028\U0001f600",
                    "reasoning": "hm, well",
                    "reasoning_content": "hm, well",
                },
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": USAGE,
    }


def test_a_completion_of_mlx_lm_server() -> None:
    answer, end = run(text("Once ") + text("upon") + text("", "length") + USAGE_EVENT + DONE, Kind.COMPLETION)
    assert end.verdict is Completeness.COMPLETE
    assert (answer["id"], answer["object"], answer["usage"]) == ("cmpl-1", "text_completion", USAGE)
    assert answer["choices"] == [{"index": 0, "text": "Once upon", "logprobs": None, "finish_reason": "length"}]


def test_the_client_has_seen_nothing_until_the_answer() -> None:
    one = Aggregator(Kind.CHAT, "public")
    one.feed(CHAT[: len(CHAT) // 2])
    assert (one.progress, one.state) == ((4, 8), Seen.WAITING)
    assert one.end() == End(Completeness.TRUNCATED)
    one.attempt()
    assert (one.progress, one.usage, one.ended) == (None, None, False)
    one.feed(CHAT)
    assert one.answer() == run(CHAT)[0]
    assert one.ended


def test_empty_content_is_text_unless_there_are_tool_calls() -> None:
    assert message() == {"role": "assistant", "content": ""}
    assert message(chunk(reasoning="r"))["content"] == ""
    with_call = message(chunk(tool_calls=[call(0, "a", "f", "{}")]))
    assert with_call["content"] is None
    assert message(chunk(content="t"), chunk(tool_calls=[call(0, "a", "f", "{}")]))["content"] == "t"
    assert message(chunk(refusal="I "), chunk(refusal="will not"))["refusal"] == "I will not"


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_reasoning_goes_by_both_names_and_is_not_doubled(name: str) -> None:
    first = chunk(reasoning="a").replace(b'"reasoning"', b'"%b"' % name.encode())
    said = message(first, chunk(reasoning="b", reasoning_content="b"))
    assert (said["reasoning"], said["reasoning_content"]) == ("ab", "ab")


F, G = ("a", "f", '{"x":1}'), ("b", "g", '{"y":2}')


@pytest.mark.parametrize(
    "stream",
    [
        [chunk(tool_calls=[call(0, *F), call(1, *G)])],
        [chunk(tool_calls=[call(0, *F)]), chunk(tool_calls=[call(1, *G)])],
        [
            chunk(tool_calls=[call(0, "a", "f", ""), call(1, "b", "g", "")]),
            chunk(tool_calls=[call(1, arguments='{"y"')]),
            chunk(tool_calls=[call(0, arguments='{"x":')]),
            chunk(tool_calls=[call(0, arguments="1}"), call(1, arguments=":2}")]),
        ],
        [chunk(tool_calls=[call(0, "a", "f", '{"x"')]), chunk(tool_calls=[call(0, "a", "f", ":1}"), call(1, *G)])],
        [chunk(tool_calls=[call(0, *F)]), chunk(tool_calls=[call(0, *G)])],
        [chunk(tool_calls=[call(None, *F), call(None, *G)])],
        [
            chunk(tool_calls=[call(None, "a", "f", "")]),
            chunk(tool_calls=[call(None, arguments='{"x":1}')]),
            chunk(tool_calls=[call(None, *G)]),
        ],
        [chunk(tool_calls=[call(0, "a", "f", {"x": 1}), call(1, "b", "g", {"y": 2})])],
    ],
    ids=["at once", "in turn", "in pieces", "id repeated", "always 0", "no index", "pieces, no index", "objects"],
)
def test_tool_calls_are_put_together(stream: list[bytes]) -> None:
    assert message(*stream)["tool_calls"] == [
        {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
        for call_id, name, arguments in (F, G)
    ]


def test_choices_are_kept_apart_and_in_order() -> None:
    stream = chunk(index=1, content="b") + chunk(content="a") + chunk("length", index=1, content="B") + chunk("stop")
    answer, end = run(stream)
    assert end.verdict is Completeness.COMPLETE
    found = [(item["index"], item["message"]["content"], item["finish_reason"]) for item in answer["choices"]]
    assert found == [(0, "a", "stop"), (1, "bB", "length")]


def test_log_probabilities_follow_on_each_other() -> None:
    stream = text("a", logprobs={"tokens": ["a"], "token_logprobs": [-1]}) + text("", logprobs=None)
    stream += text("b", "stop", logprobs={"tokens": ["b"], "token_logprobs": [-2]})
    answer = run(stream, Kind.COMPLETION)[0]
    assert answer["choices"][0]["logprobs"] == {"tokens": ["a", "b"], "token_logprobs": [-1, -2]}


def test_a_finish_reason_is_never_made_up() -> None:
    answer, end = run(chunk(content="a") + DONE)
    assert end.verdict is Completeness.COMPLETE
    assert answer["choices"][0]["finish_reason"] is None
    assert "usage" not in answer


@pytest.mark.parametrize("failing", [event({"error": "died"}), b"data: nope\n\n", b"event: error\ndata: x\n\n"])
def test_errors_end_the_attempt(failing: bytes) -> None:
    one = Aggregator(Kind.CHAT, "public")
    one.feed(chunk(content="a") + failing + chunk("stop") + DONE)
    end = one.end()
    assert end.verdict is Completeness.FAILED
    assert end.error is not None
    one.feed(chunk("stop"))
    assert one.end() == end


def test_death_at_every_byte_of_a_stream_and_a_relay_agrees() -> None:
    proven = CHAT.index(USAGE_EVENT)
    for cut in range(len(CHAT) + 1):
        end = run(CHAT[:cut])[1]
        assert end.verdict is (Completeness.COMPLETE if cut >= proven else Completeness.TRUNCATED)
        relay = Relay(Kind.CHAT, "public")
        relay.feed(CHAT[:cut])
        assert relay.end().verdict is end.verdict


PIECES = st.sampled_from(
    [
        *[chunk(content="a"), chunk(reasoning="r"), chunk(), chunk("stop"), chunk(tool_calls=[call(0, *F)])],
        *[chunk(index=1, content="b"), chunk("stop", index=1), USAGE_EVENT, DONE],
        *[b": keepalive 1/2\n\n", event({"error": "e"})],
    ]
)


@given(st.lists(PIECES, max_size=8).map(b"".join), st.lists(st.floats(0, 1), max_size=5))
def test_nothing_depends_on_the_cuts_and_the_relay_says_the_same(stream: bytes, where: list[float]) -> None:
    one, relay = Aggregator(Kind.CHAT, "public"), Relay(Kind.CHAT, "public", include_usage=True)
    edges = [0, *sorted(round(part * len(stream)) for part in where), len(stream)]
    sent = b""
    for start, stop in pairwise(edges):
        one.feed(stream[start:stop])
        sent += relay.feed(stream[start:stop]).data
    end, relayed = one.end(), relay.end()
    assert (one.answer(), end) == run(stream)
    assert end.verdict is relayed.verdict
    if end.verdict is Completeness.COMPLETE:
        again = run(sent + relayed.data)[0]
        assert again["choices"] == one.answer()["choices"]
        assert again.get("usage") == one.answer().get("usage")


# ---- answers in one piece

MLX_JSON: dict[str, Any] = {
    **ENVELOPE,
    "object": "chat.completion",
    "choices": [
        {
            "index": 0,
            "finish_reason": "stop",
            "logprobs": {"content": [{"id": 5, "logprob": -0.1}]},
            "message": {"role": "assistant", "content": None, "reasoning": "hm"},
        }
    ],
    "usage": USAGE,
    "error": None,
}


def copy(value: dict[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = json.loads(json.dumps(value))
    return out


def test_an_answer_in_one_piece_gets_the_same_form() -> None:
    fixed = fix_json(copy(MLX_JSON), Kind.CHAT, "public")
    assert fixed["model"] == "public"
    assert "error" not in fixed
    assert fixed["choices"][0]["message"] == {
        "role": "assistant",
        "content": "",
        "reasoning": "hm",
        "reasoning_content": "hm",
    }
    assert fixed["choices"][0]["logprobs"] == MLX_JSON["choices"][0]["logprobs"]
    assert fixed["usage"] == USAGE


def test_null_content_stays_beside_tool_calls() -> None:
    body = copy(MLX_JSON)
    body["choices"][0]["message"] = {"role": "assistant", "content": None, "tool_calls": [call(None, *F)]}
    assert fix_json(body, Kind.CHAT, "public")["choices"][0]["message"]["content"] is None


def test_a_completion_in_one_piece() -> None:
    body = {"object": "odd", "model": "/m", "choices": [{"text": "a", "finish_reason": "stop"}]}
    assert fix_json(body, Kind.COMPLETION, "public") == {
        "object": "text_completion",
        "model": "public",
        "choices": [{"text": "a", "finish_reason": "stop"}],
    }


@pytest.mark.parametrize(
    ("body", "whole"),
    [
        (MLX_JSON, True),
        ({"choices": [{"finish_reason": "stop"}, {"finish_reason": "length"}]}, True),
        ({"choices": [{"finish_reason": "stop"}, {"finish_reason": None}]}, False),
        ({"choices": [{"text": "a"}]}, False),
        ({"choices": [{"finish_reason": "error"}]}, False),
        ({"choices": []}, False),
        ({"choices": None}, False),
        ({"choices": ["x"]}, False),
        ({"choices": [{"finish_reason": "stop"}], "error": {"message": "no"}}, False),
        ({"error": "generation thread died"}, False),
        ({}, False),
        ([], False),
        (None, False),
        ("text", False),
    ],
)
def test_completeness_of_an_answer_in_one_piece(body: object, whole: bool) -> None:
    assert isinstance(whole_answer(deepcopy(body), Kind.CHAT), Ending) is whole


# -- answers without an end --------------------------------------------------------------------------------------------


def fed(*pieces: bytes) -> Aggregator:
    aggregator = Aggregator(Kind.CHAT, "m")
    for piece in pieces:
        aggregator.feed(piece)
    return aggregator


def failed(aggregator: Aggregator, why: str) -> bool:
    end = aggregator.end()
    assert end.error is not None
    return aggregator.ended and end.verdict is Completeness.FAILED and why in end.error.message


def test_an_answer_is_not_assembled_for_ever() -> None:
    word = chunk(content="word ")
    many = word * (MAX_ANSWER // len(word) // 100)
    within = fed(*[many] * 100)
    assert not within.ended
    within.feed(many)
    assert failed(within, str(MAX_ANSWER))


def test_tool_calls_have_a_bound() -> None:
    calls = [chunk(tool_calls=[call(i, f"c{i}", "f", "{}")]) for i in range(MAX_CALLS + 1)]
    assert not fed(*calls[:-1]).ended
    assert failed(fed(*calls), "tool calls")


def test_log_probabilities_are_joined_in_place() -> None:
    """Else the time would be quadratic in the answer: this took more than a minute."""
    choice = {"index": 0, "delta": {"content": "x"}, "logprobs": {"content": [{"token": "x"}]}}
    piece = event({"choices": [choice]})
    aggregator = fed(piece * 60_000, chunk("stop"))
    [whole] = aggregator.answer()["choices"]
    assert len(whole["logprobs"]["content"]) == 60_000


def test_what_was_read_for_the_request_before_is_not_told_as_cached() -> None:
    one = Aggregator(Kind.CHAT, "public")
    one.attempt("public", 3)
    usage = {**USAGE, "prompt_tokens_details": {"cached_tokens": 8}}
    one.feed(chunk("stop", content="a") + event({**ENVELOPE, "choices": [], "usage": usage}) + DONE)
    assert one.answer()["usage"] == {**USAGE, "prompt_tokens_details": {"cached_tokens": 3}}
    one.attempt("public")
    one.feed(chunk("stop", content="a") + event({**ENVELOPE, "choices": [], "usage": usage}) + DONE)
    assert one.answer()["usage"] == usage, "the next attempt was not read in slices"

"""What reaches a client who streams: which bytes, when, and whether the end is one."""

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletionChunk

from gateway.api.kinds import Kind
from gateway.stream.error_shapes import UpstreamError
from gateway.stream.interpreter import Completeness, End, Output, StreamInterpreter
from gateway.stream.relay import MAX_HELD, Relay, Seen

DONE = b"data: [DONE]\n\n"
ENVELOPE = {"system_fingerprint": "0.32.2-0.32.1-Linux-x86_64-cpu", "model": "/models/tiny", "created": 1790000000}


def event(value: object) -> bytes:
    """As mlx_lm.server writes it: json.dumps, non-ASCII escaped."""
    return f"data: {json.dumps(value)}\n\n".encode()


def chunk(delta: dict[str, Any] | None = None, finish: str | None = None, **more: Any) -> bytes:
    choice = {"index": more.pop("index", 0), "finish_reason": finish, "delta": delta or {}}
    return event({"id": "chatcmpl-1", "object": "chat.completion.chunk", **ENVELOPE, "choices": [choice], **more})


def mlx(finish: str | None = None, **delta: Any) -> bytes:
    return chunk({"role": "assistant", **delta}, finish)


def mlx_usage(answer_id: str) -> bytes:
    usage = {
        "prompt_tokens": 9,
        "completion_tokens": 3,
        "total_tokens": 12,
        "prompt_tokens_details": {"cached_tokens": 8},
    }
    return event({"id": answer_id, "object": "chat.completion", **ENVELOPE, "choices": [], "usage": usage})


def text(value: str, finish: str | None = None, index: int = 0) -> bytes:
    choice = {"index": index, "finish_reason": finish, "text": value}
    return event({"id": "cmpl-1", "object": "text_completion", **ENVELOPE, "choices": [choice]})


CALL: dict[str, Any] = {
    "function": {"name": "weather", "arguments": '{"city": "K\u00f6ln"}'},
    "type": "function",
    "id": "2a2d0d4e-6d4e-4a53-a8d5-6b6f0f3a1111",
    "index": 0,
}
CHAT = (
    b": keepalive 2048/12010\n\n: keepalive 12009/12010\n\n"
    + mlx(reasoning="hm ")
    + mlx(content="Gr\u00fc\u00dfe ")
    + mlx(content="\u2603\u2028 \U0001f600")
    + mlx(tool_calls=[CALL])
    + mlx("tool_calls")
    + mlx_usage("chatcmpl-1")
    + DONE
)
TEXT = b": keepalive 1/2\n\n" + text("Once ") + text("upon") + text("", "length") + mlx_usage("cmpl-1") + DONE


def relay(kind: Kind = Kind.CHAT, **options: Any) -> Relay:
    return Relay(kind, "public", **options)


def run(stream: bytes, kind: Kind = Kind.CHAT, **options: Any) -> tuple[Output, End, Relay]:
    one = relay(kind, **options)
    return one.feed(stream), one.end(), one


def parsed(data: bytes) -> list[Any]:
    *events, rest = data.split(b"\n\n")
    assert rest == b""
    assert all(item.startswith(b"data: ") for item in events)
    return [item if item == b"data: [DONE]" else json.loads(item[6:]) for item in events]


def deltas(data: bytes) -> list[dict[str, Any]]:
    return [choice["delta"] for item in parsed(data) if isinstance(item, dict) for choice in item["choices"]]


def delta(**values: Any) -> dict[str, Any]:
    return values


# ---- what the chunks become


def test_a_chat_of_mlx_lm_server() -> None:
    out, end, one = run(CHAT)
    assert end == End(Completeness.COMPLETE)
    assert deltas(out.data) == [
        delta(role="assistant", reasoning="hm ", reasoning_content="hm "),
        delta(content="Gr\u00fc\u00dfe "),
        delta(content="\u2603\u2028 \U0001f600"),
        delta(tool_calls=[CALL]),
        {},
    ]
    assert parsed(out.data)[-1] == b"data: [DONE]"
    for item in parsed(out.data)[:-1]:
        assert (item["model"], item["object"], item["id"]) == ("public", "chat.completion.chunk", "chatcmpl-1")
        assert "usage" not in item
    assert out.comments == b": keepalive 2048/12010\n\n: keepalive 12009/12010\n\n"
    assert one.progress == (12009, 12010)
    assert one.usage is not None
    assert one.usage["total_tokens"] == 12
    assert one.state is Seen.DONE


def test_a_completion_of_mlx_lm_server_with_usage() -> None:
    out, end, _ = run(TEXT, Kind.COMPLETION, include_usage=True)
    *items, done = parsed(out.data)
    assert [item["choices"][0]["text"] for item in items[:-1]] == ["Once ", "upon", ""]
    assert items[-1]["choices"] == []
    assert items[-1]["usage"]["prompt_tokens_details"] == {"cached_tokens": 8}
    assert {item["object"] for item in items} == {"text_completion"}
    assert done == b"data: [DONE]"
    assert end == End(Completeness.COMPLETE)


@pytest.mark.parametrize(("found", "told"), [(None, 8), (3, 3), (0, 0), (100, 8)])
def test_what_was_read_for_the_request_before_is_not_told_as_cached(found: int | None, told: int) -> None:
    one = relay(Kind.COMPLETION, include_usage=True)
    one.attempt("public", found)
    *_, last, _done = parsed(one.feed(TEXT).data)
    assert last["usage"] == one.usage
    assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": told}


def test_the_usage_of_a_chat_gets_the_object_of_a_chunk() -> None:
    item = parsed(run(CHAT, include_usage=True)[0].data)[-2]
    assert (item["object"], item["model"], item["choices"]) == ("chat.completion.chunk", "public", [])


USAGE = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}


@pytest.mark.parametrize(
    "stream",
    [
        chunk(delta(content="a")) + chunk(finish="stop", usage=USAGE) + DONE,
        chunk(delta(content="a"), usage={"total_tokens": 1}) + chunk(finish="stop", usage=USAGE) + DONE,
        chunk(delta(content="a"), usage=None) + chunk(finish="stop") + chunk(usage=USAGE, choices=[]) + DONE,
        chunk(choices=[], usage=USAGE) + chunk(delta(content="a"), "stop") + DONE,
        chunk(delta(content="a"), "stop") + chunk(choices=[], usage=USAGE),
    ],
    ids=["in the finish chunk", "in every chunk", "apart", "first", "without [DONE]"],
)
@pytest.mark.parametrize("asked", [True, False])
def test_usage_goes_out_once_last_and_only_if_asked(stream: bytes, asked: bool) -> None:
    out, end, one = run(stream, include_usage=asked)
    *items, done = parsed(out.data + end.data)
    assert one.usage == USAGE
    assert done == b"data: [DONE]"
    with_usage = [number for number, item in enumerate(items) if "usage" in item]
    assert with_usage == ([len(items) - 1] if asked else [])
    if asked:
        assert (items[-1]["choices"], items[-1]["usage"], items[-1]["id"]) == ([], USAGE, "chatcmpl-1")


def test_roles_are_said_once_for_each_choice() -> None:
    stream = b"".join(chunk(delta(role="assistant", content=word), index=i) for word in ("a", "b") for i in (0, 1))
    out = run(stream)[0]
    assert [item.get("role") for item in deltas(out.data)] == ["assistant", "assistant", None, None]


def test_a_first_delta_without_a_role_gets_one() -> None:
    assert deltas(run(chunk(delta(content="a")))[0].data) == [delta(content="a", role="assistant")]


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_reasoning_goes_by_both_names(name: str) -> None:
    assert deltas(run(chunk({name: "hm", "content": None}))[0].data) == [
        delta(role="assistant", content=None, reasoning="hm", reasoning_content="hm")
    ]


def test_an_empty_error_is_taken_out_of_chunks() -> None:
    out, end, _ = run(chunk(delta(content="a"), error=None) + chunk(delta(content="b"), "stop", error={}))
    assert [item["content"] for item in deltas(out.data)] == ["a", "b"]
    assert b"error" not in out.data
    assert end == End(Completeness.COMPLETE, DONE)


def test_the_id_and_the_time_stay_those_of_the_first_chunk() -> None:
    out = run(
        chunk(delta(content="a")) + chunk(delta(content="b"), id="other", created=5) + chunk({}, "stop", id=None)
    )[0]
    assert {(item["id"], item["created"]) for item in parsed(out.data)} == {("chatcmpl-1", 1790000000)}


def test_half_an_emoji_and_nan_pass() -> None:
    stream = b'data: {"choices": [{"delta": {"content": "\\ud83d"}, "logprobs": {"content": [{"logprob": NaN}]}}]}\n\n'
    out = run(stream)[0]
    assert b'"\\ud83d"' in out.data
    assert parsed(out.data)[0]["choices"][0]["logprobs"] == {"content": [{"logprob": None}]}


def test_the_stream_helper_of_openai_python_understands_it() -> None:
    state = ChatCompletionStreamState()  # what ``client.chat.completions.stream`` adds the chunks up with
    for item in parsed(run(CHAT, include_usage=True)[0].data)[:-1]:
        state.handle_chunk(ChatCompletionChunk.model_validate(item))
    final = state.get_final_completion()
    said = final.choices[0].message
    assert (said.role, said.content) == ("assistant", "Gr\u00fc\u00dfe \u2603\u2028 \U0001f600")
    assert said.tool_calls is not None
    assert said.tool_calls[0].function.arguments == CALL["function"]["arguments"]
    assert (final.model, final.choices[0].finish_reason) == ("public", "tool_calls")
    assert final.usage is not None
    assert final.usage.total_tokens == 12


# ---- when they leave


SAYS_NOTHING = [
    chunk(delta(role="assistant")),
    chunk(delta(role="assistant", content="")),
    chunk(delta(role="assistant", content=None, refusal=None, tool_calls=[])),
    chunk(choices=[]),
    event({}),
    b"data:\n\n",
    b"event: ping\ndata: {}\n\n",
    b": keepalive 1/2\n\n",
    b"id: 4\nretry: 10\n\n",
]
SAYS_SOMETHING = [
    delta(content="a"),
    delta(reasoning="a"),
    delta(reasoning_content="a"),
    delta(tool_calls=[CALL]),
    delta(refusal="no"),
]


@pytest.mark.parametrize("stream", SAYS_NOTHING)
def test_what_says_nothing_commits_nothing(stream: bytes) -> None:
    one = relay()
    one.opened()
    assert one.feed(stream * 3).data == b""
    assert one.state is Seen.OPEN
    one.attempt()
    assert one.end().verdict is Completeness.TRUNCATED


@pytest.mark.parametrize("said", SAYS_SOMETHING)
def test_content_commits(said: dict[str, Any]) -> None:
    one = relay()
    one.feed(SAYS_NOTHING[0])
    assert len(parsed(one.feed(chunk(said)).data)) == 2
    assert one.state is Seen.SPEAKING
    with pytest.raises(RuntimeError, match="speaking"):
        one.attempt()


def test_an_empty_answer_is_an_answer() -> None:
    out, end, one = run(mlx("stop") + DONE)
    assert [item["finish_reason"] for item in parsed(out.data)[0]["choices"]] == ["stop"]
    assert end.verdict is Completeness.COMPLETE
    assert one.state is Seen.DONE
    out, end, _ = run(text("", "stop") + DONE, Kind.COMPLETION)
    assert len(parsed(out.data)) == 2
    assert end.verdict is Completeness.COMPLETE


def test_the_chunk_that_opens_a_choice_waits_for_its_content() -> None:
    one = relay()
    assert one.feed(SAYS_NOTHING[1] + SAYS_NOTHING[1]).data == b""
    assert deltas(one.feed(mlx(content="a")).data) == [delta(role="assistant", content=""), delta(content="a")]


def test_log_probabilities_held_back_are_not_lost() -> None:
    one = relay(Kind.COMPLETION)
    for number in (1, 2):
        choices = [{"index": 0, "text": "", "logprobs": {"token_logprobs": [-number]}}]
        assert one.feed(event({"choices": choices})).data == b""
    items = parsed(one.feed(text("a")).data)
    assert [item["choices"][0].get("logprobs") for item in items] == [
        {"token_logprobs": [-1]},
        {"token_logprobs": [-2]},
        None,
    ]


def test_an_attempt_that_dies_early_leaves_no_trace() -> None:
    one = relay()
    one.opened()
    dead = one.feed(b": keepalive 5/9\n\n" + chunk(delta(role="assistant"), id="dead") + b'data: {"cut')
    assert (dead.data, dead.comments, one.progress) == (b"", b": keepalive 5/9\n\n", (5, 9))
    assert one.end() == End(Completeness.TRUNCATED)
    one.attempt()
    assert one.progress is None
    assert one.feed(CHAT).data == run(CHAT)[0].data
    assert one.end() == End(Completeness.COMPLETE)


def test_states_go_one_way() -> None:
    one = relay()
    seen = [one.state]
    for stream in (mlx(), mlx(content="a"), mlx("stop") + DONE):
        one.opened()
        seen.append(one.state)
        one.feed(stream)
        seen.append(one.state)
    one.opened()
    assert [*seen, one.state] == [
        *[Seen.WAITING, Seen.OPEN, Seen.OPEN, Seen.OPEN, Seen.SPEAKING, Seen.SPEAKING, Seen.DONE, Seen.DONE]
    ]
    with pytest.raises(RuntimeError, match="done"):
        one.attempt()


# ---- the end


@pytest.mark.parametrize(
    ("stream", "verdict", "added"),
    [
        (b"", Completeness.TRUNCATED, b""),
        (b": keepalive 1/2\n\n", Completeness.TRUNCATED, b""),
        (mlx(content="a"), Completeness.TRUNCATED, b""),
        (mlx(content="a") + mlx("stop")[:-1], Completeness.TRUNCATED, b""),
        (mlx(content="a") + DONE[:-1], Completeness.TRUNCATED, b""),
        (DONE, Completeness.EMPTY, b""),
        (mlx() + DONE, Completeness.EMPTY, b""),
        (mlx_usage("x") + DONE, Completeness.EMPTY, b""),
        (mlx(content="a") + DONE, Completeness.COMPLETE, b""),
        (mlx(content="a") + mlx("stop"), Completeness.COMPLETE, DONE),
        (mlx("stop"), Completeness.COMPLETE, DONE),
        (mlx("stop") + mlx(content="a")[:40], Completeness.COMPLETE, DONE),
        (chunk({}, "stop") + chunk(delta(content="b"), index=1), Completeness.TRUNCATED, b""),
        (chunk({}, "stop") + chunk(delta(content="b"), "stop", index=1), Completeness.COMPLETE, DONE),
        (chunk(delta(content="a")) + chunk({}, "stop", index=1), Completeness.TRUNCATED, b""),
        (chunk(delta(content="a")) + chunk({}, "error"), Completeness.FAILED, b""),
    ],
)
def test_completeness_rests_on_evidence(stream: bytes, verdict: Completeness, added: bytes) -> None:
    out, end, one = run(stream)
    assert (end.verdict, end.data) == (verdict, added)
    assert (one.state is Seen.DONE) == (verdict is Completeness.COMPLETE)
    assert (out.data + end.data).count(DONE) == (verdict is Completeness.COMPLETE)
    assert one.end().data == b""


def test_what_follows_done_is_ignored() -> None:
    one = relay()
    first = one.feed(mlx(content="a") + DONE + mlx(content="b") + event({"error": "late"}))
    assert first == Output(run(mlx(content="a") + DONE)[0].data)
    assert one.ended
    assert one.feed(b": keepalive 1/2\n\n" + mlx(content="c") + DONE) == Output()
    assert one.end() == End(Completeness.COMPLETE)


@pytest.mark.parametrize(
    ("stream", "expected"),
    [
        (event({"error": {"message": "m", "type": "t", "param": None, "code": "oom"}}), UpstreamError("m", "oom")),
        (event({"error": {"message": "m", "code": 502}}), UpstreamError("m", "502")),
        (event({"error": "generation thread died"}), UpstreamError("generation thread died")),
        (event({"error": {"detail": "d"}}), UpstreamError("d")),
        (event({"error": ["odd"]}), UpstreamError('["odd"]')),
        (event({"error": {"odd": 1}}), UpstreamError('{"odd":1}')),
        (event({"object": "error", "message": "m", "type": "Bad", "code": 400}), UpstreamError("m", "400")),
        (event({"type": "error", "message": "m", "code": "c"}), UpstreamError("m", "c")),
        (b"event: error\ndata: plain text\n\n", UpstreamError("plain text")),
        (b'event: error\ndata: {"message": "m"}\n\n', UpstreamError("m")),
        (b'event: error\ndata: {"error": {"message": "m", "code": "c"}}\n\n', UpstreamError("m", "c")),
        (b'event: error\ndata: "text"\n\n', UpstreamError("text")),
        (b"event: error\ndata:\n\n", UpstreamError("an error event without text")),
        (b"event: error\n\n", UpstreamError("an error event without text")),
        (chunk({}, "error", error={"message": "m", "code": 1}), UpstreamError("m", "1")),
        (chunk(choices=[{"finish_reason": "error", "error": {"message": "m"}}]), UpstreamError("m")),
        (chunk({}, "error"), UpstreamError('the answer ended with finish_reason "error"')),
    ],
)
@pytest.mark.parametrize("before", [b"", mlx(content="a")])
def test_errors_in_every_shape_stop_the_stream(stream: bytes, expected: UpstreamError, before: bytes) -> None:
    one = relay()
    out = one.feed(before + stream + mlx(content="never") + DONE)
    assert out.data == relay().feed(before).data
    assert out.failure == expected
    assert one.feed(mlx(content="never") + DONE) == Output(failure=out.failure)
    assert one.end() == End(Completeness.FAILED, error=out.failure)
    assert one.state is (Seen.SPEAKING if before else Seen.WAITING)


DEEP = b'{"choices": [{"delta": {"content": ' + b"[" * 1010 + b"]" * 1010 + b"}}]}"


@pytest.mark.parametrize(
    "data",
    [
        *[b"nope", b'{"cut": ', b"[1]", b"7", b'"text"', b"null", b"\xff\xfe"],
        *[b'{"choices": 5}', b'{"choices": ["x"]}', b'{"choices": [{"index": []}]}'],
        b'{"choices": [{"delta": "x"}]}',
        b'{"choices": [{"delta": {"tool_calls": "x"}}]}',
        b'{"choices": [{"delta": {"tool_calls": ["x"]}}]}',
        b'{"choices": [{"delta": {"tool_calls": [{"function": 1}]}}]}',
        *[DEEP, b"[" * 100_000],
    ],
)
def test_what_is_not_the_protocol_fails_and_is_not_passed_on(data: bytes) -> None:
    one = relay()
    out = one.feed(mlx(content="a") + b"data: " + data + b"\n\n" + DONE)
    assert out.data == relay().feed(mlx(content="a")).data
    assert out.failure is not None
    assert out.failure.protocol
    assert len(out.failure.message) < 2200
    assert one.end().verdict is Completeness.FAILED


def test_an_event_without_end_fails_after_what_came_before_it() -> None:
    interpreter = StreamInterpreter(Kind.CHAT, max_event=1000)
    assert [
        item["choices"][0]["delta"]["content"]  # type: ignore[index, call-overload]  # the first is parsed
        for item in interpreter.chunks(mlx(content="a") + b"x" * 2000)
    ] == ["a"]
    assert interpreter.error == UpstreamError("the backend sent an event of more than 1000 bytes", protocol=True)
    assert list(interpreter.chunks(mlx(content="b"))) == []
    assert interpreter.verdict() is Completeness.FAILED


def test_an_error_too_deep_to_show_is_an_error_still() -> None:
    failure = run(b'data: {"error": ' + b"[" * 1010 + b"1" + b"]" * 1010 + b"}\n\n")[0].failure
    assert failure == UpstreamError("an error that JSON cannot show")


def test_somebody_elses_text_is_bounded_and_can_be_logged() -> None:
    failure = run(event({"error": "\ud83d" + "x" * 100_000}))[0].failure
    assert failure is not None
    assert len(failure.message.encode()) < 2200


# ---- death at every byte


@pytest.mark.parametrize(
    ("kind", "stream"), [(Kind.CHAT, CHAT), (Kind.COMPLETION, TEXT), (Kind.CHAT, CHAT.replace(b"\n", b"\r\n"))]
)
@pytest.mark.parametrize("asked", [True, False])
def test_death_at_every_byte(kind: Kind, stream: bytes, asked: bool) -> None:
    full = run(stream, kind, include_usage=asked)[0].data
    blank = b"\r\n\r\n" if b"\r\n" in stream else b"\n\n"
    finish = next(e for e in stream.split(blank) if b'"finish_reason": "' in e)
    proven = stream.index(finish) + len(finish) + len(blank) - (1 if b"\r" in blank else 0)
    for cut in range(len(stream) + 1):
        out, end, one = run(stream[:cut], kind, include_usage=asked)
        parsed(out.data + end.data)
        assert full.startswith(out.data)
        assert out.failure is None
        assert end.verdict is (Completeness.COMPLETE if cut >= proven else Completeness.TRUNCATED)
        if end.verdict is Completeness.COMPLETE:
            assert (out.data + end.data).endswith(DONE)
            assert out.data + end.data in {full, full.replace(parsed_usage(full), b"")}
        else:
            assert end.data == b""
            assert DONE not in out.data
            assert (one.state is Seen.SPEAKING) == bool(out.data)


def parsed_usage(data: bytes) -> bytes:
    return next((item + b"\n\n" for item in data.split(b"\n\n") if b'"usage"' in item), b"?")


EVENTS = st.sampled_from(
    [
        *[mlx(content="a"), mlx(reasoning="r"), mlx(), mlx("stop"), mlx_usage("i"), DONE, b": keepalive 1/2\n\n"],
        *[chunk(delta(content="b"), index=1), chunk({}, "stop", index=1)],
        *[event({"error": "e"}), b"data: nope\n\n", b"data: half"],
    ]
)


@given(
    st.lists(EVENTS, max_size=8).map(b"".join),
    st.lists(st.floats(0, 1), max_size=6),
    st.booleans(),
)
def test_nothing_depends_on_the_cuts(stream: bytes, where: list[float], asked: bool) -> None:
    whole, end, reference = run(stream, include_usage=asked)
    one = relay(include_usage=asked)
    edges = [0, *sorted(round(part * len(stream)) for part in where), len(stream)]
    outs = [one.feed(stream[start:stop]) for start, stop in pairwise(edges)]
    assert b"".join(out.data for out in outs) == whole.data
    assert b"".join(out.comments for out in outs) == whole.comments
    assert outs[-1].failure == whole.failure
    assert (one.end(), one.state, one.usage) == (end, reference.state, reference.usage)
    parsed(whole.data + end.data)
    if end.verdict is Completeness.COMPLETE:
        assert b'"finish_reason": "' in stream or DONE in stream
        assert (whole.data + end.data).endswith(DONE)


def test_what_waits_for_the_first_content_has_a_bound() -> None:
    relay = Relay(Kind.CHAT, "m")
    choice = {"index": 0, "delta": {"role": "assistant"}, "logprobs": {"content": [{"token": "x" * 1000}]}}
    piece = event({"choices": [choice]})
    for _ in range(MAX_HELD // 1000 - 200):
        assert relay.feed(piece) == Output()
    for _ in range(200):
        relay.feed(piece)
    end = relay.end()
    assert (end.verdict, relay.state) == (Completeness.FAILED, Seen.WAITING)
    assert end.error is not None
    assert "without any content" in end.error.message

"""Answers with status 200 that are broken, in the shapes that servers give them: none passes as whole, whether it is
streamed, assembled, or came in one piece; and none raises anything."""

import asyncio
import json
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from gateway.api.kinds import Kind
from gateway.forward.linger import LINGER, until_json_ends
from gateway.stream.interpreter import Completeness
from gateway.stream.unstreamed import UnstreamedAnswer
from tests.gateway.forward.test_responders import DONE, HEL, LO, STOP, USAGE, Scene, Upstream, chunk

CALL = {"index": 0, "id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}


Json = dict[str, Any]
DEEP: Any = 1
for _ in range(255):
    DEEP = [DEEP]


def event(value: object) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def after_text(broken: bytes) -> list[bytes]:
    """The shape in the middle of an answer that seems to end well."""
    return [HEL, broken, LO, STOP, DONE]


def finished(reason: Any, **delta: Any) -> bytes:
    return chunk(delta, reason)


SHAPES: dict[str, list[bytes]] = {
    # Error objects, followed by what looks like a good end.
    "error text": after_text(event({"error": "it died"})),
    "error object": after_text(event({"error": {"message": "it died", "code": 500}})),
    "error list": after_text(event({"error": ["it died"]})),
    "errors": after_text(event({"errors": [{"message": "it died"}]})),
    "detail text": after_text(event({"detail": "it died"})),
    "detail list": after_text(event({"detail": [{"loc": ["body"], "msg": "it died"}]})),
    "detail object": after_text(event({"detail": {"error": "it died"}})),
    "code and message": after_text(event({"code": 500, "message": "it died"})),
    "code as text": after_text(event({"code": "InternalError", "message": "it died", "request_id": "r"})),
    "message alone": after_text(event({"message": "it died"})),
    "status error": after_text(event({"status": "error", "message": "it died"})),
    "status failed, with choices": after_text(
        event({"status": "failed", "choices": [{"index": 0, "delta": {"content": ""}}]})
    ),
    "status 500": after_text(event({"status": 500, "title": "it died"})),
    "success false": after_text(event({"success": False, "msg": "it died"})),
    "object error": after_text(event({"object": "error", "message": "it died", "code": 40303})),
    "type error": after_text(event({"type": "error", "message": "it died"})),
    "error_code": after_text(event({"error_code": 336501, "error_msg": "it died"})),
    "base_resp": after_text(event({"choices": None, "base_resp": {"status_code": 1013, "status_msg": "it died"}})),
    "exception": after_text(event({"exception": "it died"})),
    "in a choice": after_text(event({"choices": [{"index": 0, "delta": {}, "error": {"message": "it died"}}]})),
    "in a delta": after_text(event({"choices": [{"index": 0, "delta": {"error": "it died"}}]})),
    "in a finish": [HEL, event({"choices": [{"delta": {}, "finish_reason": "stop", "error": {"code": 5}}]}), DONE],
    "event error": after_text(b"event: error\ndata: it died\n\n"),
    "event error, empty": after_text(b"event: error\ndata: {}\n\n"),
    # Lines that are no server-sent event.
    "bare JSON": after_text(b'{"error": "it died"}\n\n'),
    "bare JSON, other shape": after_text(b'{"detail": "it died"}\n\n'),
    "bare JSON within an event": after_text(b': ping\n{"code": 1, "message": "it died"}\n\n'),
    "bare text": after_text(b"Internal Server Error\n\n"),
    "bare HTML": after_text(b"<html><body>502 Bad Gateway</body></html>\n\n"),
    "traceback": after_text(b'Traceback (most recent call last):\n  File "x.py"\nRuntimeError: it died\n\n'),
    "error field": after_text(b'error: {"code": 500, "message": "it died"}\n\n'),
    "Error: text": after_text(b"Error: it died\n\n"),
    # Reasons to finish that say failure.
    **{
        f"finish {reason}": [HEL, finished(reason), DONE]
        for reason in (
            "error", "Error", "abort", "aborted", "cancelled", "canceled", "network_error", "failed", "server_error",
            "insufficient_system_resource", "timeout", "time_out", "interrupted", "modelUnloaded", "userStopped",
            "engine_overloaded", "load", "engine_dead", "shutdown", "out_of_memory", "oom", "dropped", "preempted",
            "connection_lost", "function_call_filter: MALFORMED_FUNCTION_CALL",
        )
    },
    # More after the end; a claim that nothing bears out.
    "content after a finish": [HEL, STOP, LO, DONE],
    "a call after a finish": [HEL, STOP, chunk({"tool_calls": [CALL]}), DONE],
    "a claimed call": [HEL, finished("tool_calls"), DONE],
    "a claimed call, empty": [HEL, finished("tool_calls", tool_calls=[]), DONE],
    "a claimed call without a name": [chunk({"tool_calls": [{"index": 0, "function": {"arguments": "{"}}]}),
                                      finished("tool_calls"), DONE],
    "a claimed function call": [finished("function_call"), DONE],
    # Ends that are none.
    "empty finish": [chunk({"content": "Hel"}, ""), chunk({"content": "lo"}, "")],
    "finish null as text": [chunk({"content": "Hel"}, "null")],
    "finish None as text": [chunk({"content": "Hel"}, "None"), chunk({"content": "lo"}, "None")],
    # Of no known shape; nothing else tells why there is no finish.
    "err": after_text(event({"err": "it died"})),
    "status_code": after_text(event({"status_code": 502, "message": "it died"})),
    "reason, no finish": [HEL, event({"reason": "it died"}), DONE],
    "unknown object, no finish": [HEL, event({"why": {"text": "?"}}), DONE],
    "event server_error": after_text(b"event: server_error\ndata: it died\n\n"),
    "event Error": after_text(b"event: Error\ndata: it died\n\n"),
    "blank finish": [HEL, finished("  ")],
    "finish that is no text": [HEL, finished({"type": "stop"})],
    "finish false": [HEL, finished(False)],
    # What cannot be read.
    "not JSON": after_text(b"data: {\n\n"),
    "a list": after_text(b"data: [1]\n\n"),
    "deep": after_text(b'data: {"choices": [{"delta": {"content": "x", "x": ' + b"[" * 255 + b"]" * 255 + b"}}]}\n\n"),
    "content that is no text": [chunk({"content": {"a": 1}}), STOP, DONE],
    "content of unknown parts": [chunk({"content": [{"type": "image", "image": "x"}]}), STOP, DONE],
}  # fmt: skip


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("name", SHAPES)
async def test_a_broken_answer_does_not_pass(name: str, at_once: bool, stream: bool) -> None:
    scene = Scene(stream=stream)
    parts = [b"".join(SHAPES[name])] if at_once else SHAPES[name]
    end = await scene.responder.take(Upstream(parts))
    assert end.verdict in (Completeness.FAILED, Completeness.TRUNCATED)
    assert DONE not in scene.body, "nothing that ends the stream is out"
    if b"it died" in b"".join(SHAPES[name]):
        assert end.error is not None
        assert "it died" in end.error.message
        assert not end.error.protocol


SOUND: dict[str, list[bytes]] = {
    "finish null as text before the end": [chunk({"content": "Hel"}, "null"), chunk({"content": "lo"}, "null"), STOP],
    "heartbeats, and no finish": [event({"type": "ping"}), HEL, event({"msg_type": "keep-alive"}), LO, DONE],
    "an unknown object, and a finish": [HEL, event({"phase": "decode"}), LO, STOP, DONE],
    "an unknown event": [HEL, b"event: metrics\ndata: {}\n\n", LO, STOP, DONE],
    "status_code 200": [HEL, event({"status_code": 200, "choices": []}), LO, STOP, DONE],
    **{f"finish {reason}": [HEL, LO, finished(reason), DONE] for reason in ("eos", "STOP", "COMPLETE", "max_tokens")},
}


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("name", SOUND)
async def test_an_odd_answer_that_is_whole_passes(name: str, stream: bool) -> None:
    scene = Scene(stream=stream)
    end = await scene.responder.take(Upstream(SOUND[name]))
    assert end.verdict is Completeness.COMPLETE


WHOLE: dict[str, Any] = {"id": "a", "object": "chat.completion", "created": 1, "model": "m"}
GOOD = {"index": 0, "message": {"role": "assistant", "content": "Hello"}, "finish_reason": "stop"}
IN_ONE_PIECE: dict[str, Any] = {
    "error beside choices": {**WHOLE, "choices": [GOOD], "error": {"message": "it died"}},
    "errors": {"errors": [{"message": "it died"}]},
    "detail": {"detail": "it died"},
    "code and message": {"code": 500, "message": "it died"},
    "status": {**WHOLE, "choices": [GOOD], "status": "error", "message": "it died"},
    "success": {"success": False, "msg": "it died"},
    "in a choice": {**WHOLE, "choices": [{**GOOD, "error": "it died"}]},
    "in a message": {**WHOLE, "choices": [{**GOOD, "message": {"content": "a", "error": {"message": "it died"}}}]},
    "empty finish": {**WHOLE, "choices": [{**GOOD, "finish_reason": ""}]},
    "no finish": {**WHOLE, "choices": [{**GOOD, "finish_reason": None}]},
    "finish that is no text": {**WHOLE, "choices": [{**GOOD, "finish_reason": ["stop"]}]},
    "finish abort": {**WHOLE, "choices": [{**GOOD, "finish_reason": "abort"}]},
    "claimed call": {**WHOLE, "choices": [{**GOOD, "finish_reason": "tool_calls"}]},
    "no choices": {**WHOLE, "choices": []},
    "choices null": {**WHOLE, "choices": None},
    "a message that is a list": {**WHOLE, "choices": [{**GOOD, "message": ["a"]}]},
    "content that is no text": {**WHOLE, "choices": [{**GOOD, "message": {"content": {"a": 1}}}]},
    "a list": [GOOD],
    "a text": "Hello",
    "null": None,
}


@pytest.mark.parametrize("request_", [{"logprobs": True}, {"stream": True}, {}])
@pytest.mark.parametrize("name", IN_ONE_PIECE)
async def test_a_broken_answer_in_one_piece_does_not_pass(name: str, request_: dict[str, Any]) -> None:
    scene = Scene(**request_)
    upstream = Upstream([json.dumps(IN_ONE_PIECE[name]).encode()])
    source = upstream if not scene.responder.upstream_streams else UnstreamedAnswer(upstream, Kind.CHAT)
    end = await scene.responder.take(source)
    assert end.verdict in (Completeness.FAILED, Completeness.TRUNCATED)
    assert DONE not in scene.body
    if "it died" in json.dumps(IN_ONE_PIECE[name]):
        assert end.error is not None
        assert "it died" in end.error.message


# -- what is present and empty says nothing ----------------------------------------------------------------------------

EMPTY: dict[str, list[bytes]] = {
    "finish in every chunk": [chunk({"content": "Hel"}, ""), chunk({"content": "lo"}, ""), STOP],
    "error": [event({"error": "", "choices": [{"index": 0, "delta": {"content": "Hello"}}]}), STOP],
    "error object": [event({"error": {"code": 0, "message": ""}, "choices": [{"delta": {"content": "Hello"}}]}), STOP],
    "error fields": [
        event({"error_code": 0, "error_msg": "", "detail": "", "errors": [], "code": 0, "status": "ok", "success": True,
               "base_resp": {"status_code": 0, "status_msg": ""}, "choices": [{"delta": {"content": "Hello"}}]}),
        STOP,
    ],
    "error in the choice": [event({"choices": [{"delta": {"content": "Hello", "error": None}, "error": ""}]}), STOP],
    "index": [event({"choices": [{"index": None, "delta": {"content": "Hello"}}]}), STOP],
    "delta": [event({"choices": [{"index": 0, "delta": None}]}), HEL, event({"choices": [{"delta": ""}]}), LO, STOP],
    "choices": [event({"choices": None}), HEL, event({"choices": ""}), LO, STOP],
    "texts": [chunk({"content": "Hello", "reasoning": "", "refusal": None, "tool_calls": None}), STOP],
    "content list": [chunk({"content": []}), chunk({"content": [{"type": "text", "text": "Hello"}]}), STOP],
    "tool calls": [chunk({"content": "Hello", "tool_calls": []}), chunk({"tool_calls": "", "function_call": {}}), STOP],
    "usage": [event({"usage": {}, "choices": [{"delta": {"content": "Hello"}}]}), event({"usage": "", "choices": []}),
              STOP, event({"usage": {"prompt_tokens": "3", "completion_tokens": 2.0}, "choices": []}),
              event({"usage": {"prompt_tokens": 0, "completion_tokens": 0}, "choices": []})],
    "after the finish": [HEL, LO, STOP, chunk({"content": ""}), chunk({"role": "assistant"}), STOP],
    "annotations after the finish": [HEL, LO, STOP, chunk({"content": "", "annotations": [{"url": "x"}]})],
    "unstreamed message": [event({"choices": [{"message": {"role": "assistant", "content": "Hello"}}]}), STOP],
    "message repeated at the end": [
        HEL, LO, event({"choices": [{"delta": {}, "message": {"content": "Hello"}, "finish_reason": "stop"}]}),
    ],
}  # fmt: skip


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("name", EMPTY)
async def test_what_is_empty_says_nothing(name: str, stream: bool) -> None:
    options: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    scene = Scene(**options)
    end = await scene.responder.take(Upstream([*EMPTY[name], DONE]))
    assert end.verdict is Completeness.COMPLETE, end
    await scene.responder.deliver(end.data)
    if stream:
        events = [json.loads(e.removeprefix(b"data: ")) for e in scene.body.split(b"\n\n") if e.startswith(b"data: {")]
        choices = [choice for one in events for choice in one["choices"]]
        assert "".join(choice["delta"].get("content") or "" for choice in choices) == "Hello"
        assert {choice.get("finish_reason") for choice in choices} <= {None, "stop"}, "an empty one is null"
        assert all(one.get("usage", True) for one in events)
    else:
        assert scene.json["choices"][0]["message"]["content"] == "Hello"
        assert scene.json["choices"][0]["finish_reason"] == "stop"
    if name == "usage":
        assert scene.responder.usage == {"prompt_tokens": 3, "completion_tokens": 2}


async def test_thoughts_under_one_name_are_given_under_both() -> None:
    scene = Scene()
    end = await scene.responder.take(Upstream([chunk({"reasoning": "", "reasoning_content": "hm"}), HEL, STOP, DONE]))
    await scene.responder.deliver(end.data)
    message = scene.json["choices"][0]["message"]
    assert (message["reasoning"], message["reasoning_content"]) == ("hm", "hm")


async def test_the_first_name_of_the_answer_that_says_something_is_taken() -> None:
    scene = Scene()
    first = event({"id": "", "created": 0, "choices": [{"delta": {"content": "Hel"}}]})
    end = await scene.responder.take(Upstream([first, LO, STOP, DONE]))
    await scene.responder.deliver(end.data)
    assert (scene.json["id"], scene.json["created"]) == ("c1", 7)


# -- what is not needed is not waited for ------------------------------------------------------------------------------


class Silent(Upstream):
    """After its parts the connection stays open, and nothing comes."""

    def __init__(self, parts: Sequence[bytes], comment: bytes = b"") -> None:
        super().__init__(parts)
        self._comment = comment

    async def read(self, offer: Any = None) -> bytes:
        if data := await super().read(offer):
            return data
        await asyncio.sleep(3600 if not self._comment else 0.05)
        return self._comment


async def test_after_the_finish_nothing_is_waited_for_long() -> None:
    """Each of them at the same time, as each takes the two seconds."""
    whole = json.dumps({**WHOLE, "choices": [GOOD]}).encode()

    async def answered(scene: Scene, source: Any) -> float:
        began = asyncio.get_running_loop().time()
        end = await scene.responder.take(source)
        assert end.verdict is Completeness.COMPLETE
        await scene.responder.deliver(end.data)
        assert b"Hello" in scene.body or b"Hel" in scene.body
        assert scene.over()
        return asyncio.get_running_loop().time() - began

    streams = [Scene(stream=stream) for stream in (True, False) for _ in range(3)]
    parts = [([HEL, LO, STOP], b""), ([HEL, LO, STOP, USAGE], b""), ([HEL, LO, STOP], b": still here\n\n")] * 2
    silent = [(scene, Silent(*of)) for scene, of in zip(streams, parts, strict=True)]
    pieces = [
        (Scene(logprobs=True), Silent([whole[:40], whole[40:]])),
        (Scene(), UnstreamedAnswer(Silent([whole]), Kind.CHAT, until_json_ends)),
    ]
    async with asyncio.timeout(4 * LINGER):
        took = await asyncio.gather(*(answered(scene, source) for scene, source in [*silent, *pieces]))
    assert max(took) < 2 * LINGER
    assert min(took) >= LINGER - 0.1, "usage may still come"
    for (scene, _), (of, _) in zip(silent, parts, strict=True):
        assert (scene.responder.usage is not None) == (USAGE in of)


async def test_what_follows_at_once_is_taken_at_once() -> None:
    scene = Scene()
    async with asyncio.timeout(LINGER / 2):
        end = await scene.responder.take(Silent([HEL, STOP, USAGE, DONE]))
    assert (end.verdict, scene.responder.usage) == (
        Completeness.COMPLETE,
        {"prompt_tokens": 3, "completion_tokens": 2},
    )


# -- odd values, one field at a time -----------------------------------------------------------------------------------

ODD = ("x", -1, 10**30, 1.5, True, [0], {"a": 1}, DEEP, "\ud83d")


def odd_streams(value: Any) -> Iterator[tuple[str, bytes]]:
    for field in ("id", "object", "created", "model", "system_fingerprint", "usage", "choices", "error", "timings"):
        yield field, event({"choices": [{"index": 0, "delta": {"content": "x"}}], field: value})
    for field in ("prompt_tokens", "completion_tokens", "total_tokens", "prompt_tokens_details"):
        yield field, event({"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 2, field: value}})
    cached = {"prompt_tokens": 1, "prompt_tokens_details": {"cached_tokens": value}}
    yield "cached_tokens", event({"choices": [], "usage": cached})
    for field in ("index", "delta", "text", "message", "logprobs", "finish_reason", "error"):
        yield field, event({"choices": [{"index": 0, "delta": {"content": "x"}, field: value}]})
    for field in ("role", "content", "reasoning", "reasoning_content", "refusal", "tool_calls", "function_call", "x"):
        yield field, chunk({field: value})
    for field in ("index", "id", "type", "function", "custom"):
        yield f"call {field}", chunk({"tool_calls": [{**CALL, field: value}]})
    for field in ("name", "arguments"):
        yield f"function {field}", chunk({"tool_calls": [{**CALL, "function": {"name": "f", field: value}}]})


@pytest.mark.parametrize("request_", [{"stream": True}, {"stream": True, "remember": True}, {}, {"logprobs": True}])
@pytest.mark.parametrize("tools", [None, [{"type": "function", "function": {"name": "f"}}]])
async def test_whatever_a_field_holds_raises_nothing(request_: Json, tools: Any) -> None:
    for value in ODD:
        for field, odd in odd_streams(value):
            scene = Scene(**request_, tools=tools)
            if scene.responder.upstream_streams:
                upstream = Upstream([HEL, odd, STOP, USAGE, DONE])
            else:
                upstream = Upstream([as_one_piece(odd)])
            end = await scene.responder.take(upstream)
            assert end.verdict in Completeness, (field, value)
            if end.verdict is Completeness.COMPLETE:
                await scene.responder.deliver(end.data)
                told = scene.body.replace(b"data: [DONE]", b"").split(b"\n\n") if scene.parsed.stream else [scene.body]
                assert all(json.loads(one.removeprefix(b"data: ")) for one in told if one)
            counts = scene.responder.usage or {}
            assert all(isinstance(counts.get(name, 0), int) for name in ("prompt_tokens", "completion_tokens"))


def as_one_piece(odd: bytes) -> bytes:
    answer = json.loads(odd.removeprefix(b"data: "))
    for choice in answer["choices"] if isinstance(answer["choices"], list) else ():
        if isinstance(choice, dict):
            choice.setdefault("finish_reason", "stop")
            choice.setdefault("message", choice.pop("delta", None))
    return json.dumps(answer).encode()


@pytest.mark.parametrize(
    ("last", "may"),
    [
        (LO, False),
        (chunk({"content": "lo"}, ""), False),
        (STOP, True),
        (STOP.replace(b'": "stop"', b'":"stop"'), True),
        (STOP.replace(b'": "stop"', b'" : "stop"'), True),
        (DONE, True),
        (b'data: {"detail": "it died"}\n\n', True),
        (b"Internal Server Error\n\n", True),
        (chunk({"content": "an error"}), True),
    ],
)
@pytest.mark.parametrize("size", [1, 7, 10_000])
async def test_what_may_end_an_assembled_answer_is_looked_at_at_once(last: bytes, may: bool, size: int) -> None:
    """However it is split; other text is collected, and costs next to nothing."""
    scene = Scene()
    kept: list[bool] = []

    class Offering(Upstream):
        async def read(self, offer: Any = None) -> bytes:
            if (data := await super().read()) and offer is not None:
                kept.append(offer(data))
                return await self.read(offer) if kept[-1] else data
            return data

    pieces = [last[i : i + size] for i in range(0, len(last), size)]
    await scene.responder.take(Offering([HEL, LO + LO, *pieces]))
    if size > len(last):
        assert kept[-1] is not may
    else:
        assert may is False or False in kept[2:]

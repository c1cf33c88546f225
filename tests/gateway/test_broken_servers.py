"""Servers whose answers lack a tool call, never end, or hold what no answer has, behind the whole gateway."""

import asyncio
import json
import logging
from typing import Any

import pytest

from backends.domain.state import State
from tests.faultserver import Conn
from tests.gateway.test_foreign_servers import MLX_HEADERS, Foreign, Json, Reply, gateway

pytestmark = pytest.mark.usefixtures("nothing_left")

TOOLS = [{"type": "function", "function": {"name": "look"}}]
CALL = {"index": 0, "id": "c", "type": "function", "function": {"name": "look", "arguments": "{}"}}
DONE = b"data: [DONE]\n\n"
DEEP: Any = 1
for _ in range(255):
    DEEP = [DEEP]


def event(value: Any) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def chunk(delta: Json, finish: Any = None) -> bytes:
    return event({"id": "a", "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})


def usage(tokens: int) -> bytes:
    return event(
        {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": tokens, "total_tokens": 5 + tokens}}
    )


LOST = chunk({}, "tool_calls") + usage(20) + DONE
CUT = chunk({}, "length") + usage(20) + DONE
KEPT = chunk({"tool_calls": [CALL]}, "tool_calls") + usage(20) + DONE


def answers(server: Foreign, *streams: bytes) -> None:
    """One after the other, the last for ever."""
    left = list(streams)

    def completion(_: Json) -> Reply:
        return 200, left.pop(0) if len(left) > 1 else left[0]

    server.completion = completion


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("servers", [1, 2])
@pytest.mark.parametrize("broken", [LOST, CUT])
async def test_a_lost_call_is_asked_for_once_more(broken: bytes, servers: int, stream: bool) -> None:
    """On another replica, or where there is none on the same."""
    some = [Foreign(f"s{index}", MLX_HEADERS) for index in range(servers)]
    replies = iter([broken])
    async with gateway(*some) as running:
        await running.ready()
        for server in some:
            server.completion = lambda _: (200, next(replies, KEPT))
        answer = await running.ask(tools=TOOLS, stream=stream)
        assert (answer.status_code, answer.headers["x-gateway-attempts"]) == (200, "2")
        assert b'"look"' in answer.content
        assert [len(server.asked_by_clients) for server in some] == [2 // servers] * servers


@pytest.mark.parametrize("stream", [True, False])
async def test_a_call_that_is_lost_twice_is_told(stream: bool) -> None:
    server = Foreign("s", MLX_HEADERS)
    async with gateway(server) as running:
        await running.ready()
        answers(server, LOST)
        answer = await running.ask(tools=TOOLS, stream=stream)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["type"]) == (500, "tool_call_malformed", "server_error")
        assert answer.headers["x-should-retry"] == "false"
        assert "tool_calls" in error["message"]
        answers(server, CUT)
        for limit in ("max_tokens", "max_completion_tokens"):
            answer = await running.ask(tools=TOOLS, stream=stream, **{"max_tokens": None, limit: 20})
            error = answer.json()["error"]
            assert (answer.status_code, error["code"], error["param"]) == (400, "tool_call_truncated", limit)
        assert len(server.asked_by_clients) == 6
        assert running.states() == [State.READY]


async def test_a_call_that_is_not_closed_in_the_text() -> None:
    """As of a server that does not know the markers of this model."""
    server = Foreign("s")
    begun = chunk({"content": "I will look.\n<tool_call>\n"}) + chunk({"content": '{"name": "look", "argum'})
    async with gateway(server) as running:
        await running.ready()
        for end, code in ((chunk({}, "stop"), "tool_call_malformed"), (chunk({}, "length"), "tool_call_truncated")):
            answers(server, begun + end + DONE)
            assert (await running.ask(tools=TOOLS)).json()["error"]["code"] == code
            assert f'"code":"{code}"' in (await running.ask(tools=TOOLS, stream=True)).text
            assert (await running.ask()).status_code == 200, "no tools were asked for: it is text"
        answers(server, begun + end + DONE, chunk({"content": "I cannot."}, "stop") + DONE)
        assert (await running.ask(tools=TOOLS)).headers["x-gateway-attempts"] == "2"


async def test_a_call_that_is_lost_after_text_ends_the_stream_with_an_error() -> None:
    server = Foreign("s")
    answers(server, chunk({"content": "I look."}) + LOST)
    async with gateway(server) as running:
        await running.ready()
        answer = await running.ask(tools=TOOLS, stream=True)
        *_, told, done, _ = answer.text.split("\n\n")
        assert json.loads(told.removeprefix("data: "))["error"]["code"] == "tool_call_malformed"
        assert done == "data: [DONE]"
        assert 'finish_reason":"' not in answer.text
        assert len(server.asked_by_clients) == 1


async def test_thoughts_that_a_server_hides_are_no_lost_call() -> None:
    server = Foreign("s")
    answers(server, chunk({"role": "assistant"}) + CUT)
    async with gateway(server) as running:
        await running.ready()
        answer = await running.ask(tools=TOOLS)
        assert answer.json()["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("tools", [None, TOOLS])
async def test_an_answer_without_tools_that_is_cut_is_whole(tools: Any) -> None:
    server = Foreign("s")
    answers(server, chunk({"content": "I"}) + chunk({"content": " look"}, "length") + usage(2) + DONE)
    async with gateway(server) as running:
        await running.ready()
        answer = await running.ask(tools=tools, stream=False)
        assert answer.json()["choices"][0]["finish_reason"] == "length"


class Holding(Foreign):
    """Says all of its answer, and keeps the connection. ``said``: head and body."""

    said = b""

    async def __call__(self, conn: Conn) -> None:
        if b'"max_tokens":9' not in await conn.request():
            await super().__call__(conn)
            return
        await conn.send(self.said)
        await conn.gone()


def stream_of(events: bytes) -> bytes:
    return b"HTTP/1.0 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + events


async def test_an_answer_that_is_whole_ends_although_its_server_does_not() -> None:
    """And the server, which serves others well, is not condemned. An error is an answer too."""
    finish = chunk({"content": "x"}, "stop")
    piece = b'{"choices": [{"index": 0, "message": {"content": "x"}, "finish_reason": "stop"}]}'

    async def asked(said: bytes, *, stream: bool) -> tuple[int, bytes]:
        server = Holding("s")
        server.said = said
        async with gateway(server, model="timeouts: {progress: 1s}") as running:
            await running.ready()
            began = asyncio.get_running_loop().time()
            answer = await running.ask(stream=stream)
            assert asyncio.get_running_loop().time() - began < 4.0
            assert running.states() == [State.READY]
            return answer.status_code, answer.content

    streamed, whole, turned, refused = await asyncio.gather(
        asked(stream_of(finish), stream=True),
        asked(stream_of(finish), stream=False),
        asked(b"HTTP/1.0 200 OK\r\nContent-Type: application/json\r\n\r\n" + piece, stream=False),
        asked(b'HTTP/1.0 400 Bad Request\r\n\r\n{"error": "max_tokens is too large"}', stream=True),
    )
    assert (streamed[0], streamed[1][-14:]) == (200, DONE)
    assert (whole[0], json.loads(whole[1])["choices"][0]["finish_reason"]) == (200, "stop")
    assert (turned[0], json.loads(turned[1])["choices"][0]["finish_reason"]) == (200, "stop")
    assert (refused[0], json.loads(refused[1])["error"]["code"]) == (400, "invalid_request")


# -- odd values: each field is tried in ``forward/test_broken_answers``; here what becomes of them afterwards -------


@pytest.mark.parametrize(
    "odd",
    [
        event({"choices": [], "usage": {"prompt_tokens": "many", "completion_tokens": [2], "total_tokens": -1}}),
        event({"choices": [], "usage": {"prompt_tokens": 1, "prompt_tokens_details": "x", "completion_tokens": DEEP}}),
        event({"choices": [], "usage": {"prompt_tokens": 10**30, "prompt_tokens_details": {"cached_tokens": "x"}}}),
        event({"choices": [{"index": [0], "delta": {"content": "x"}}]}),
        event({"choices": [{"index": 0, "delta": {"content": "x", "extra": DEEP}}]}),
        event({"choices": [{"index": 0, "delta": {"content": "x"}}], "extra": DEEP}),
        chunk({"tool_calls": [{**CALL, "index": [0]}]}),
        chunk({"tool_calls": [{**CALL, "index": {"a": 1}, "id": ["x"]}]}),
        chunk({"content": "\ud83d"}),
    ],
)
async def test_whatever_a_server_sends_is_no_bug_of_ours(odd: bytes, caplog: pytest.LogCaptureFixture) -> None:
    server = Foreign("s")
    async with gateway(server) as running:
        await running.ready()
        answers(server, chunk({"content": "a"}) + odd + chunk({}, "stop") + DONE)
        for stream in (True, False):
            answer = await running.ask(stream=stream, tools=TOOLS)
            assert answer.status_code in (200, 503)
            assert b"internal_error" not in answer.content
    assert not [record for record in caplog.records if record.exc_info or record.levelno >= logging.ERROR]

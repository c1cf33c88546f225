"""A whole gateway in this process, over real sockets, with a real child that misbehaves when it is asked to."""

import asyncio
import gzip
import json
import logging
import socket
from functools import partial
from typing import Any

import pytest
from starlette.types import Message

from backends.domain.failure import Aftermath, Cause
from backends.domain.state import State
from gateway.api.kinds import Kind
from gateway.http.client import ClientConnection
from gateway.request.size import LARGE
from tests.backends.loop_lag import assert_bounded
from tests.failures import call_failure
from tests.gateway.http.whole import CHAT, ENDLESS, FLOOD, chat
from tests.lives import until

pytestmark = pytest.mark.usefixtures("nothing_left")

# -- what is refused, and answered -------------------------------------------------------------------------------------


async def test_what_never_gets_to_a_backend(gateway: Any) -> None:
    async with gateway({"max_body": 1024}) as g:
        large = await g.ask(chat("x" * 1024))
        assert (large.status, large.error["code"], "1024 bytes" in large.error["message"]) == (
            413,
            "request_too_large",
            True,
        )
        async with g.wire() as wire:
            await wire.send(b"POST /v1/completions HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n")
            await wire.send(b"401\r\n" + b"x" * 1025 + b"\r\n")
            assert (await wire.answer()).error["code"] == "request_too_large"
        for header in ("content-encoding: br", "content-type: multipart/form-data; boundary=x"):
            refused = await g.ask(chat(), CHAT, header)
            assert (refused.status, refused.error["code"]) == (415, "unsupported_media_type")
        unknown = await g.ask(chat(model="x" * 200))
        assert (unknown.status, unknown.error["code"], unknown.error["param"]) == (404, "model_not_found", "model")
        assert unknown.error["model"] == "x" * 100
        assert "tiny" in unknown.error["message"]
        nameless = await g.ask(chat(model=""))
        assert (nameless.status, nameless.error["code"], nameless.error["param"]) == (400, "invalid_request", "model")
        assert "tiny" in nameless.error["message"]
        assert (await g.ask(b"{")).error["code"] == "invalid_request"
        assert all("model" not in line and "code" in line for line in g.lines)
        assert [line["status"] for line in g.lines] == [413, 413, 415, 415, 404, 400, 400]


async def test_large_bodies_are_worked_on_in_threads_and_small_ones_where_they_are(
    gateway: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread for a small one would cost more than the work; a large one would hold up every stream."""
    async with gateway(replicas=2) as g:
        await g.ready()
        work: list[str] = []
        run = g.workers.run

        async def recorded(what: Any, size: int = 0) -> Any:
            work.append(what.func.__name__ if isinstance(what, partial) else type(what).__name__)
            return await run(what, size)

        monkeypatch.setattr(g.workers, "run", recorded)
        small = chat("FAKE n=1")
        assert (await g.ask(chat("FAKE n=1", metadata=[1] * 10_000))).status == 200
        assert work == ["_prepared", "_digests", "upstream_body"], "its values take longer than its bytes"
        work.clear()
        before = {"role": "user", "content": "x" * LARGE}
        large = chat(messages=[before, *json.loads(small)["messages"]])
        assert (await g.ask(small)).status == 200
        assert work == []
        assert (await g.ask(large)).status == 200
        assert work == ["_prepared", "_digests", "upstream_body"]
        suspect = call_failure(Cause.NATIVE_CRASH, Aftermath.EXITED, "it crashed", backend="tiny:0", generation=1)
        g.forwarder.guard.quarantine.note(b"another", suspect, model="tiny", tokens=1, now=g.service._clock())
        work.clear()
        assert (await g.ask(large)).status == 200
        assert work == ["_prepared", "_digests", "Fingerprint", "upstream_body", "Fingerprint"]
        work.clear()
        assert (await g.ask(gzip.compress(small), CHAT, "content-encoding: gzip")).status == 200
        assert work == ["_prepared"], "what it becomes is not known beforehand"
        two = json.loads(large) | {"n": 2}
        work.clear()
        assert len((await g.ask(json.dumps(two).encode())).json["choices"]) == 2
        assert work.count("_digests") == 1, "both choices have the same prompt"


async def test_bodies_have_one_memory(gateway: Any) -> None:
    """Refused before it is read; small requests pass; what is parsed counts until it is answered."""
    async with gateway() as g:
        await g.ready()
        memory = g.service.body_memory
        memory.total = 8 << 20
        async with g.wire() as unfinished, g.wire() as refused:
            await unfinished.send(
                b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 7000000\r\n\r\n"
            )
            await unfinished.send(b" " * 6_900_000)
            await until(lambda: memory.held >= 6_900_000, "it is read")
            await refused.send(
                b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000000\r\n\r\n"
            )
            answer = await refused.answer()
            assert (answer.status, answer.error["code"]) == (503, "overloaded")
            assert "server.body_memory" in answer.error["message"]
            assert b"retry-after" in answer.headers
            bomb = gzip.compress(b" " * 3_000_000)
            inflated = await g.ask(bomb, CHAT, "content-encoding: gzip")
            assert (inflated.status, inflated.error["code"]) == (503, "overloaded")
            assert (await g.ask(chat("FAKE n=1"))).status == 200
        await until(lambda: memory.held == 0, "all is given back")
        before = {"role": "user", "content": "x" * 1_000_000}
        async with g.wire() as wire:
            await wire.post(CHAT, chat(messages=[before, *json.loads(chat(ENDLESS))["messages"]], stream=True))
            await wire.head()
            assert 2_000_000 <= memory.held < 2_100_000, "the text, and what is sent of it"
        await until(lambda: memory.held == 0, "all is given back")


TEXT = "The river flows under the bridge. "
LARGE_PROMPTS = {"one message": [TEXT * (20_000_000 // len(TEXT))], "many messages": [TEXT * 65] * 9000}  # 20 MB


@pytest.mark.parametrize("contents", LARGE_PROMPTS.values(), ids=LARGE_PROMPTS)
async def test_a_large_body_does_not_hold_up_the_event_loop(gateway: Any, contents: list[str]) -> None:
    """From its last byte to its answer, by a model with several replicas, while the quarantine is not empty."""
    messages = [{"role": "user", "content": content} for content in [*contents, "FAKE n=1"]]
    body = chat(messages=messages)
    async with gateway(replicas=2) as g:
        await g.ready()
        suspect = call_failure(Cause.NATIVE_CRASH, Aftermath.EXITED, "it crashed", backend="tiny:0", generation=1)
        g.forwarder.guard.quarantine.note(b"another", suspect, model="tiny", tokens=1, now=g.service._clock())

        async def ask() -> None:
            slow = Slow(body)
            slow.read_on.set()
            client = ClientConnection({"type": "http", "headers": []}, slow.receive, slow.send, "req_1")
            await asyncio.ensure_future(g.service.serve(client, Kind.CHAT))  # each step of a task is timed
            assert client.status == 200

        await assert_bounded(ask, 0.05)


async def test_an_answer_and_its_line(gateway: Any) -> None:
    async with gateway(aliases=["default"]) as g:
        body = json.loads(chat("FAKE n=5"))
        del body["model"]
        answer = await g.ask(json.dumps(body).encode(), CHAT, "x-request-id: mine", "content-encoding: identity")
        assert (answer.status, answer.headers[b"x-request-id"]) == (200, b"mine")
        assert answer.headers[b"x-gateway-backend"] == b"tiny:0"
        line = await g.line()
        shown = {key: line[key] for key in ("request_id", "status", "model", "backend", "attempts", "stream", "tokens")}
        assert shown == {
            "request_id": "mine",
            "status": 200,
            "model": "tiny",
            "backend": "tiny:0",
            "attempts": 1,
            "stream": False,
            "tokens": 5,
        }
        assert line["prompt_tokens"] == answer.json["usage"]["prompt_tokens"]
        assert 0 < line["first_ms"] <= line["ms"]
        assert not {"ended", "code", "failed"} & set(line)
        assert line["levelno"] == logging.INFO


async def test_the_line_of_a_request_that_failed(gateway: Any) -> None:
    async with gateway() as g:
        answer = await g.ask(chat("FAKE segfault after=0"))
        assert (answer.status, answer.error["code"]) == (503, "backend_crashed")
        line = await g.line()
        failed = "tiny:0=native_crash,tiny:0=native_crash"
        assert (line["code"], line["failed"], line["attempts"]) == ("backend_crashed", failed, 2)
        assert (line["status"], line["levelno"], line["first_ms"]) == (503, logging.WARNING, None)


# -- clients that leave, and clients that do not read ------------------------------------------------------------------


async def test_a_client_that_leaves_in_mid_body(gateway: Any) -> None:
    async with gateway() as g:
        async with g.wire() as wire:
            await wire.send(b"POST /v1/completions HTTP/1.1\r\ncontent-length: 9\r\n\r\nhalf")
            await until(lambda: g.service._requests, "the request is under way")
        line = await g.line()
        assert (line["ended"], line["status"], "model" in line) == ("client_left", 0, False)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("how", ["hang_up", "reset"])
async def test_a_client_that_leaves_while_it_is_answered(how: str, stream: bool, gateway: Any) -> None:
    async with gateway() as g:
        await g.ready()
        async with g.wire() as wire:
            await wire.post(CHAT, chat(ENDLESS, stream=stream))
            if stream:
                assert (await wire.head())[1] == 200
                await wire.chunk()
            await g.busy()
            getattr(wire, how)()
        await g.busy(0)
        line = await g.line()
        assert (line["ended"], line["status"], line["backend"]) == ("client_left", 200 if stream else 0, "tiny:0")
        assert (await g.ask(chat("FAKE n=1"))).status == 200
        assert g.backend.snapshot().last_failure is None


async def test_a_client_that_leaves_while_it_stands_in_line(gateway: Any) -> None:
    async with gateway(max_inflight=1) as g:
        await g.ready()
        async with g.wire() as first:
            await first.post(CHAT, chat(ENDLESS, stream=True))
            await g.busy()
            async with g.wire() as second:
                await second.post(CHAT, chat(ENDLESS))
                await until(lambda: g.fleet.pools["tiny"].queued == 1, "one stands in line")
            await until(lambda: g.fleet.pools["tiny"].queued == 0, "nobody stands in line")
            line = await g.line()
            assert (line["ended"], line["backend"], line["attempts"]) == ("client_left", None, 0)
            await first.head()
            assert await first.chunk(), "the other goes on"


async def test_a_client_that_leaves_after_its_answer(gateway: Any) -> None:
    async with gateway() as g:
        for _ in range(3):
            assert (await g.ask(chat("FAKE n=2", stream=True))).body.endswith(b"data: [DONE]\n\n")
        await until(lambda: len(g.lines) == 3, "three lines")
        assert all("ended" not in line and line["status"] == 200 for line in g.lines)


async def test_a_client_that_does_not_read_gives_its_slot_back(gateway: Any) -> None:
    async with gateway(send_timeout=0.3, max_inflight=1) as g:
        await g.ready()
        with socket.socket() as deaf:
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            deaf.connect(("127.0.0.1", g.port))
            body = chat(FLOOD, stream=True)
            deaf.sendall(b"POST %b HTTP/1.1\r\ncontent-length: %d\r\n\r\n%b" % (CHAT.encode(), len(body), body))
            await g.busy()
            line = await g.line()
            assert (line["ended"], line["status"]) == ("client_does_not_read", 200)
            await g.busy(0)
            assert (await g.ask(chat("FAKE n=1"))).status == 200
        assert g.backend.snapshot().last_failure is None


class Slow:
    """A client that takes the end of its answer only when it is told to."""

    def __init__(self, body: bytes) -> None:
        self.at_the_end = asyncio.Event()
        self.read_on = asyncio.Event()
        self.got = b""
        self._body = body

    async def receive(self) -> Message:
        if not self._body:
            await asyncio.get_running_loop().create_future()  # it stays
        body, self._body = self._body, b""
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(self, message: Message) -> None:
        body = message.get("body", b"")
        if b"[DONE]" in body or (body and not message["more_body"]):
            self.at_the_end.set()
            await self.read_on.wait()
        self.got += body


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_is_slow_to_read_the_end_of_its_answer_holds_no_slot(gateway: Any, stream: bool) -> None:
    async with gateway(max_inflight=1) as g:
        await g.ready()
        slow = Slow(chat("FAKE n=3", stream=stream))
        client = ClientConnection({"type": "http", "headers": []}, slow.receive, slow.send, "req_1")
        serving = asyncio.ensure_future(g.service.serve(client, Kind.CHAT))
        await slow.at_the_end.wait()
        assert g.backend.inflight == 0
        assert (await g.ask(chat("FAKE n=1"))).status == 200
        assert not serving.done()
        slow.read_on.set()
        await serving
        assert slow.got.endswith(b"data: [DONE]\n\n") if stream else json.loads(slow.got)["choices"]


# -- the end -----------------------------------------------------------------------------------------------------------


async def test_draining_lets_those_under_way_finish(gateway: Any) -> None:
    async with gateway() as g:
        await g.ready()
        async with g.wire() as wire:
            await wire.post(CHAT, chat("FAKE n=20 delay=0.02", stream=True))
            await g.busy()
            draining = asyncio.ensure_future(g.service.drain(30.0))
            await until(lambda: g.service.draining, "it drains")
            late = await g.ask(chat())
            assert (late.status, late.error["code"]) == (503, "shutting_down")
            assert late.headers[b"retry-after"] == b"5"
            assert (await wire.answer()).body.endswith(b"data: [DONE]\n\n")
            await draining


async def test_draining_ends_those_that_take_too_long(gateway: Any) -> None:
    async with gateway(max_inflight=2) as g:
        await g.ready()
        async with g.wire() as streamed, g.wire() as plain, g.wire() as waiting:
            await streamed.post(CHAT, chat(ENDLESS, stream=True))
            await streamed.head()
            assert await streamed.chunk()
            await plain.post(CHAT, chat(ENDLESS))
            await g.busy(2)
            await waiting.post(CHAT, chat(ENDLESS, stream=True))
            await until(lambda: g.fleet.pools["tiny"].queued == 1, "one stands in line")
            await g.service.drain(0.05)
            rest = b""
            while part := await streamed.chunk():
                rest += part
            *_, tail, done, empty = rest.split(b"\n\n")
            assert (json.loads(tail[6:])["error"]["code"], done, empty) == ("shutting_down", b"data: [DONE]", b"")
            for wire in (plain, waiting):
                answer = await wire.answer()
                assert (answer.status, answer.error["code"]) == (503, "shutting_down")
        await g.busy(0)
        assert {line["ended"] for line in g.lines} == {"shutdown"}
        assert len(g.lines) == 3


# -- poison ------------------------------------------------------------------------------------------------------------


async def test_a_body_that_ended_two_backends_is_not_let_in(gateway: Any) -> None:
    async with gateway(aliases=["other"]) as g:
        poison = "FAKE segfault after=0"
        await g.ready()
        crashed = await g.ask(chat(poison))
        assert (crashed.status, crashed.error["code"]) == (503, "backend_crashed")
        assert crashed.headers[b"x-should-retry"] == b"false"
        await g.ready()
        before = g.backend.snapshot()
        for again in (chat(poison), chat(poison, stream=True), chat(poison, model="other", user="somebody else")):
            refused = await g.ask(again)
            assert (refused.status, refused.error["code"], refused.error["model"]) == (400, "invalid_request", "tiny")
            assert "2 failures" in refused.error["message"]
            assert b"x-gateway-backend" not in refused.headers
        after = g.backend.snapshot()
        assert (after.pid, after.generation, after.state) == (before.pid, before.generation, State.READY)
        assert (await g.ask(chat("FAKE n=1"))).status == 200
        assert len(g.register.ever) == 3


async def test_a_crash_in_company_is_of_those_that_had_no_token_yet(gateway: Any) -> None:
    """The suspect is tried again, alone; the bystander has nothing to answer for."""
    async with gateway() as g:
        other, poison = chat(ENDLESS, stream=True), chat("FAKE segfault after=0")
        await g.ready()
        async with g.wire() as wire:
            await wire.post(CHAT, other)
            await wire.head()
            await wire.chunk()
            asking = asyncio.ensure_future(g.ask(poison))
            assert b"backend_crashed" in await wire.until(b"data: [DONE]\n\n")
        crashed = await asking
        assert (crashed.error["code"], crashed.headers[b"x-gateway-attempts"]) == ("backend_crashed", b"2")
        await g.ready()
        (known,) = g.service.known()["requests"]
        assert (known["failures"], known["cause"], known["refused"]) == (2, "native_crash", True)
        assert (await g.ask(poison)).error["code"] == "invalid_request"
        assert g.service.forget(known["fingerprint"]) == 1
        assert g.service.known()["requests"] == []


# -- retries of the client's own ---------------------------------------------------------------------------------------


async def test_a_retry_ends_no_equal_request_whose_client_waits(gateway: Any) -> None:
    """Two users behind one proxy, or two requests of one program, may send the same: the SDK of one retries."""
    async with gateway(max_inflight=3) as g:
        await g.ready()
        body = chat("FAKE n=4 delay=0.1")
        async with g.wire() as waits, g.wire() as retried, g.wire() as retry:
            await waits.post(CHAT, body, "x-stainless-retry-count: 0")
            await retried.post(CHAT, body, "x-stainless-retry-count: 0")
            await g.busy(2)
            await retry.post(CHAT, body, "x-stainless-retry-count: 1")
            answers = [await wire.answer() for wire in (waits, retried, retry)]
        assert [answer.status for answer in answers] == [200, 200, 200]


async def test_a_first_try_whose_connection_is_gone_is_ended_before_its_retry(gateway: Any) -> None:
    async with gateway(max_inflight=1, max_queue=0) as g:
        await g.ready()
        async with g.wire() as first:
            await first.post(CHAT, chat(ENDLESS), "x-stainless-retry-count: 0")
            await g.busy(1)
        await g.busy(0)
        assert (await g.line())["ended"] == "client_left"
        assert (await g.ask(chat("FAKE n=1"), CHAT, "x-stainless-retry-count: 1")).status == 200


# -- several answers ---------------------------------------------------------------------------------------------------


async def test_several_choices_of_one_chat(gateway: Any) -> None:
    async with gateway(max_inflight=2) as g:
        await g.ready()
        answer = await g.ask(chat("FAKE n=4", n=3, temperature=1, seed=7))
        assert answer.status == 200
        body = json.loads(answer.body)
        assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
        texts = [choice["message"]["content"] for choice in body["choices"]]
        assert len(set(texts)) == 3, "each has a seed of its own"
        usage = body["usage"]
        assert usage["completion_tokens"] == 12
        assert usage["total_tokens"] == usage["prompt_tokens"] + 12
        one = json.loads((await g.ask(chat("FAKE n=4", temperature=1, seed=7))).body)
        assert one["usage"]["prompt_tokens"] == usage["prompt_tokens"]
        assert one["choices"][0]["message"]["content"] == texts[0]
        assert (g.lines[0]["choices"], g.lines[0]["tokens"], g.lines[0]["attempts"]) == (3, 12, 3)


async def test_a_list_of_prompts_streamed(gateway: Any) -> None:
    async with gateway(max_inflight=2) as g:
        await g.ready()
        body = {"model": "tiny", "prompt": ["FAKE n=3 delay=0.01", "FAKE n=5"], "stream": True}
        answer = await g.ask(
            json.dumps({**body, "stream_options": {"include_usage": True}}).encode(), "/v1/completions"
        )
        *events, last = [part[6:] for part in answer.body.split(b"\n\n") if part.startswith(b"data: ")]
        assert last == b"[DONE]"
        chunks = [json.loads(event) for event in events]
        assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
        assert (chunks[-1]["choices"], chunks[-1]["usage"]["completion_tokens"]) == ([], 8)
        assert all("usage" not in chunk for chunk in chunks[:-1])
        words = {0: "", 1: ""}
        finished = []
        for chunk in chunks[:-1]:
            (choice,) = chunk["choices"]
            words[choice["index"]] += choice["text"]
            finished += [choice["index"]] if choice["finish_reason"] else []
        assert [len(text.split()) for text in words.values()] == [3, 5]
        assert sorted(finished) == [0, 1]


@pytest.mark.parametrize("stream", [False, True])
async def test_if_one_of_several_fails_all_do(gateway: Any, stream: bool) -> None:
    async with gateway(max_inflight=3) as g:
        await g.ready()
        body = {
            "model": "tiny",
            "prompt": ["FAKE eof after=2", ENDLESS, ENDLESS],
            "max_tokens": 10**6,
            "stream": stream,
        }
        answer = await g.ask(json.dumps(body).encode(), "/v1/completions")
        assert answer.body.count(b'"error"') == 1
        assert b"stream_truncated" in answer.body
        assert answer.status == (200 if stream else 503)
        await g.busy(0)


async def test_a_client_that_leaves_ends_all_its_parts(gateway: Any) -> None:
    async with gateway(max_inflight=4) as g:
        await g.ready()
        async with g.wire() as wire:
            await wire.post(CHAT, chat(ENDLESS, n=5))
            await g.busy(2)
        await g.busy(0)
        assert g.fleet.pools["tiny"].queued == 0
        assert (await g.line())["ended"] == "client_left"


async def test_a_compressed_body(gateway: Any) -> None:
    async with gateway({"max_body": 2048}) as g:
        await g.ready()
        assert (await g.ask(gzip.compress(chat("FAKE n=2")), CHAT, "content-encoding: gzip")).status == 200
        bomb = await g.ask(gzip.compress(chat("x" * 100_000)), CHAT, "content-encoding: gzip")
        assert (bomb.status, bomb.error["code"]) == (413, "request_too_large")
        broken = await g.ask(chat(), CHAT, "content-encoding: gzip")
        assert (broken.status, broken.error["code"]) == (400, "invalid_request")


async def test_a_body_that_no_budget_has_room_for_is_no_overload(gateway: Any) -> None:
    async with gateway({"body_memory": 1 << 20, "max_body": 8 << 20}) as g:
        await g.ready()
        refused = await g.ask(chat("x" * (2 << 20)), CHAT)
        assert (refused.status, refused.error["code"]) == (413, "request_too_large")
        assert "server.body_memory" in refused.error["message"]
        assert "retry-after" not in refused.headers


async def test_copies_wait_until_the_first_of_them_has_a_token(gateway: Any) -> None:
    """A prompt that ends backends ends no more of them for being asked for several times."""
    async with gateway(max_inflight=8) as g:
        await g.ready()
        async with g.wire() as wire:
            await wire.post(CHAT, chat("FAKE n=1000000 head-delay=0.3 delay=0.02", n=4))
            await g.busy(1)
            await g.busy(4)
        await g.busy(0)
        async with g.wire() as wire:
            await wire.post(CHAT, chat("FAKE segfault after=0", n=4))
            assert (await wire.answer()).error["code"] == "backend_crashed"
        assert len(g.register.ever) == 2, "it was tried once more, alone"
        (known,) = g.service.known()["requests"]
        assert (known["failures"], known["refused"]) == (2, True)


async def test_one_request_takes_half_of_the_slots_at_most(gateway: Any) -> None:
    async with gateway(max_inflight=4, max_queue=0) as g:
        await g.ready()
        answer = await g.ask(chat("FAKE n=3 delay=0.01", n=16))
        assert answer.status == 200
        assert len(json.loads(answer.body)["choices"]) == 16
        async with g.wire() as wire:
            await wire.post(CHAT, chat(ENDLESS, n=16))
            await g.busy(2)
            assert (await g.ask(chat("FAKE n=1"))).status == 200
        await g.busy(0)

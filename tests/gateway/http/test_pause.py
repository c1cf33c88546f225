"""A model with one replica that ends: for the clients a pause, unless it would outlast their patience."""

import asyncio
import os
import time
from pathlib import Path
from signal import SIGKILL
from typing import Any

import pytest

from backends.admission.reading_rate import ReadingRate
from backends.domain.state import State
from tests.gateway.http.whole import CHAT, COMMAND, Gateway, chat
from tests.lives import until

pytestmark = pytest.mark.usefixtures("nothing_left")

SOON = {"min_backoff": "300ms", "max_backoff": "300ms"}
LATE = {"min_backoff": "30s", "max_backoff": "30s"}


def kill(g: Gateway) -> None:
    pid = g.backend.snapshot().pid
    assert pid is not None
    os.kill(pid, SIGKILL)


async def killed(g: Gateway) -> None:
    """After it has answered once, so that it is replaced after ``min_backoff``."""
    await g.ready()
    assert (await g.ask(chat("FAKE n=1"))).status == 200
    kill(g)
    await until(lambda: g.backend.state is State.BACKOFF, "it is gone")


async def test_what_comes_meanwhile_waits(gateway: Any) -> None:
    async with gateway(restart=SOON) as g:
        await killed(g)
        answer = await g.ask(chat("FAKE n=3"))
        assert (answer.status, answer.headers[b"x-gateway-attempts"]) == (200, b"1")
        assert answer.headers[b"x-gateway-queue"].endswith(b" s: restarting")
        assert b"x-gateway-queue" not in (await g.ask(chat("FAKE n=3"))).headers


async def test_a_stream_is_told_what_it_waits_for(gateway: Any) -> None:
    async with gateway(restart={"min_backoff": "1300ms", "max_backoff": "1300ms"}) as g:
        await killed(g)
        began = time.monotonic()
        async with g.wire() as wire:
            await wire.post(CHAT, chat("FAKE n=3", stream=True))
            _, status, headers = await wire.head()
            assert time.monotonic() - began >= 0.9, "until then a refusal has a status of its own"
            told = await wire.chunk()
            assert (status, b"x-gateway-backend" in headers) == (200, False)
            assert told.startswith(b": model tiny restarting after killed, 1 s so far, about ")
            assert (await wire.until(b"data: [DONE]\n\n")).count(b"data: {") >= 3


@pytest.mark.parametrize("stream", [True, False])
async def test_what_has_no_content_is_sent_again(gateway: Any, stream: bool) -> None:
    async with gateway() as g:
        await g.ready()
        asking = asyncio.ensure_future(g.ask(chat("FAKE n=3 delay=0.3", stream=stream, temperature=0.7)))
        await g.busy(1)
        kill(g)
        answer = await asking
        assert (answer.status, answer.headers[b"x-gateway-attempts"]) == (200, b"2")
        assert (await g.line())["failed"] == "tiny:0=killed"


async def test_each_of_several_answers_is(gateway: Any) -> None:
    async with gateway() as g:
        await g.ready()
        asking = asyncio.ensure_future(g.ask(chat("FAKE n=3 delay=0.3", n=2)))
        await g.busy(1)
        kill(g)
        answer = await asking
        assert (answer.status, len(answer.json["choices"])) == (200, 2)


@pytest.mark.parametrize(
    ("model", "header", "told"),
    [
        ({"queue_timeout": "20s"}, "", 20),
        ({"timeouts": {"total": "15s"}}, "", 15),
        ({}, "x-stainless-read-timeout: 10", 10),
        ({"queue_timeout": "20s", "timeouts": {"total": "15s"}}, "x-stainless-read-timeout: 10", 10),
    ],
)
async def test_what_would_be_back_too_late_is_told_at_once(
    gateway: Any, model: dict[str, Any], header: str, told: int
) -> None:
    async with gateway(restart=LATE, **model) as g:
        await killed(g)
        for stream in (True, False):
            began = time.monotonic()
            answer = await g.ask(chat("FAKE n=3", stream=stream), CHAT, *([header] if header else []))
            assert time.monotonic() - began < 5.0
            assert (answer.status, answer.error["code"]) == (503, "model_unavailable")
            assert 25 <= int(answer.headers[b"retry-after"]) <= 59
            message = answer.error["message"]
            assert "tiny:0 starts again in about" in message
            assert "should be ready in about" in message
            assert any(f"This request may wait {seconds} s" in message for seconds in (told, told - 1)), message


async def test_the_reading_of_the_prompt_counts(gateway: Any) -> None:
    """After a restart nothing of it is in the prompt cache."""
    async with gateway(restart=SOON, queue_timeout="10s") as g:
        await killed(g)
        flight = g.fleet.backends["tiny:0"].flight
        flight.reading = ReadingRate()  # without the fake's own, which reads in no time
        flight.reading.note(1000, 0, 10.0)
        long = await g.ask(chat("FAKE n=1\n" + "word " * 4000))
        assert (long.status, long.error["code"]) == (503, "model_unavailable")
        assert (await g.ask(chat("FAKE n=1"))).status == 200


async def test_a_client_that_leaves_frees_its_place(gateway: Any) -> None:
    async with gateway(restart=LATE) as g:
        await killed(g)
        async with g.wire() as wire:
            await wire.post(CHAT, chat("FAKE n=3"))
            await until(lambda: g.fleet.pools["tiny"].queued == 1, "it waits")
        await until(lambda: g.fleet.pools["tiny"].queued == 0, "its place is free")
        assert [line["ended"] for line in g.lines if "ended" in line] == ["client_left"]


async def test_a_fallback_that_is_ready_answers_at_once(gateway: Any) -> None:
    others = {"spare": {"command": COMMAND, "model": "fake"}}
    async with gateway(restart=LATE, fallbacks=["spare"], others=others) as g:
        await killed(g)
        await until(lambda: g.fleet.backends["spare:0"].state is State.READY, "the fallback is ready")
        assert (await g.ask(chat("FAKE n=1"))).headers[b"x-gateway-model"] == b"spare"


async def test_a_fallback_that_is_down_too_changes_nothing(gateway: Any, tmp_path: Path) -> None:
    never = f"load-until={tmp_path / 'never'}"
    others = {"spare": {"command": [*COMMAND, "--mode", never], "model": "fake"}}
    async with gateway(restart=SOON, fallbacks=["spare"], others=others) as g:
        await g.ready()
        assert g.fleet.backends["spare:0"].state is not State.READY
        assert (await g.ask(chat("FAKE n=1"))).headers[b"x-gateway-model"] == b"tiny"


async def test_a_fallback_is_not_loaded_for_a_pause(gateway: Any) -> None:
    others = {"spare": {"command": COMMAND, "model": "fake", "load": "on_demand"}}
    async with gateway(restart=SOON, fallbacks=["spare"], others=others) as g:
        await killed(g)
        assert (await g.ask(chat("FAKE n=1"))).headers[b"x-gateway-model"] == b"tiny"
        assert g.fleet.backends["spare:0"].state is State.UNLOADED
    async with gateway(restart=LATE, queue_timeout="10s", fallbacks=["spare"], others=others) as g:
        await killed(g)
        assert (await g.ask(chat("FAKE n=1"))).headers[b"x-gateway-model"] == b"spare", "that one is back sooner"

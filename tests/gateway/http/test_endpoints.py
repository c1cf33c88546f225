"""What can be seen and done from outside: health, output, commands. Over real sockets, with real children."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from backends.domain.state import State
from backends.fleet import AnyBackend, Fleet
from gateway.app import forwarder_of, service_of
from gateway.cli import server
from gateway.config import parse
from gateway.forward.body_workers import BodyWorkers
from gateway.http import endpoints
from gateway.plan import plans
from tests.lives import FAKE, runtime, until
from tests.serving import Answer, Wire, listening

pytestmark = pytest.mark.usefixtures("nothing_left")

COMMAND = [sys.executable, str(FAKE), "--host", "{host}", "--port", "{port}", "--model", "{model}"]
KEY = "authorization: Bearer secret"


class Gateway:
    """``tiny`` is a child of ours, ``far`` a server that is not there."""

    def __init__(self, server_keys: dict[str, Any]) -> None:
        models = {"tiny": {"command": COMMAND, "model": "fake"}, "far": {"urls": ["http://127.0.0.1:9"]}}
        made = parse(json.dumps({"server": server_keys, "models": models}), "c.yaml", {})
        clock, fleet, workers = asyncio.get_running_loop().time, Fleet(plans(made), runtime()), BodyWorkers()
        self.service = service_of(
            made, fleet, forwarder_of(made, fleet, workers, clock), workers, clock=clock, created=0
        )
        self.port = 0

    @property
    def tiny(self) -> AnyBackend:
        return self.service.fleet.backends["tiny:0"]

    def wire(self) -> Wire:
        return Wire(self.port)

    async def get(self, path: str, *headers: str) -> Answer:
        async with self.wire() as wire:
            await wire.get(path, *headers)
            return await wire.answer()

    async def post(self, path: str, *headers: str) -> Answer:
        async with self.wire() as wire:
            await wire.post(path, b"", *headers)
            return await wire.answer()

    async def state(self, state: State) -> None:
        await until(lambda: self.tiny.state is state, state)


@asynccontextmanager
async def gateway(**server_keys: Any) -> AsyncIterator[Gateway]:
    """Nothing is started."""
    one = Gateway(server_keys)
    try:
        async with listening(server._uvicorn(one.service)) as (_, one.port):
            yield one
            one.service.end_all()
    finally:
        await one.service.fleet.close()


# -- health ------------------------------------------------------------------------------------------------------------


async def test_health_follows_the_backend() -> None:
    async with gateway() as g:
        told = await g.get("/health")
        assert (told.status, told.json["status"]) == (503, "unavailable")
        assert (await g.get("/readyz")).status == 503
        g.service.fleet.start()
        await g.state(State.READY)
        told = await g.get("/health")
        assert (told.status, told.json["status"]) == (200, "degraded"), "far is not there"
        (shown,) = told.json["models"]["tiny"]["backends"]
        assert (shown["id"], shown["state"], shown["pid"]) == ("tiny:0", "ready", g.tiny.snapshot().pid)
        assert (shown["inflight"], shown["restarts"], shown["last_failure"]) == (0, 0, None)
        assert (await g.get("/readyz")).status == 200
        g.service.draining = True
        assert (await g.get("/readyz")).status == 503
        assert (await g.get("/livez")).status == 200


async def test_who_is_told_what() -> None:
    async with gateway(api_keys=["secret"]) as g:
        assert (await g.get("/health")).json == {"status": "unavailable"}
        assert (await g.get("/health", "authorization: Bearer wrong")).json == {"status": "unavailable"}
        for header in (KEY, "x-api-key: secret"):
            assert set((await g.get("/health", header)).json["models"]) == {"tiny", "far"}
        assert [(await g.get(path)).status for path in ("/livez", "/readyz")] == [200, 503]
        for path in ("/api/status", "/api/backends/tiny:0/logs", "/v1/models"):
            answer = await g.get(path)
            assert (answer.status, answer.error["code"]) == (401, "invalid_api_key")
        answer = await g.post("/api/backends/tiny:0/start")
        assert (answer.status, g.tiny.state) == (401, State.STOPPED)


# -- commands ----------------------------------------------------------------------------------------------------------


async def test_a_life_by_command() -> None:
    """Each is 202 with what it led to, or 409 with why not."""
    async with gateway() as g:

        async def command(name: str, state: State) -> None:
            answer = await g.post(f"/api/backends/tiny:0/{name}")
            assert (answer.status, answer.json["id"]) == (202, "tiny:0")
            assert answer.headers[b"x-request-id"]
            await g.state(state)

        async def refused(name: str) -> str:
            before = g.tiny.snapshot()
            answer = await g.post(f"/api/backends/tiny:0/{name}")
            assert (answer.status, answer.error["code"], answer.error["type"]) == (
                409,
                "conflict",
                "invalid_request_error",
            )
            assert (answer.error["backend"], answer.error["model"]) == ("tiny:0", "tiny")
            after = g.tiny.snapshot()
            assert (after.state, after.pid, after.generation) == (before.state, before.pid, before.generation)
            return str(answer.error["message"])

        assert (await refused("drain")).startswith("tiny:0: ")
        await command("start", State.READY)
        assert "ready already" in await refused("start")
        first = g.tiny.snapshot().pid
        await command("restart", State.READY)
        await until(lambda: g.tiny.snapshot().pid not in (None, first), "another process")
        await g.state(State.READY)
        await command("stop", State.STOPPED)
        assert g.tiny.snapshot().pid is None
        await command("start", State.READY)


async def test_a_command_without_a_backend_or_a_meaning() -> None:
    async with gateway() as g:
        for path, words in (
            ("tiny:0/explode", "start, stop, restart, drain"),
            ("tiny/start", "tiny:0, far:0"),
            ("tiny:1/start", "tiny:0, far:0"),
            ("%C2%B2/start", "²"),
        ):
            answer = await g.post(f"/api/backends/{path}")
            assert (answer.status, answer.error["code"]) == (404, "not_found")
            assert words in answer.error["message"]
        answer = await g.get("/api/backends/tiny:0/start")
        assert (answer.status, answer.error["code"]) == (405, "method_not_allowed")
        assert answer.headers[b"allow"] == b"POST"
        assert g.tiny.state is State.STOPPED


# -- output ------------------------------------------------------------------------------------------------------------


async def test_the_last_lines() -> None:
    async with gateway() as g:
        for number in range(150):
            g.tiny.output.append(f"line {number} é")
        path = "/api/backends/tiny:0/logs"
        plain = await g.get(path)
        assert plain.headers[b"content-type"] == b"text/plain; charset=utf-8"
        lines = plain.body.decode().splitlines()
        assert (len(lines), lines[0], lines[-1]) == (100, "line 50 é", "line 149 é")
        assert (await g.get(f"{path}?lines=2")).body.decode() == "line 148 é\nline 149 é\n"
        assert (await g.get(f"{path}?lines=0")).body == b""
        assert len((await g.get(f"{path}?lines=999999999")).body.splitlines()) == 150
        assert (await g.get("/api/backends/far:0/logs")).body == b""


@pytest.mark.parametrize(
    "lines", ["", "-1", "1.5", "many", "%C2%B2", "%D9%A3", "1e3", "+1", "%201", "9999999999", "0x10"]
)
async def test_lines_that_are_no_number(lines: str) -> None:
    async with gateway() as g:
        answer = await g.get(f"/api/backends/tiny:0/logs?lines={lines}")
        assert (answer.status, answer.error["code"], answer.error["param"]) == (400, "invalid_request", "lines")


@pytest.mark.parametrize("follow", ["1", "true"])
async def test_following_ends_with_the_gateway(follow: str) -> None:
    async with gateway() as g:
        g.tiny.output.append("before")
        async with g.wire() as wire:
            await wire.get(f"/api/backends/tiny:0/logs?lines=1&follow={follow}")
            assert (await wire.head())[1] == 200
            assert await wire.chunk() == b"before\n"
            for number in range(3):
                g.tiny.output.append(f"after {number}")
                assert await wire.chunk() == b"after %d\n" % number
            g.service.end_all()
            assert await wire.chunk() == b""


async def test_a_reader_that_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    follow = endpoints.Endpoints._follow
    body_complete = asyncio.Event()

    async def watched(self: endpoints.Endpoints, backend: AnyBackend, tail: list[str]) -> AsyncIterator[str]:
        try:
            async for part in follow(self, backend, tail):
                yield part
        finally:
            body_complete.set()

    monkeypatch.setattr(endpoints.Endpoints, "_follow", watched)
    async with gateway() as g:
        g.tiny.output.append("before")
        async with g.wire() as wire:
            await wire.get("/api/backends/tiny:0/logs?follow=1")
            assert not body_complete.is_set()
            await wire.head()
            assert await wire.chunk() == b"before\n"
        async with asyncio.timeout(30):
            await body_complete.wait()


async def test_no_following_unless_it_is_asked_for() -> None:
    async with gateway() as g:
        g.tiny.output.append("before")
        assert (await g.get("/api/backends/tiny:0/logs?follow=0")).body == b"before\n"

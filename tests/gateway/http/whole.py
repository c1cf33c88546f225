"""A whole gateway in this process, over real sockets, with a real child that misbehaves when it is asked to."""

import asyncio
import json
import sys
from typing import Any

import pytest

from backends.domain.state import State
from backends.fleet import AnyBackend, Fleet
from gateway.app import forwarder_of, service_of
from gateway.config import parse
from gateway.forward.body_workers import BodyWorkers
from gateway.plan import plans
from tests.lives import FAKE, Register, runtime, until
from tests.serving import Answer, Wire

CHAT = "/v1/chat/completions"
COMMAND = [sys.executable, str(FAKE), "--host", "{host}", "--port", "{port}", "--model", "{model}"]
RESTART = {"min_backoff": "20ms", "max_backoff": "50ms"}
ENDLESS = "FAKE n=1000000 delay=0.02"
FLOOD = "FAKE n=1000000"


def chat(words: str = "hello", **more: Any) -> bytes:
    body = {"model": "tiny", "messages": [{"role": "user", "content": words}], "max_tokens": 1_000_000, **more}
    return json.dumps(body).encode()


class Gateway:
    def __init__(self, config: dict[str, Any], caplog: pytest.LogCaptureFixture, send_timeout: float) -> None:
        made = parse(json.dumps(config), "c.yaml", {})
        self.register = Register()
        self.fleet = Fleet(plans(made), runtime(self.register))
        self.workers = BodyWorkers()
        clock = asyncio.get_running_loop().time
        self.forwarder = forwarder_of(made, self.fleet, self.workers, clock)
        self.service = service_of(
            made, self.fleet, self.forwarder, self.workers, clock=clock, created=0, send_timeout=send_timeout
        )
        self.port = 0
        self._log = caplog

    @property
    def backend(self) -> AnyBackend:
        return self.fleet.backends["tiny:0"]

    def wire(self) -> Wire:
        return Wire(self.port)

    async def ask(self, body: bytes, path: str = CHAT, *headers: str) -> Answer:
        async with self.wire() as wire:
            await wire.post(path, body, *headers)
            return await wire.answer()

    async def ready(self) -> None:
        await until(lambda: self.backend.state is State.READY, "the backend is ready")

    async def busy(self, count: int = 1) -> None:
        await until(lambda: self.backend.inflight == count, f"{count} in flight")

    @property
    def lines(self) -> list[dict[str, Any]]:
        """The lines of the log about requests."""
        return [record.__dict__ for record in self._log.records if record.name == "gateway.request"]

    async def line(self) -> dict[str, Any]:
        """The only one, once it is there."""
        await until(lambda: self.lines, "a line in the log")
        (line,) = self.lines
        return line

"""Error answers of a backend, read within bounds."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from backends.domain.failure import NO_CODES
from backends.upstream.exchange import Request
from backends.upstream.h1_client import H1Dialer
from gateway.forward import attempt
from gateway.forward.attempt import Attempts
from tests.faultserver import Conn, FaultServer


async def drips(conn: Conn) -> None:
    await conn.request()
    await conn.send(b'HTTP/1.1 400 Bad Request\r\ncontent-length: 100000\r\n\r\n{"error": "no such field"')
    while True:
        await conn.send(b" ")
        await asyncio.sleep(0.01)


async def test_an_error_body_that_drips_has_a_bound_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempt, "ERROR_BODY_WAIT", 0.1)
    identity = SimpleNamespace(note_answer=lambda *_: None, is_mlx=False)
    secrets = SimpleNamespace(hide=str)
    lease: Any = SimpleNamespace(
        identity=identity, spec=SimpleNamespace(id="far:0", codes=NO_CODES, secrets=secrets), generation=1
    )
    attempts = Attempts({}, SimpleNamespace(), SimpleNamespace(), asyncio.get_running_loop().time)  # type: ignore[arg-type]
    async with FaultServer(drips) as server, asyncio.timeout(10):
        exchange = H1Dialer("127.0.0.1", server.port, jitter=lambda: 0.5).open(Request("POST", "/"))
        try:
            failure = await attempts.refusal(lease, exchange, await exchange.start())
        finally:
            exchange.close()
    assert "no such field" in failure.verdict.message
    assert "400" in failure.verdict.message

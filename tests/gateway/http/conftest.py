import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from backends.tasks import Tasks
from gateway.cli import server
from tests.gateway.http.whole import COMMAND, RESTART, Gateway
from tests.serving import listening


@pytest.fixture
def gateway(caplog: pytest.LogCaptureFixture) -> Any:
    caplog.set_level(logging.INFO, "gateway.request")

    @asynccontextmanager
    async def start(
        server_keys: dict[str, Any] | None = None,
        *,
        send_timeout: float = 60.0,
        others: dict[str, Any] | None = None,
        **model: Any,
    ) -> AsyncIterator[Gateway]:
        one = {"command": COMMAND, "model": "fake", "restart": RESTART, **model}
        far = {"urls": ["http://127.0.0.1:9"]}
        models = {"tiny": one, **(others or {"far": far})}  # with two of them, none is the default
        gateway = Gateway({"server": server_keys or {}, "models": models}, caplog, send_timeout)
        gateway.fleet.start()
        tasks = Tasks("test")
        tasks.start(gateway.service.hang_up_on_the_stuck(), "stuck clients")
        try:
            async with listening(server._uvicorn(gateway.service)) as (_, gateway.port):
                yield gateway
                gateway.service.end_all()
        finally:
            await tasks.close()
            await gateway.fleet.close()
        assert gateway.register.now == {}
        assert gateway.backend.inflight == 0
        assert gateway.service._requests == set()

    return start

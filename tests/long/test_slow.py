"""A slow server that lives is never condemned: nice 19 beside a busy process on each core, streams that decode and a
long prompt every minute; with the default of 2 minutes for ``timeouts.progress``.

    pytest -s -m slow tests/long/test_slow.py        SLOW_SECONDS=1800 by default
"""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest

from tests.integration.harness import Gateway, launched
from tests.integration.wire import Answer, Json, chat

SECONDS = float(os.environ.get("SLOW_SECONDS", "1800"))
STREAMS = 7
LONG_PROMPT = "the river and the lamp " * 1000
EVERY = 60.0  # seconds, a long prompt

pytestmark = [pytest.mark.slow, pytest.mark.timeout(SECONDS + 600)]


@contextmanager
def busy_cores() -> Iterator[None]:
    busy = [subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def slow_down(pid: int) -> None:
    """Linux: each thread has its own; macOS: the process."""
    psutil.Process(pid).nice(19)
    if sys.platform == "linux":
        for thread in psutil.Process(pid).threads():
            os.setpriority(os.PRIO_PROCESS, thread.id, 19)


class Client:
    """Asks again and again until ``end``; keeps what failed."""

    def __init__(self, gateway: Gateway, body: Json, *, pause: float, end: float) -> None:
        self.failed: list[Answer] = []
        self.answered = 0
        self._gateway = gateway
        self._body = body
        self._pause = pause
        self._end = end
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        while time.monotonic() < self._end:
            answer = self._gateway.ask(self._body)
            self.answered += 1
            if answer.code is not None:
                self.failed.append(answer)
            time.sleep(min(self._pause, max(0.0, self._end - time.monotonic())))


def test_a_slow_server_is_not_replaced(tiny_model: Path, tmp_path: Path) -> None:
    models = {"tiny": {"model": str(tiny_model), "timeouts": {"total": "2h"}}}
    with ExitStack() as stack:
        gateway = stack.enter_context(launched({"models": models}, tmp_path))
        pid = int(gateway.backend("tiny:0")["pid"])
        end = time.monotonic() + SECONDS
        short = [chat(f"story {n}", max_tokens=200, stream=True) for n in range(STREAMS)]
        clients = [Client(gateway, body, pause=0.0, end=end) for body in short]
        clients.append(Client(gateway, chat(LONG_PROMPT, max_tokens=20, stream=True), pause=EVERY, end=end))
        time.sleep(20.0)  # at full speed: what is learned of its rhythm is far from what follows
        stack.enter_context(busy_cores())
        slow_down(pid)
        while time.monotonic() < end:
            time.sleep(1.0)
            backend = gateway.backend("tiny:0")
            assert (backend["pid"], backend["last_failure"]) == (pid, None)
        answered = sum(client.answered for client in clients)
        failed = [answer for client in clients for answer in client.failed]
        sys.stdout.write(f"{answered} answers, {len(failed)} failed, in {SECONDS:g} s\n")
        assert failed == []
        assert answered > 0

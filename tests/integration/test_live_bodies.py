"""Bodies made to take memory and time: what the process of the gateway takes for them, and whom they hold up."""

import gzip
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import httpx
import psutil
import pytest

from tests.conftest import Launch
from tests.integration.harness import Gateway, fake, wait_until
from tests.integration.wire import CHAT, PATIENCE, Json, chat, of_response

pytestmark = pytest.mark.slow

MIB = 1 << 20
GZIP = {"content-type": "application/json", "content-encoding": "gzip"}


class Growth:
    """Bytes of memory that the process of a gateway has taken at most, on top of what it had. Reads it every 10 ms."""

    def __init__(self, gateway: Gateway) -> None:
        self._process = psutil.Process(gateway.process.pid)
        self._before = self._process.memory_info().rss
        self.most = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._over.wait(0.01):
            self.most = max(self.most, self._process.memory_info().rss - self._before)

    def end(self) -> None:
        self._over.set()
        self._thread.join()


@contextmanager
def growth(gateway: Gateway) -> Iterator[Growth]:
    one = Growth(gateway)
    try:
        yield one
    finally:
        one.end()


def unfinished(gateway: Gateway, size: int) -> socket.socket:
    """A request whose body lacks its last byte."""
    host, port = gateway.url.removeprefix("http://").split(":")
    sock = socket.create_connection((host, int(port)), PATIENCE)
    head = (
        f"POST {CHAT} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\ncontent-length: {size + 1}\r\n\r\n"
    )
    with suppress(OSError):  # refused, and closed
        sock.sendall(head.encode() + b" " * size)
    return sock


def test_unfinished_bodies_share_one_memory(launch: Launch) -> None:
    """Without a budget these 30 took 240 MiB."""
    gateway = launch({"server": {"body_memory": "64MiB"}, "models": {"tiny": fake("n=3")}})
    with growth(gateway) as grown, ExitStack() as open_sockets:
        for _ in range(30):
            open_sockets.enter_context(unfinished(gateway, 8 * MIB))
        assert gateway.ask(chat("hello")).status == 200
        refused = gateway.ask(chat("x" * 8 * MIB))
        assert (refused.status, refused.code) == (503, "overloaded")
        assert refused.error is not None
        assert "server.body_memory" in refused.error["message"]
    assert grown.most < 128 * MIB
    wait_until(lambda: gateway.ask(chat("x" * 8 * MIB)).status == 200, what="the memory is given back")


def test_a_compressed_prompt_takes_little_memory_and_time(launch: Launch, tiny_model: Path) -> None:
    """30 KB on the wire, 30 MiB of prompt: to tokenize 8 MiB of it whole took 3 GiB."""
    gateway = launch({"models": {"tiny": {"model": str(tiny_model), "max_context": 2048}}})
    prompt: Json = chat("0," * 15 * MIB)
    zeros = json.dumps({"a": [0] * 249_000})
    call = {"type": "function", "function": {"name": "f", "arguments": zeros}}
    calls = {**chat("hi"), "messages": [*chat("hi")["messages"], {"role": "assistant", "tool_calls": [call] * 40}]}
    with growth(gateway) as grown, httpx.Client(base_url=gateway.url, timeout=PATIENCE) as client:
        long = of_response(client.post(CHAT, content=gzip.compress(json.dumps(prompt).encode()), headers=GZIP))
        many = of_response(client.post(CHAT, content=gzip.compress(json.dumps(calls).encode()), headers=GZIP))
    assert (long.status, long.code) == (400, "context_length_exceeded")
    assert (many.status, many.code) == (400, "invalid_request")
    assert grown.most < 400 * MIB

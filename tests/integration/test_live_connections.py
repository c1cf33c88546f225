"""Connections to the running gateway, over raw sockets: odd clients get their answer, rude ones shut nobody out."""

import json
import socket
import sys
from contextlib import ExitStack, suppress
from signal import SIGKILL
from typing import Self
from urllib.parse import urlsplit

import psutil
import pytest

from tests.conftest import Launch
from tests.integration import harness
from tests.integration.harness import Gateway, fake, wait_until
from tests.integration.wire import CHAT, Json, chat, endless

pytestmark = pytest.mark.slow

TIMEOUT = 20.0
LIMIT = 30
CONNECTIONS = LIMIT + 256  # idle ones included


class Client:
    def __init__(self, gateway: Gateway) -> None:
        parts = urlsplit(gateway.url)
        self._sock = socket.create_connection((parts.hostname or "", parts.port or 0), timeout=TIMEOUT)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.close()

    def send(self, *lines: str, body: bytes = b"") -> None:
        self._sock.sendall("\r\n".join([*lines, "Host: localhost", "x-api-key: secret", "", ""]).encode() + body)

    def post(self, body: Json, *lines: str, version: str = "1.1") -> None:
        data = json.dumps(body).encode()
        self.send(f"POST {CHAT} HTTP/{version}", f"Content-Length: {len(data)}", *lines, body=data)

    def end(self) -> None:
        self._sock.shutdown(socket.SHUT_WR)

    def part(self) -> bytes:
        return self._sock.recv(65536)

    def rest(self) -> bytes:
        """All that comes until the gateway closes the connection."""
        got = b""
        with suppress(ConnectionError):
            while part := self.part():
                got += part
        return got


@pytest.fixture
def gateway(launch: Launch) -> Gateway:
    return launch(
        {"server": {"api_keys": ["secret"], "max_connections": LIMIT}, "models": {"tiny": fake(max_inflight=LIMIT)}}
    )


def test_odd_clients_get_their_answer(gateway: Gateway) -> None:
    with Client(gateway) as java:
        java.post(chat("hello"), "Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAEAAEAA")
        java.end()
        assert b'"finish_reason"' in java.rest()
    with Client(gateway) as old:
        old.post(chat("hello", stream=True), version="1.0")
        head, _, body = old.rest().partition(b"\r\n\r\n")
        assert b"chunked" not in head
        assert body.startswith((b"data: {", b":"))
        assert body.endswith(b"data: [DONE]\n\n")
    for version in ("1.0", "1.1"):
        with Client(gateway) as half:
            half.post(chat("FAKE n=5 delay=0.1"), version=version)
            half.end()
            assert b'"finish_reason"' in half.rest()
    with Client(gateway) as eager:
        eager.post(chat("FAKE n=20 delay=0.05", stream=True), "Connection: close")
        eager.part()
        eager.send("GET /livez HTTP/1.1")
        assert b"data: [DONE]" in eager.rest()


def test_a_client_that_closes_is_noticed_and_its_slot_is_free(gateway: Gateway) -> None:
    gateway.http.headers["x-api-key"] = "secret"
    for stream in (True, False):
        with Client(gateway) as client:
            client.post(endless(stream=stream))
            while gateway.inflight() == 0:
                continue
        for _ in range(1000):
            if gateway.inflight() == 0:
                break
        assert gateway.inflight() == 0


def test_slow_bodies_without_the_key_shut_nobody_out(gateway: Gateway) -> None:
    with ExitStack() as stack:
        for _ in range(CONNECTIONS + 100):
            slow = stack.enter_context(Client(gateway))
            slow._sock.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n{{".encode())
        for path in ("/livez", "/readyz", "/health"):
            assert gateway.http.get(path).status_code == 200
        assert gateway.ask(chat("hello"), **{"x-api-key": "secret"}).status == 200


def test_probes_are_answered_when_every_connection_is_busy(gateway: Gateway) -> None:
    with ExitStack() as stack:
        for _ in range(CONNECTIONS):  # with the key, and a body that does not end
            busy = stack.enter_context(Client(gateway))
            busy.send(f"POST {CHAT} HTTP/1.1", "Content-Length: 1000000", body=b"{")
        for path in ("/livez", "/readyz", "/health"):
            assert gateway.http.get(path).status_code == 200
        with Client(gateway) as excess:
            excess.post(chat("hello"), "Connection: close")
            answer = excess.rest()
            assert answer.startswith(b"HTTP/1.1 503 ")
            assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "overloaded"


# -- descriptors -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="macOS changes no limit of another process")
def test_a_model_that_could_not_be_started_for_want_of_descriptors_starts_when_there_are_some(launch: Launch) -> None:
    quick = {"min_backoff": "50ms", "max_backoff": "100ms", "max_failures": 3}
    gateway = launch({"models": {"tiny": fake(restart=quick)}})
    process = psutil.Process(gateway.process.pid)
    soft, hard = process.rlimit(psutil.RLIMIT_NOFILE)
    process.rlimit(psutil.RLIMIT_NOFILE, (process.num_fds(), hard))
    pid = gateway.signal_backend("tiny:0", SIGKILL)
    wait_until(lambda: gateway.log.count("no file descriptors left") > 5, what="more failures than max_failures")
    assert gateway.backend("tiny:0")["state"] in ("backoff", "starting")
    process.rlimit(psutil.RLIMIT_NOFILE, (soft, hard))
    gateway.await_life("tiny:0", pid)
    assert gateway.ask(chat("hello")).status == 200


def test_more_streams_than_descriptors_are_each_answered(launch: Launch, few_descriptors: None) -> None:
    gateway = launch({"models": {"tiny": fake(max_inflight=150)}})
    with ExitStack() as stack:
        clients = [stack.enter_context(Client(gateway)) for _ in range(220)]
        for client in clients:
            client.post(chat("FAKE n=20 delay=0.1", stream=True), "Connection: close")
        assert gateway.http.get("/livez").status_code == 200
        answers = [client.rest() for client in clients]
    whole = sum(b"data: [DONE]" in answer and b'"error"' not in answer for answer in answers)
    told = sum(answer.startswith(b"HTTP/1.1 503 ") and b'"overloaded"' in answer for answer in answers)
    assert whole + told == 220, [answer[:200] for answer in answers]
    assert whole > 50


@pytest.fixture
def few_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    """As macOS gives to what launchd starts, and with no right to more."""
    serve = harness.command
    limited = ["sh", "-c", 'ulimit -n 256; exec "$@"', "sh"]
    monkeypatch.setattr(harness, "command", lambda *args: [*limited, *serve(*args)])

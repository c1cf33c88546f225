"""What happens rarely, and must not do harm: clients that do not read, operators that stop what works, neighbours."""

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from signal import SIGCONT, SIGHUP, SIGKILL, SIGSTOP
from typing import Any

import httpx
import psutil
import pytest

from tests.conftest import Launch
from tests.integration.harness import (
    HASTY_RESTART,
    QUICK_RESTART,
    Background,
    Gateway,
    alive,
    fake,
    launched,
    spawn,
    wait_until,
)
from tests.integration.wire import CHAT, Json, chat, endless, lasting, whole

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    hasty: Json = {"timeouts": {"progress": "3s"}, "restart": QUICK_RESTART, "resume": "off"}
    models = {
        "tiny": fake(replicas=2, **hasty),
        "lone": fake(**hasty),
        "timed": fake(timeouts={"total": "2s"}),
        "brittle": fake(fallbacks=["tiny"], restart={"min_backoff": "1m"}),
    }
    with launched({"models": models}, tmp_path_factory.mktemp("edges")) as running:
        yield running


@pytest.fixture
def gateway(shared: Gateway) -> Gateway:
    for name in ("tiny:0", "tiny:1", "lone:0"):
        shared.await_state(name, "ready")
    return shared


def connect(gateway: Gateway) -> socket.socket:
    host, port = gateway.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=30)


def raw_post(body: Json) -> bytes:
    data = json.dumps(body).encode()
    return f"POST {CHAT} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: {len(data)}\r\n\r\n".encode() + data


@contextmanager
def stopped(gateway: Gateway) -> Iterator[None]:
    """Its own process, not those of its backends."""
    gateway.process.send_signal(SIGSTOP)
    wait_until(lambda: psutil.Process(gateway.process.pid).status() == psutil.STATUS_STOPPED)
    try:
        yield
    finally:
        gateway.process.send_signal(SIGCONT)


def flood(**more: Any) -> Json:
    """As fast as it goes, more than any buffer holds."""
    return chat("FAKE n=1000000", "lone", max_tokens=1_000_000, stream=True, **more)


def test_a_client_that_does_not_read_harms_nobody(gateway: Gateway) -> None:
    """The backend waits for us and we for the client: that is no stall of the backend's, no reason to replace it."""
    before = gateway.backend("lone:0")
    with connect(gateway) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.sendall(raw_post(flood()))
        wait_until(lambda: gateway.inflight("lone") == 1)
        until = time.monotonic() + 7  # more than twice timeouts.progress: nothing else can show that nothing happens
        while time.monotonic() < until:
            now = gateway.backend("lone:0")
            assert (now["state"], now["pid"], now["restarts"]) == ("ready", before["pid"], before["restarts"])
            time.sleep(0.5)
        assert whole(gateway.ask(chat("hello", "lone")))
    wait_until(lambda: gateway.inflight("lone") == 0)
    assert gateway.backend("lone:0")["pid"] == before["pid"]


def test_an_answer_that_has_finished_is_not_waited_for(gateway: Gateway) -> None:
    """Nobody needs what should follow it; its backend, and the others that it serves, are left alone."""
    before = gateway.backend("lone:0")
    with gateway.stream(endless("lone")) as bystander:
        bystander.until_text()
        for stream in (True, False):
            began = time.monotonic()
            answer = gateway.ask(chat("FAKE hold", "lone", stream=stream))
            assert whole(answer), answer
            assert time.monotonic() - began < 10  # two seconds, on a machine that has nothing else to do
        bystander.until_text(len(bystander.answer.text) + 1)
    now = gateway.backend("lone:0")
    assert (now["state"], now["pid"], now["restarts"]) == ("ready", before["pid"], before["restarts"])


def test_a_client_that_reads_slowly_gets_everything(gateway: Gateway) -> None:
    with gateway.stream(chat("FAKE n=20000", "lone", max_tokens=20_000)) as stream:
        stream.until_text()
        time.sleep(1)  # the client that this test is about
        answer = stream.rest()
    assert whole(answer)
    assert answer.done
    assert len(answer.text.split()) == 20_000


def test_both_replicas_die_at_once(gateway: Gateway, tmp_path: Path) -> None:
    dead = tmp_path / "dead"
    with gateway.stream(endless()) as one, gateway.stream(endless()) as two:
        one.until_text()
        two.until_text()
        plain = Background(lambda: gateway.ask(lasting(dead)))
        wait_until(lambda: gateway.inflight() == 3)
        pids = [gateway.backend(name)["pid"] for name in ("tiny:0", "tiny:1")]
        with stopped(gateway):  # it sees both deaths at once, and sends nothing to a process that is about to die
            for pid in pids:
                os.kill(pid, SIGKILL)
            wait_until(lambda: not any(map(alive, pids)))
        dead.touch()
        answers = [one.rest(), two.rest()]
    for answer in answers:
        assert (answer.status, answer.code, answer.done, answer.dropped) == (200, "backend_crashed", True, "")
    last = plain.result()
    assert whole(last), "nothing of it was out: it waited for a replica, and was sent again"
    assert int(last.headers["x-gateway-attempts"]) in (2, 3), (
        "3: it was sent to the other, whose death was not seen yet"
    )
    assert last.headers["x-gateway-queue"].endswith(": restarting")


def test_stopping_a_backend_that_works(gateway: Gateway) -> None:
    """Whoever has seen nothing goes to the other; who has part of the answer is told; it is no failure."""
    before = gateway.backend("tiny:0")
    with gateway.stream(endless()) as stream:
        stream.until_text()
        name = stream.answer.headers["x-gateway-backend"]
        before = gateway.backend(name)
        assert gateway.http.post(f"/api/backends/{name}/stop").status_code == 202
        answer = stream.rest()
    assert (answer.done, answer.dropped) == (True, "")
    assert answer.error is not None
    assert answer.error["type"] == "server_error"
    assert "stopped" in answer.error["message"]
    gateway.await_state(name, "stopped")
    assert gateway.backend(name)["last_failure"] == before["last_failure"]
    assert gateway.http.post(f"/api/backends/{name}/start").status_code == 202


def test_stopping_a_backend_before_it_said_anything(gateway: Gateway, tmp_path: Path) -> None:
    stopped = tmp_path / "stopped"
    asked = Background(lambda: gateway.ask(lasting(stopped)))

    def busy() -> str | None:
        backends = gateway.health()["models"]["tiny"]["backends"]
        return next((str(b["id"]) for b in backends if b["inflight"]), None)

    name = wait_until(busy)
    assert gateway.http.post(f"/api/backends/{name}/stop").status_code == 202
    stopped.touch()
    answer = asked.result()
    assert whole(answer)
    assert answer.attempts == 2
    gateway.await_state(str(name), "stopped")
    assert gateway.http.post(f"/api/backends/{name}/start").status_code == 202


def test_total_timeout(gateway: Gateway) -> None:
    for stream in (True, False):
        answer = gateway.ask(endless("timed", stream=stream))
        assert answer.code == "backend_stalled"
        assert answer.status == (200 if stream else 503)
        assert answer.error is not None
        assert "timeouts.total" in answer.error["message"]
    told = gateway.backend("timed:0")
    assert (told["state"], told["restarts"], told["inflight"]) == ("ready", 0, 0)


def test_fallback(gateway: Gateway) -> None:
    """While a model has nobody, the next in its list answers, under its own name."""
    assert gateway.ask(chat("hello", "brittle")).headers["x-gateway-model"] == "brittle"
    gateway.signal_backend("brittle:0", SIGKILL)
    gateway.await_state("brittle:0", "backoff")
    answer = gateway.ask(chat("hello", "brittle"))
    assert whole(answer)
    assert answer.headers["x-gateway-model"] == "tiny"
    assert answer.body["model"] == "tiny"
    assert gateway.http.post("/api/backends/brittle:0/start").status_code == 202
    gateway.await_state("brittle:0", "ready")
    with gateway.stream(chat(f"FAKE killed after=-1 once={gateway.folder / 'done'}", "brittle")) as stream:
        late = stream.rest()  # it dies with the request in hand, and the fallback takes over
    assert whole(late)
    assert (late.headers["x-gateway-model"], late.attempts) == ("tiny", 2)


def test_too_many_connections(launch: Launch) -> None:
    gateway = launch({"server": {"max_connections": 2}, "models": {"tiny": fake()}})
    with gateway.stream(endless()) as one, gateway.stream(endless()) as two:
        one.until_text()
        two.until_text()
        answer = gateway.ask(chat("hello"))
        assert (answer.status, answer.code) == (503, "overloaded")
        assert gateway.http.get("/health").status_code == 200
    wait_until(lambda: gateway.inflight() == 0)
    assert whole(gateway.ask(chat("hello")))


def test_bodies_in_chunks_and_after_a_promise(gateway: Gateway) -> None:
    data = json.dumps(chat("hello")).encode()

    def pieces() -> Iterator[bytes]:
        for start in range(0, len(data), 7):
            yield data[start : start + 7]

    assert gateway.http.post(CHAT, content=pieces()).status_code == 200
    with connect(gateway) as sock:
        head = f"POST {CHAT} HTTP/1.1\r\nhost: 127.0.0.1\r\nexpect: 100-continue\r\ncontent-length: {len(data)}\r\n\r\n"
        sock.sendall(head.encode())
        assert sock.recv(100).startswith(b"HTTP/1.1 100")
        sock.sendall(data)
        assert sock.recv(100).startswith(b"HTTP/1.1 200")


def test_several_requests_on_one_connection(gateway: Gateway) -> None:
    """Errors in between do not spoil it."""
    with httpx.Client(base_url=gateway.url, timeout=30, limits=httpx.Limits(max_connections=1)) as client:
        for body, status in ((chat("hello"), 200), (chat("hello", "no"), 404), ({}, 400), (chat("hello"), 200)):
            assert client.post(CHAT, json=body).status_code == status


def test_sighup_is_survived(launch: Launch) -> None:
    gateway = launch({"models": {"tiny": fake()}})
    gateway.process.send_signal(SIGHUP)
    assert whole(gateway.ask(chat("hello")))
    assert gateway.process.poll() is None


def test_stop_with_somebody_following_the_logs(launch: Launch) -> None:
    """Who only watches does not hold up the end."""
    gateway = launch({"server": {"drain_timeout": "1s"}, "models": {"tiny": fake()}})
    path = "/api/backends/tiny:0/logs?follow=1"
    with httpx.Client(base_url=gateway.url, timeout=30) as client, client.stream("GET", path) as response:
        next(response.iter_lines())
        assert gateway.terminate(20) == 0
    assert gateway.leftovers() == []


def test_two_gateways_with_one_state_folder(launch: Launch) -> None:
    """The second takes the first one's children for what they are: not orphans. Nor does its own end concern them."""
    first = launch({"models": {"tiny": fake()}})
    pid = first.backend("tiny:0")["pid"]
    second = spawn(["serve", str(first.folder / "config.yaml"), "--port", "0"], first.folder)
    try:
        second.await_listening()
        second.await_health()
        own = second.backend("tiny:0")["pid"]
        second.kill()
        wait_until(lambda: not alive(own), 10)
        assert alive(pid)
        assert whole(first.ask(chat("hello")))
        assert first.backend("tiny:0")["restarts"] == 0
    finally:
        second.http.close()
        if second.process.poll() is None:
            second.kill()


def test_secrets_are_shown_to_nobody(launch: Launch) -> None:
    """Not in the log, whatever goes wrong, nor in anything that the gateway tells of itself."""
    own, far, passed = "key-of-the-gateway", "key-of-the-far-server", "value-of-a-variable"
    headers = {"authorization": f"Bearer {own}"}
    models = {
        "tiny": fake(env={"HF_TOKEN": passed}),
        "far": {"urls": ["http://127.0.0.1:9"], "api_key": far},
        "broken": {"command": ["/no/such/program", "{port}"], "env": {"HF_TOKEN": passed}, "restart": HASTY_RESTART},
    }
    gateway = launch({"server": {"api_keys": [own]}, "models": models}, ready=False)
    gateway.http.headers.update(headers)
    gateway.await_state("tiny:0", "ready")
    gateway.await_state("broken:0", "failed")
    gateway.await_state("far:0", "unreachable")
    told = [gateway.http.get(path).text for path in ("/health", "/api/status", "/v1/models", "/api/quarantine")]
    told.append(gateway.output("tiny:0"))
    bodies: tuple[Json, ...] = (
        chat("hello"),
        chat("hello", "far"),
        chat("hello", "broken"),
        chat("FAKE segfault after=0"),
        {},
    )
    told += [gateway.http.post(CHAT, json=body).text for body in bodies]
    told.append(httpx.post(f"{gateway.url}{CHAT}", json=chat("hello"), headers={"x-api-key": f"{own}-not"}).text)
    gateway.await_failure("tiny:0")
    told.append(gateway.log)
    for secret in (own, far, passed):
        assert all(secret not in text for text in told)

"""Real ways for mlx_lm.server to go down, next to a model that is well and must not notice.

The healthy model is asked again and again while its neighbours die; each of its answers has to be whole.
"""

import json
import os
import resource
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from signal import SIGCONT, SIGSTOP
from typing import NamedTuple

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
    free_port,
    launched,
    listening_on,
    wait_until,
)
from tests.integration.wire import CHAT, Answer, Json, chat, whole

pytestmark = pytest.mark.slow

LONG = 4000  # tokens: some seconds
KILLER = {"prompt": "a", "max_tokens": 4, "stop": [1]}  # a number among the stop words ends the generation thread


class Neighbour:
    """Asks the healthy model without a pause."""

    def __init__(self, gateway: Gateway) -> None:
        self.answers: list[Answer] = []
        self._gateway = gateway
        self._over = threading.Event()
        self._asks = threading.Lock()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._over.is_set():
            with self._asks:
                self.answers.append(self._gateway.ask(chat("hello", "healthy", max_tokens=5, stream=True)))
            self._over.wait(0.1)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing of it is in flight: it has the same memory, so a request whose backend ran out of it is not alone."""
        with self._asks:
            yield

    def end(self) -> None:
        """After some more answers, so that what happened last had its chance to disturb."""
        enough = len(self.answers) + 3
        try:
            wait_until(lambda: len(self.answers) >= enough, what="answers of the healthy model")
        finally:
            self._over.set()
        self._thread.join()

    def assert_undisturbed(self) -> None:
        assert all(whole(answer) and answer.done and answer.attempts == 1 for answer in self.answers)
        assert len({answer.text for answer in self.answers}) == 1
        told = self._gateway.backend("healthy:0")
        assert (told["state"], told["restarts"], told["last_failure"]) == ("ready", 0, None)


@pytest.fixture(scope="module")
def gateway(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    base: Json = {"model": str(tiny_model), "resume": "off", "restart": QUICK_RESTART}
    hasty = {"timeouts": {"progress": "3s", "stop": "2s"}}
    models = {"healthy": base, "lone": base, "pair": {**base, **hasty, "replicas": 2}}
    with launched({"models": models}, tmp_path_factory.mktemp("crashes")) as running:
        yield running


@pytest.fixture
def neighbour(gateway: Gateway) -> Iterator[Neighbour]:
    gateway.await_health()
    asking = Neighbour(gateway)
    try:
        yield asking
    finally:
        asking.end()
    asking.assert_undisturbed()


class Busy(NamedTuple):
    name: str
    pid: int


def busy(gateway: Gateway, model: str) -> Busy:
    """The replica that has a request in flight."""

    def found() -> Busy | None:
        backends = gateway.health()["models"][model]["backends"]
        return next((Busy(b["id"], b["pid"]) for b in backends if b["inflight"]), None)

    result = wait_until(found, what=f"a request in flight on {model}")
    assert result
    return result


def poison(url: str) -> None:
    """Past the gateway, which would refuse it. It is answered with 404, or not at all where the gateway was quicker to
    end the process."""
    with suppress(httpx.HTTPError), httpx.Client(base_url=url, timeout=30) as direct:
        assert direct.post("/v1/completions", json=KILLER).status_code == 404


def responsive(gateway: Gateway, name: str) -> bool:
    backends = gateway.http.get("/api/status").json()["models"][name.partition(":")[0]]["backends"]
    return bool(next(b["responsive"] for b in backends if b["id"] == name))


# -- a backend that was ready ------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="prlimit exists on Linux only")
def test_allocation_failure(gateway: Gateway, neighbour: Neighbour) -> None:
    """The CPU build of mlx writes through the pointer that malloc did not give: SIGSEGV, and not a word about memory.
    That it was memory shows in the limit that the process ran under."""
    assert sys.platform == "linux"
    pid = gateway.backend("lone:0")["pid"]
    limit = psutil.Process(pid).memory_info().vms + (8 << 20)
    resource.prlimit(pid, resource.RLIMIT_AS, (limit, limit))
    os.kill(pid, SIGSTOP)  # a pause long enough to be noticed: meanwhile the gateway has seen the limit
    wait_until(lambda: not responsive(gateway, "lone:0"))
    os.kill(pid, SIGCONT)
    wait_until(lambda: responsive(gateway, "lone:0"))
    # Read in one piece: in slices, the process may also end between two of them, and the next life answers.
    with neighbour.paused():
        answer = gateway.ask(chat("the river and the lamp " * 500, "lone", max_tokens=5, stream=True))
    failure = gateway.await_failure("lone:0")
    assert failure["cause"] == "oom"
    assert failure["exit"] in (-11, -6)
    assert (answer.status, answer.code) == (503, "backend_oom")
    assert answer.headers["x-should-retry"] == "false"  # it was alone, and would do it again
    assert answer.error is not None
    assert answer.error["backend"] == "lone:0"
    gateway.await_life("lone:0", pid)
    assert whole(gateway.ask(chat("hello", "lone", max_tokens=5)))


@pytest.mark.usefixtures("neighbour")
def test_dead_generation_thread(gateway: Gateway) -> None:
    """From mlx-lm 0.32.0 on the process lives, /health says 503, and the streams in flight just end."""
    with gateway.stream(chat("once", "pair", max_tokens=LONG)) as stream:
        stream.until_text()
        victim = busy(gateway, "pair")
        poison(gateway.backend_url(victim.name))
        answer = stream.rest()
    assert answer.dropped == ""
    assert answer.finish is None
    assert answer.done
    assert answer.code == "backend_wedged"
    failure = gateway.await_failure(victim.name)
    assert failure["cause"] == "wedge"
    told = gateway.await_life(victim.name, victim.pid)
    assert told["restarts"] == 1
    assert not alive(victim.pid)


@pytest.mark.usefixtures("neighbour")
def test_dead_generation_thread_before_the_first_word(gateway: Gateway) -> None:
    asked = Background(lambda: gateway.ask(chat("once", "pair", max_tokens=2500)))
    victim = busy(gateway, "pair")
    poison(gateway.backend_url(victim.name))
    answer = asked.result()
    assert whole(answer)
    assert answer.attempts == 2
    assert answer.headers["x-gateway-backend"] != victim.name
    gateway.await_life(victim.name, victim.pid)


@pytest.mark.usefixtures("neighbour")
def test_stopped_in_mid_stream(gateway: Gateway) -> None:
    with gateway.stream(chat("once", "pair", max_tokens=LONG)) as stream:
        stream.until_text()
        victim = busy(gateway, "pair")
        os.kill(victim.pid, SIGSTOP)
        answer = stream.rest()
    assert (answer.code, answer.done, answer.dropped) == ("backend_stalled", True, "")
    assert gateway.await_failure(victim.name)["cause"] == "stalled"
    gateway.await_life(victim.name, victim.pid)
    assert not alive(victim.pid)


@pytest.mark.usefixtures("neighbour")
def test_stopped_before_the_first_word(gateway: Gateway) -> None:
    """Where nothing of the answer is out, the other replica gives all of it."""
    asked = Background(lambda: gateway.ask(chat("upon", "pair", max_tokens=2000)))
    victim = busy(gateway, "pair")
    os.kill(victim.pid, SIGSTOP)
    answer = asked.result()
    assert whole(answer)
    assert answer.attempts == 2
    assert answer.headers["x-gateway-backend"] != victim.name
    told = gateway.await_life(victim.name, victim.pid)
    assert told["last_failure"]["cause"] == "stalled"
    assert not alive(victim.pid)


@pytest.mark.usefixtures("neighbour")
def test_stopped_when_idle(gateway: Gateway) -> None:
    pid = gateway.signal_backend("pair:1", SIGSTOP)
    told = gateway.await_life("pair:1", pid)
    assert told["last_failure"]["cause"] == "stalled"
    assert not alive(pid)
    assert whole(gateway.ask(chat("hello", "pair", max_tokens=5)))


# -- one that never gets ready -----------------------------------------------------------------------------------------


def spoiled(model: Path, folder: Path) -> Path:
    return Path(shutil.copytree(model, folder))


def test_starts_that_fail(tiny_model: Path, tmp_path: Path, launch: Launch) -> None:
    truncated, broken = spoiled(tiny_model, tmp_path / "truncated"), spoiled(tiny_model, tmp_path / "broken")
    os.truncate(truncated / "model.safetensors", 400_000)
    (broken / "config.json").write_text('{"model_type": "llama", ')
    unknown = spoiled(tiny_model, tmp_path / "unknown")
    config = json.loads((unknown / "config.json").read_text())
    (unknown / "config.json").write_text(json.dumps({**config, "model_type": "nosuch"}))
    missing = spoiled(tiny_model, tmp_path / "missing")
    folders = {"healthy": tiny_model, "missing": missing, "truncated": truncated, "broken": broken, "unknown": unknown}
    models = {name: {"model": str(folder), "restart": HASTY_RESTART} for name, folder in folders.items()}
    models["later"] = {"model": str(missing), "restart": {"min_backoff": "10m", "max_backoff": "10m"}}
    shutil.rmtree(missing)
    gateway = launch({"models": models}, ready=False)
    causes = {"missing": "model_not_found", "truncated": "load_failure", "broken": "load_failure"}
    gateway.await_state("healthy:0", "ready")
    neighbour = Neighbour(gateway)
    try:
        for name, cause in {**causes, "unknown": "load_failure"}.items():
            told = gateway.await_state(f"{name}:0", "failed")
            assert (name, told["last_failure"]["cause"]) == (name, cause)
            assert told["restarts"] == (1 if name in ("broken", "unknown") else 0), "the others are found out before"
            answer = gateway.ask(chat("hello", name))
            assert (answer.status, answer.code) == (503 if name == "missing" else 424, "model_unavailable")
            assert answer.headers.get("x-should-retry") == (None if name == "missing" else "false")
            assert answer.error is not None
            assert told["last_failure"]["message"] in answer.error["message"]
        assert not gateway.await_state("later:0", "backoff")["crash_looping"]
        answer = gateway.ask(chat("hello", "later"))
        assert (answer.status, answer.code, answer.headers["retry-after"]) == (503, "model_unavailable", "5")
        assert f"model_not_found: the model folder {missing} does not exist" in str(answer.error)
        shutil.copytree(tiny_model, missing)  # as a disk that is mounted later: the next request has it looked at
        assert gateway.ask(chat("hello", "missing")).status == 503
        gateway.await_state("missing:0", "ready")
        gateway.ask(chat("hello", "later", max_tokens=3))
        gateway.await_state("later:0", "ready")
        for name in ("missing", "later"):
            assert whole(gateway.ask(chat("hello", name, max_tokens=3)))
    finally:
        neighbour.end()
    neighbour.assert_undisturbed()
    assert gateway.health()["status"] == "degraded"
    assert gateway.http.get("/readyz").status_code == 200


def test_port_taken(tiny_model: Path, launch: Launch) -> None:
    """One comes up by itself when the port is free again; the other, which would be long in coming, is told to."""
    base: Json = {"model": str(tiny_model)}
    patient_port, hasty_port = free_port(), free_port()
    patient = {"server_args": {"port": patient_port}, "restart": QUICK_RESTART}
    hasty = {"server_args": {"port": hasty_port}, "restart": {"max_failures": 1, "max_backoff": "10m"}}
    models = {"healthy": base, "patient": {**base, **patient}, "hasty": {**base, **hasty}}
    with listening_on(patient_port), listening_on(hasty_port):
        gateway = launch({"models": models}, ready=False)
        gateway.await_state("healthy:0", "ready")
        failure = gateway.await_failure("patient:0")
        assert failure["cause"] == "port_in_use"
        assert str(patient_port) in failure["message"]
        assert str(os.getpid()) in failure["message"]  # who holds it
        told = gateway.await_state("hasty:0", "backoff")
        assert (told["last_failure"]["cause"], told["crash_looping"]) == ("port_in_use", True)
        answer = gateway.ask(chat("hello", "hasty"))
        assert (answer.status, answer.code) == (503, "model_unavailable")
        assert gateway.http.post("/api/backends/hasty:0/start").status_code == 202
        gateway.await_state("hasty:0", "backoff")
    gateway.await_state("patient:0", "ready")
    assert gateway.http.post("/api/backends/hasty:0/start").status_code == 202
    gateway.await_state("hasty:0", "ready")
    for name in models:
        assert whole(gateway.ask(chat("hello", name, max_tokens=3)))
    assert gateway.backend_url("patient:0").endswith(f":{patient_port}")
    assert gateway.backend("healthy:0")["restarts"] == 0


def test_port_lost_to_another_after_the_start(tiny_model: Path, launch: Launch) -> None:
    """The killed backend finds its port taken when it comes back."""
    port = free_port()
    pinned = {"model": str(tiny_model), "server_args": {"port": port}, "restart": QUICK_RESTART}
    gateway = launch({"models": {"tiny": pinned}})
    assert gateway.http.post("/api/backends/tiny:0/stop").status_code == 202
    gateway.await_state("tiny:0", "stopped")
    with listening_on(port):
        assert gateway.http.post("/api/backends/tiny:0/start").status_code == 202
        assert gateway.await_failure("tiny:0")["cause"] == "port_in_use"
    gateway.await_health()
    assert whole(gateway.ask(chat("hello", max_tokens=3), CHAT))

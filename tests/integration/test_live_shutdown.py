"""The end of a gateway, ordered or not: what becomes of its requests, and that nothing of it is left behind."""

from pathlib import Path
from signal import SIGINT, SIGSTOP, SIGTERM

import httpx
import psutil
import pytest

from tests.conftest import Launch
from tests.integration.harness import (
    STATE_VARIABLE,
    Background,
    Gateway,
    alive,
    descendants,
    fake,
    free_port,
    spawn,
    supervised,
    wait_until,
)
from tests.integration.wire import Json, chat, endless, lasting, whole

pytestmark = pytest.mark.slow

GONE_WITHIN = 5.0  # seconds, after a SIGKILL of the gateway


def pids(gateway: Gateway) -> list[int]:
    return [b["pid"] for m in gateway.health()["models"].values() for b in m["backends"]]


def assert_all_gone(gateway: Gateway) -> None:
    wait_until(lambda: not gateway.leftovers(), GONE_WITHIN, "no child left")


# -- SIGKILL -----------------------------------------------------------------------------------------------------------


def test_sigkill_leaves_no_child(tiny_model: Path, launch: Launch) -> None:
    gateway = launch({"models": {"tiny": {"model": str(tiny_model), "replicas": 2}}})
    children = pids(gateway)
    assert all(alive(pid) for pid in children)
    assert set(children) < {p.pid for p in descendants(str(gateway.folder / "state"))}
    with gateway.stream(chat("once", max_tokens=3000)) as stream:  # one of them is at work
        stream.until_text()
        gateway.kill()
        assert_all_gone(gateway)
        assert stream.rest().finish is None
    assert not any(alive(pid) for pid in children)


def test_sigkill_leaves_no_stopped_child(tiny_model: Path, launch: Launch) -> None:
    stubborn = fake("ignore-sigterm", timeouts={"stop": "1s"})
    gateway = launch({"models": {"tiny": {"model": str(tiny_model)}, "stubborn": stubborn}})
    gateway.signal_backend("tiny:0", SIGSTOP)
    gateway.kill()
    assert_all_gone(gateway)


def test_sigkill_while_starting_leaves_no_child(launch: Launch) -> None:
    """Without end: there is always one between fork and record. (Many times: tests/long/test_orphans.py.)"""
    restless = {"min_backoff": "10ms", "max_backoff": "20ms", "max_failures": 1000}
    model = fake("load=exit exit=-9", replicas=4, restart=restless, resume="off")
    gateway = launch({"models": {"tiny": model}}, ready=False)
    wait_until(lambda: gateway.backend("tiny:0")["restarts"] > 1)
    gateway.kill()
    assert_all_gone(gateway)


def test_another_gateway_takes_over_at_once(launch: Launch) -> None:
    """On the same config, ports and state folder, while the children of the first are still being cleared away."""
    backend = fake("ignore-sigterm", timeouts={"stop": "1s"})
    config: Json = {"server": {"port": free_port()}, "models": {"tiny": backend}}
    first = launch(config)
    old = pids(first)
    first.kill()
    second = spawn(["serve", str(first.folder / "config.yaml")], first.folder)
    with supervised(second):
        second.await_listening()
        second.await_health()
        assert second.url == first.url
        assert whole(second.ask(chat("hello")))
        assert set(pids(second)).isdisjoint(old)
        wait_until(lambda: not any(alive(pid) for pid in old), GONE_WITHIN)


# -- SIGTERM -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [SIGTERM, SIGINT])
def test_requests_under_way_finish(launch: Launch, tmp_path: Path, number: int) -> None:
    gateway = launch({"models": {"tiny": fake()}})
    over = tmp_path / "over"
    slowly = lasting(over)
    with gateway.stream(slowly) as stream:
        stream.until_text()
        plain = Background(lambda: gateway.ask(slowly))
        wait_until(lambda: gateway.inflight() == 2)
        gateway.process.send_signal(number)
        wait_until(lambda: "draining" in gateway.log)
        try:
            refused = gateway.ask(chat("hello"))
        except httpx.ConnectError:
            pass
        else:
            assert (refused.status, refused.code) == (503, "shutting_down")
            assert "retry-after" in refused.headers
        over.touch()
        answer = stream.rest()
    assert whole(answer)
    assert answer.done
    assert whole(plain.result())
    assert gateway.process.wait(30) == 0
    assert gateway.leftovers() == []


def test_not_ready_while_draining(launch: Launch, tmp_path: Path) -> None:
    gateway = launch({"models": {"tiny": fake()}})
    over = tmp_path / "over"
    with gateway.stream(lasting(over)) as stream:
        stream.until_text()
        gateway.process.send_signal(SIGTERM)
        wait_until(lambda: gateway.http.get("/readyz").status_code == 503)
        assert gateway.http.get("/livez").status_code == 200
        assert gateway.http.get("/api/status").json()["draining"] is True
        over.touch()
        assert whole(stream.rest())


def test_drain_timeout_ends_what_is_left(launch: Launch) -> None:
    gateway = launch({"server": {"drain_timeout": "1s"}, "models": {"tiny": fake()}})
    with gateway.stream(endless()) as stream:
        stream.until_text()
        plain = Background(lambda: gateway.ask(endless()))
        wait_until(lambda: gateway.inflight() == 2)
        gateway.process.send_signal(SIGTERM)
        answer = stream.rest()
    assert (answer.code, answer.done, answer.dropped) == ("shutting_down", True, "")
    late = plain.result()
    assert (late.status, late.code) == (503, "shutting_down")
    assert gateway.process.wait(30) == 0
    assert gateway.leftovers() == []


def test_second_sigterm_stops_at_once(launch: Launch) -> None:
    """Within a few seconds, though the requests and the drain would take for ever and the backend ignores SIGTERM."""
    config = {"server": {"drain_timeout": "10m"}, "defaults": {"timeouts": {"stop": "10m"}}}
    gateway = launch({**config, "models": {"tiny": fake("ignore-sigterm")}})
    with gateway.stream(endless()) as stream:
        stream.until_text()
        gateway.process.send_signal(SIGTERM)
        wait_until(lambda: "draining" in gateway.log)
        gateway.process.send_signal(SIGTERM)
        answer = stream.rest()
    assert (answer.code, answer.done) == ("shutting_down", True)
    gateway.process.wait(20)
    assert gateway.leftovers() == []


def test_stopped_while_starting(launch: Launch) -> None:
    gateway = launch({"models": {"tiny": fake("slow-load load-time=600")}}, ready=False)
    gateway.await_state("tiny:0", "starting")
    waiting = Background(lambda: gateway.ask(chat("hello")))
    wait_until(lambda: gateway.queued() == 1)
    gateway.process.send_signal(SIGTERM)
    wait_until(lambda: "draining" in gateway.log)
    gateway.process.send_signal(SIGTERM)
    assert waiting.result().code == "shutting_down"
    gateway.process.wait(20)
    assert gateway.leftovers() == []


def test_reaper_killed(launch: Launch) -> None:
    """It comes back, so that a later SIGKILL of the gateway is still cleaned up after."""
    gateway = launch({"models": {"tiny": fake()}})

    def reaper() -> psutil.Process | None:
        found = descendants(str(gateway.folder / "state"))
        return next((p for p in found if "backends.process.reaper" in p.cmdline()), None)

    first = wait_until(reaper)
    assert first is not None
    first.kill()
    second = wait_until(lambda: (again := reaper()) is not None and again.pid != first.pid and again)
    assert second
    gateway.kill()
    assert_all_gone(gateway)


def test_marker_is_inherited(launch: Launch) -> None:
    """What the other tests here rest on: every process of a gateway carries its state folder in its environment."""
    gateway = launch({"models": {"tiny": fake()}})
    found = {p.pid for p in descendants(str(gateway.folder / "state"))}
    tree = {p.pid for p in psutil.Process(gateway.process.pid).children(recursive=True)}
    assert tree < found
    assert STATE_VARIABLE in psutil.Process(pids(gateway)[0]).environ()

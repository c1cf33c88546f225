"""What a gateway says of itself is true at every moment: while it starts, after a crash, when a replica is given up."""

from datetime import UTC, datetime
from pathlib import Path
from signal import SIGKILL

import pytest

from tests.conftest import Launch
from tests.integration.harness import HASTY_RESTART, QUICK_RESTART, Gateway, fake, wait_until
from tests.integration.wire import Json, chat, lasting, whole

pytestmark = pytest.mark.slow


def statuses(gateway: Gateway) -> tuple[int, str, str]:
    answer = gateway.http.get("/health")
    told = answer.json()
    return answer.status_code, told["status"], told["models"]["tiny"]["status"]


def ready(gateway: Gateway) -> int:
    return gateway.http.get("/readyz").status_code


def card(gateway: Gateway, name: str = "tiny") -> Json:
    told: Json = gateway.http.get(f"/v1/models/{name}").json()
    return told


def test_the_story_of_a_model(launch: Launch) -> None:
    """It loads, loses one replica, gets it back, loses both, and both come back by themselves. A life that answered
    may be lost; the first one that did not is one too many."""
    restart = {"min_backoff": "1s", "max_backoff": "8s", "max_failures": 1}
    model = fake("slow-load load-time=2", replicas=2, aliases=["t"], restart=restart)
    gateway = launch({"models": {"tiny": model}}, ready=False)

    assert statuses(gateway) == (200, "degraded", "loading")
    assert ready(gateway) == 200, "requests wait in line"
    assert gateway.http.get("/livez").status_code == 200
    assert card(gateway)["status"] == "loading"
    assert whole(gateway.ask(chat("hello")))  # it waits in line until there is somebody to answer

    gateway.await_health()
    assert statuses(gateway) == (200, "ok", "ok")
    assert ready(gateway) == 200
    assert card(gateway, "t") == card(gateway)
    (listed,) = gateway.http.get("/v1/models").json()["data"]
    assert listed == {**card(gateway), "id": "tiny", "object": "model", "aliases": ["t"], "status": "ok"}

    assert {gateway.ask(chat(f"{n} sheep")).headers["x-gateway-backend"] for n in range(2)} == {"tiny:0", "tiny:1"}
    began = datetime.now(UTC)
    first = gateway.signal_backend("tiny:0", SIGKILL)
    failure = gateway.await_failure("tiny:0")
    assert statuses(gateway) == (200, "degraded", "degraded")
    assert ready(gateway) == 200
    assert (failure["cause"], failure["exit"]) == ("killed", -9)
    assert began.timestamp() - 1 <= datetime.fromisoformat(failure["at"]).timestamp() <= datetime.now(UTC).timestamp()
    gateway.await_state("tiny:0", "backoff", "starting")
    assert whole(gateway.ask(chat("hello")))

    second = gateway.await_life("tiny:0", first)
    assert statuses(gateway) == (200, "ok", "ok")
    assert second["restarts"] == 1
    assert second["last_failure"] == failure  # still told, though it is over

    gateway.signal_backend("tiny:0", SIGKILL)
    told = gateway.await_state("tiny:0", "backoff")
    assert (told["pid"], told["crash_looping"], told["failed_lives"]) == (None, True, 1)
    assert statuses(gateway) == (200, "degraded", "degraded")
    gateway.signal_backend("tiny:1", SIGKILL)
    assert not gateway.await_state("tiny:1", "backoff")["crash_looping"]
    assert statuses(gateway) == (200, "degraded", "loading")
    gateway.await_state("tiny:1", "starting")
    assert statuses(gateway) == (200, "degraded", "loading")
    assert ready(gateway) == 200, "a restart is a pause"
    gateway.await_state("tiny:1", "ready")
    gateway.http.post("/api/backends/tiny:0/stop")
    gateway.signal_backend("tiny:1", SIGKILL)
    assert gateway.await_state("tiny:1", "backoff")["crash_looping"]
    assert statuses(gateway) == (503, "unavailable", "unavailable")
    assert ready(gateway) == 503
    assert_crash_looping(gateway)
    assert not gateway.await_state("tiny:1", "ready")["crash_looping"], "it came back by itself"
    assert statuses(gateway) == (200, "degraded", "degraded")
    assert whole(gateway.ask(chat("hello")))


def assert_crash_looping(gateway: Gateway) -> None:
    answer = gateway.ask(chat("hello"), **{"x-stainless-read-timeout": "1"})  # it would wait
    assert (answer.status, answer.code) == (503, "model_unavailable")
    assert answer.error is not None
    assert "tiny:1 has failed again and again; it starts again" in answer.error["message"]
    assert "killed" in answer.error["message"]
    assert 1 <= int(answer.headers["retry-after"]) <= 13


def test_one_model_of_two(launch: Launch) -> None:
    gateway = launch({"models": {"tiny": fake(), "other": fake("exit-at-start", restart=HASTY_RESTART)}}, ready=False)
    gateway.await_state("tiny:0", "ready")
    told = gateway.await_state("other:0", "failed")
    assert told["last_failure"]["cause"] == "dependency"
    assert told["last_failure"]["exit"] == 1
    assert statuses(gateway) == (200, "degraded", "ok")
    assert card(gateway, "other")["status"] == "unavailable"


def test_inflight_and_commands(launch: Launch, tmp_path: Path) -> None:
    over = tmp_path / "over"
    gateway = launch({"models": {"tiny": fake(restart=QUICK_RESTART)}})
    with gateway.stream(lasting(over)) as stream:
        stream.until_text()
        assert gateway.backend("tiny:0")["inflight"] == 1
        assert gateway.http.post("/api/backends/tiny:0/start").status_code == 409
        assert gateway.http.post("/api/backends/tiny:0/drain").status_code == 202
        assert gateway.backend("tiny:0")["state"] == "draining"
        assert gateway.http.post("/api/backends/tiny:0/drain").status_code == 409
        over.touch()
        assert whole(stream.rest())
    gateway.await_state("tiny:0", "stopped")
    assert gateway.backend("tiny:0")["last_failure"] is None  # a stop that was asked for is no failure
    assert statuses(gateway) == (503, "unavailable", "unavailable")
    assert gateway.http.post("/api/backends/tiny:0/start").status_code == 202
    pid = gateway.await_state("tiny:0", "ready")["pid"]
    assert gateway.http.post("/api/backends/tiny:0/restart").status_code == 202
    gateway.await_life("tiny:0", pid)
    assert gateway.backend("tiny:0")["last_failure"] is None
    wait_until(lambda: gateway.inflight() == 0)

"""Coming back after a failure: what is taken out and why, how it is let in again, and what counts as one failure."""

from signal import SIGKILL

import pytest

from tests.conftest import Launch
from tests.integration.harness import Gateway, fake, wait_until
from tests.integration.wire import Json, chat, endless, whole

pytestmark = pytest.mark.slow

QUICK: Json = {"restart": {"min_backoff": "200ms", "max_backoff": "1s", "max_failures": 100}, "resume": "off"}


def told(gateway: Gateway, name: str = "tiny:0") -> Json:
    backends = gateway.http.get("/api/status").json()["models"][name.partition(":")[0]]["backends"]
    found: Json = next(b for b in backends if b["id"] == name)
    return found


def test_a_backend_that_lives_and_fails_is_taken_out_and_asked(launch: Launch) -> None:
    gateway = launch({"models": {"tiny": fake(max_inflight=4, **QUICK)}})
    pid = told(gateway)["pid"]
    assert told(gateway)["slots"] == 4
    for count in range(3):
        answer = gateway.ask(chat(f"FAKE eof after=2\nnumber {count}"))
        assert answer.code == "stream_truncated"
    out = told(gateway)
    assert (out["slots"], out["state"], out["responsive"]) == (0, "ready", False)
    assert out["note"] == "3 of its last 3 requests failed though it runs"
    assert gateway.health()["status"] == "unavailable"
    answer = gateway.ask(chat("hello"))  # it waits, and comes through when the time is over
    assert whole(answer)
    back = told(gateway)
    assert (back["pid"], back["restarts"], back["note"]) == (pid, 0, "")
    assert 0 < back["slots"] < 4, "slowly"
    gateway.await_health()


def test_what_clients_do_counts_for_nothing(launch: Launch) -> None:
    gateway = launch({"models": {"tiny": fake(**QUICK)}})
    for _ in range(8):
        with gateway.stream(endless()) as stream:
            stream.until_text()
        assert gateway.ask(chat("FAKE status=400")).status == 400
    wait_until(lambda: gateway.inflight() == 0)
    assert (told(gateway)["slots"], told(gateway)["note"]) == (8, "")


def test_a_backend_that_ends_again_and_again_gets_its_share_step_by_step(launch: Launch) -> None:
    gateway = launch({"models": {"tiny": fake(max_inflight=4, **QUICK)}})
    for _ in range(2):  # of which neither answered
        pid = gateway.signal_backend("tiny:0", SIGKILL)
        gateway.await_life("tiny:0", pid)
    assert told(gateway)["slots"] == 1
    with gateway.stream(endless()) as first, gateway.stream(endless()) as second:  # time alone lets the second in
        first.until_text()
        second.until_text()
    seen = []
    for count in range(4):
        assert whole(gateway.ask(chat(f"number {count}")))
        seen.append(told(gateway)["slots"])
    assert seen[-1] == 4
    pid = gateway.signal_backend("tiny:0", SIGKILL)
    gateway.await_life("tiny:0", pid)
    assert told(gateway)["slots"] == 4, "it had answered, and all wait for it alone"


def test_one_reset_of_the_gpu_is_one_failure(launch: Launch) -> None:
    """Of two replicas that are crash looping at their first failure, the victim of the other's is not."""
    strict = {"min_backoff": "200ms", "max_backoff": "10m", "max_failures": 1}
    gateway = launch({"models": {"tiny": fake(replicas=2, restart=strict, resume="off")}})
    with gateway.stream(chat("FAKE gpu-timeout after=3 delay=0.2")) as one:
        one.until_text()
        first = one.answer.headers["x-gateway-backend"]
        with gateway.stream(chat("FAKE gpu-victim after=9 delay=0.2")) as two:
            two.until_text()
            second = two.answer.headers["x-gateway-backend"]
            assert first != second
            assert {one.rest().code, two.rest().code} == {"backend_gpu_error"}
    assert gateway.await_state(first, "backoff")["crash_looping"]
    gateway.await_state(second, "ready")
    assert gateway.backend(second)["last_failure"]["cause"] == "gpu_victim"

"""The instrument in real processes of mlx_lm.server: what it tells, and that the server goes on when it does not."""

import contextlib
import re
import threading
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest

from backends.domain.report import PREFIX
from tests.integration.harness import QUICK_RESTART, Gateway, launched, wait_until
from tests.integration.test_live_crashes import poison
from tests.integration.wire import Json, chat, whole

pytestmark = pytest.mark.slow

LONG = 4000  # tokens: some seconds
AT_ONCE = 0.9  # seconds; the server itself ends what is in flight after up to 1 s, and the next probe comes within 2 s
SABOTAGE = """
import os, threading, time
act, at, number = (os.environ.get(name) for name in ("SABOTAGE", "SABOTAGE_AT", "MLX_GATEWAY_CHANNEL"))
def fail():
    raise RuntimeError("[metal::malloc] Attempting to allocate 1 bytes, out of memory")
def sabotage():
    while not os.path.exists(at):
        time.sleep(0.02)
    if act == "garble":
        os.write(int(number), os.urandom(3000) + b"\\n")
    else:
        import mlx.core as mx
        mx.get_active_memory = fail
if number:
    threading.Thread(target=sabotage, daemon=True).start()
"""
ACTS = ("kill", "garble")
CROWD = 10


@pytest.fixture(scope="module")
def trigger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sabotage begins when it exists."""
    return tmp_path_factory.mktemp("sabotage") / "trigger"


@pytest.fixture(scope="module")
def gateway(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory, trigger: Path) -> Iterator[Gateway]:
    (trigger.parent / "sitecustomize.py").write_text(SABOTAGE)
    base: Json = {"model": str(tiny_model), "resume": "off", "restart": QUICK_RESTART}
    env = {"PYTHONPATH": str(trigger.parent), "SABOTAGE_AT": str(trigger)}
    models = {"well": base} | {act: {**base, "env": {**env, "SABOTAGE": act}} for act in ACTS}
    with launched({"models": models}, tmp_path_factory.mktemp("instrument")) as running:
        yield running


def report(gateway: Gateway, name: str) -> Json | None:
    found: Json | None = gateway.http.get("/api/status").json()["models"][name]["backends"][0]["report"]
    return found


def test_what_a_server_tells_of_itself(gateway: Gateway) -> None:
    def told(decoding: int) -> Json | None:
        now = report(gateway, "well")
        return now if now and now["generating"] and now["decoding"] == decoding else None

    with gateway.stream(chat("hello", "well", max_tokens=LONG)):
        busy = wait_until(lambda: told(1), what="a member that decodes") or {}
        assert busy["longest"] > 0
        wait_until(lambda: (report(gateway, "well") or busy)["longest"] > busy["longest"], what="a longer member")

    idle = wait_until(lambda: told(0), what="no member") or {}
    assert 0 < idle["active"] <= idle["peak"]
    assert whole(gateway.ask(chat("hello", "well", max_tokens=3)))
    wait_until(lambda: (report(gateway, "well") or idle)["cached_sequences"] > 0, what="a cached prompt")


def test_what_fits_the_memory_runs_together(gateway: Gateway) -> None:
    """More at a time than the number that holds where the memory is not known."""
    limit = gateway.http.get("/api/status").json()["models"]["well"]["backends"][0]["max_inflight"]
    assert (limit["requests"], limit["unread"]) == (32, 8)
    with contextlib.ExitStack() as streams:
        opened = [
            streams.enter_context(gateway.stream(chat(f"hello {number}", "well", max_tokens=LONG)))
            for number in range(CROWD)
        ]
        for stream in opened:
            stream.until_text()
        wait_until(lambda: (report(gateway, "well") or {}).get("decoding") == CROWD, what="all of them decode")


def test_a_server_goes_on_when_its_instrument_fails(gateway: Gateway, trigger: Path) -> None:
    wait_until(lambda: all(report(gateway, act) for act in ACTS), what="reports")
    before = [gateway.backend(f"{act}:0") for act in ACTS]
    trigger.touch()
    wait_until(lambda: not any(report(gateway, act) for act in ACTS), what="no reports")
    for act, was in zip(ACTS, before, strict=True):
        assert whole(gateway.ask(chat("hello", act, max_tokens=5)))
        now = gateway.backend(f"{act}:0")
        assert (now["pid"], now["state"], now["last_failure"]) == (was["pid"], "ready", None)
    (line,) = [line for line in gateway.output("kill:0").splitlines() if PREFIX in line]
    assert "RuntimeError" in line
    (line,) = [line for line in gateway.log.splitlines() if "reports of the process" in line]
    assert "backend=garble:0" in line


def test_the_death_of_the_generation_thread_is_told_at_once(gateway: Gateway) -> None:
    """To the request in flight too, which the server leaves waiting for up to a second."""
    with gateway.stream(chat("hello", "well", max_tokens=LONG)) as stream:
        stream.until_text()
        killer = threading.Thread(target=poison, args=(gateway.backend_url("well:0"),))
        killer.start()
        error = stream.rest().error
    killer.join()
    assert error is not None
    assert error["code"] == "backend_wedged"
    died = re.search(r"^(\S+ \S+) - ERROR - .*generation thread died", gateway.output("well:0"), re.MULTILINE)
    told = re.search(r"^(\S+ \S+) \S+ +backend backend=well:0 state=stopping .*cause=wedge", gateway.log, re.MULTILINE)
    assert died
    assert told
    delay = datetime.fromisoformat(told[1]) - datetime.fromisoformat(died[1].replace(",", "."))
    assert 0 < delay.total_seconds() < AT_ONCE

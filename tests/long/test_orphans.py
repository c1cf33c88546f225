"""A gateway that is SIGKILLed in the middle of its starts, again and again: nothing of it is left, by its reaper, or by
the next start where the reaper was killed too.

    pytest -m slow tests/long/test_orphans.py        ORPHAN_ROUNDS=40 by default, 2 to 4 s each
"""

import os
import random
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.integration.harness import Gateway, descendants, fake, spawn, wait_until, write_config

ROUNDS = int(os.environ.get("ORPHAN_ROUNDS", "40"))
REPLICAS = 8
GONE_WITHIN = 5.0  # seconds
RESTLESS = {"min_backoff": "10ms", "max_backoff": "20ms", "max_failures": 1000}
MODES = pytest.mark.parametrize("mode", ["", "load=exit exit=-9"], ids=["slow starts", "starts without end"])

pytestmark = [pytest.mark.slow, pytest.mark.timeout(60 * ROUNDS)]


def started(folder: Path, mode: str, seconds: float) -> Gateway:
    """``seconds``: from its first spawn until this returns."""
    config = {"models": {"tiny": fake(mode, replicas=REPLICAS, restart=RESTLESS, resume="off")}}
    gateway = spawn(["serve", str(write_config(folder, config)), "--port", "0"], folder)
    wait_until(lambda: "state=starting" in gateway.log)
    time.sleep(seconds)
    return gateway


def is_reaper(process: psutil.Process) -> bool:
    try:
        return "backends.process.reaper" in process.cmdline()
    except psutil.Error:
        return False


def left(gateway: Gateway) -> list[psutil.Process]:
    found = descendants(str(gateway.folder / "state"))
    return [process for process in found if process.pid != gateway.process.pid and not is_reaper(process)]


def left_in_the_end(gateway: Gateway) -> list[str]:
    """After the time that is allowed; those are then killed."""
    deadline = time.monotonic() + GONE_WITHIN
    while (found := left(gateway)) and time.monotonic() < deadline:
        time.sleep(0.1)
    for process in found:
        process.send_signal(signal.SIGKILL)
    return [str(process) for process in found]


@MODES
def test_nothing_is_left(tmp_path: Path, mode: str) -> None:
    chance = random.Random(7)
    orphans = dict[int, list[str]]()
    for number in range(ROUNDS):
        gateway = started(tmp_path / str(number), mode, chance.uniform(0.0, 0.4))
        gateway.kill()
        if found := left_in_the_end(gateway):
            orphans[number] = found
    assert orphans == {}, f"{len(orphans)} of {ROUNDS} rounds"


@MODES
def test_the_next_start_leaves_nothing(tmp_path: Path, mode: str) -> None:
    chance = random.Random(8)
    orphans = dict[int, list[str]]()
    found_running = 0
    for number in range(ROUNDS):
        gateway = started(tmp_path / str(number), mode, chance.uniform(0.0, 0.4))
        for process in filter(is_reaper, descendants(str(gateway.folder / "state"))):
            process.kill()
        gateway.kill()
        found_running += bool(left(gateway))
        write_config(gateway.folder, {"models": {"tiny": fake(load="on_demand")}})
        second = spawn(["serve", str(gateway.folder / "config.yaml"), "--port", "0"], gateway.folder)
        second.await_listening()
        if found := left_in_the_end(second):
            orphans[number] = found
        assert second.terminate() == 0
    assert found_running, "there was something to find"
    assert orphans == {}, f"{len(orphans)} of {ROUNDS} rounds"

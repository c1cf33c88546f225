"""A gateway that is SIGKILLed in the middle of its starts, again and again: nothing of it is left.

pytest -m slow tests/long/test_orphans.py        ORPHAN_ROUNDS=40 by default, 2 to 3 s each
"""

import os
import random
import signal
import time
from pathlib import Path

import pytest

from tests.integration.harness import Gateway, descendants, fake, spawn, wait_until, write_config

ROUNDS = int(os.environ.get("ORPHAN_ROUNDS", "40"))
REPLICAS = 8
GONE_WITHIN = 5.0  # seconds
RESTLESS = {"min_backoff": "10ms", "max_backoff": "20ms", "max_failures": 1000}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(60 * ROUNDS)]


def left(gateway: Gateway) -> list[str]:
    return [one for one in gateway.leftovers() if "backends.process.reaper" not in one]


def killed_while_starting(folder: Path, seconds: float, mode: str) -> Gateway:
    """``seconds``: from the first spawn to the SIGKILL."""
    config = {"models": {"tiny": fake(mode, replicas=REPLICAS, restart=RESTLESS, resume="off")}}
    gateway = spawn(["serve", str(write_config(folder, config)), "--port", "0"], folder)
    wait_until(lambda: "state=starting" in gateway.log)
    time.sleep(seconds)
    gateway.kill()
    return gateway


@pytest.mark.parametrize("mode", ["", "load=exit exit=-9"], ids=["slow starts", "starts without end"])
def test_nothing_is_left(tmp_path: Path, mode: str) -> None:
    chance = random.Random(7)
    orphans = dict[int, list[str]]()
    for number in range(ROUNDS):
        gateway = killed_while_starting(tmp_path / str(number), chance.uniform(0.0, 0.4), mode)
        deadline = time.monotonic() + GONE_WITHIN
        while (found := left(gateway)) and time.monotonic() < deadline:
            time.sleep(0.1)
        if found:
            orphans[number] = found
            for process in descendants(str(gateway.folder / "state")):
                process.send_signal(signal.SIGKILL)
    assert orphans == {}, f"{len(orphans)} of {ROUNDS} rounds"

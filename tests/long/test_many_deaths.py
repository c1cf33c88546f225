"""One replica of a real mlx_lm.server dies again and again, each time after it has answered: it is never given up, nor
crash looping, and serves again within its load time and SLACK seconds of the exit of its process.

    pytest -m slow tests/long/test_many_deaths.py --log-cli-level=INFO        one and a half minutes
"""

import logging
import random
import sys
from pathlib import Path
from statistics import mean

import pytest

from tests.conftest import Launch
from tests.integration.deaths import CAUSES, KINDS, die
from tests.integration.wire import chat, whole

SLACK = 2.0  # seconds: the default min_backoff is one of them
WINDOW = 300.0  # seconds, the default window
KILLS = 20
OTHERS = ("wedge", "oom") * 3

log = logging.getLogger(__name__)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(sys.platform != "linux", reason="prlimit exists on Linux only"),
]


def test_many_deaths(launch: Launch, tiny_model: Path) -> None:
    """The kills come first: all of them within ``window``."""
    gateway = launch({"models": {"tiny": {"model": str(tiny_model)}}})
    others = random.Random(7).sample(OTHERS, len(OTHERS))
    deaths = []
    for number, kind in enumerate(["kill"] * KILLS + others):
        assert whole(gateway.ask(chat(f"number {number}", max_tokens=5)))
        deaths.append(die(gateway, "tiny:0", kind))
        log.info("%s", deaths[-1])
        assert deaths[-1].cause == CAUSES[kind]
        told = gateway.backend("tiny:0")
        assert (told["restarts"], told["crash_looping"], told["failed_lives"]) == (number + 1, False, 0)
    for kind in KINDS:
        waits = [death.wait for death in deaths if death.kind == kind]
        log.info("%d times %s: launched %.2f to %.2f s after the exit", len(waits), kind, min(waits), max(waits))
    log.info("mean load %.2f s", mean(death.load for death in deaths))
    assert sum(death.found + death.wait + death.load for death in deaths[:KILLS]) < WINDOW
    assert "state=failed" not in gateway.log
    assert max(death.wait for death in deaths) < SLACK

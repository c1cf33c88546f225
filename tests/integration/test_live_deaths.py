"""A model with one replica, whose process dies in one way after the other: each is a pause, none is one too many."""

import sys
from pathlib import Path

import pytest

from tests.conftest import Launch
from tests.integration.deaths import CAUSES, KINDS, die
from tests.integration.wire import chat, whole

SLACK = 2.0  # seconds beyond the load time

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="prlimit exists on Linux only"),
]


def test_who_has_answered_comes_back_soon_however_often_it_dies(launch: Launch, tiny_model: Path) -> None:
    """Of lives that answered nothing, the second would be one too many."""
    restart = {"min_backoff": "200ms", "max_failures": 2}
    gateway = launch({"models": {"tiny": {"model": str(tiny_model), "resume": "off", "restart": restart}}})
    for number, kind in enumerate(KINDS):
        assert whole(gateway.ask(chat(f"number {number}", max_tokens=5)))
        death = die(gateway, "tiny:0", kind)
        assert death.wait < SLACK
        assert death.cause == CAUSES[kind]
        told = gateway.backend("tiny:0")
        assert (told["restarts"], told["crash_looping"], told["failed_lives"]) == (number + 1, False, 0)
    assert whole(gateway.ask(chat("hello", max_tokens=5)))
    assert "state=failed" not in gateway.log

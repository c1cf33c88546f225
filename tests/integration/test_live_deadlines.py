"""Silence that is too long by the rhythm of the model, with the default of 2 minutes for ``timeouts.progress``."""

import os
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from signal import SIGSTOP

import pytest

from backends.admission.rhythm import FLOOR
from tests.integration.harness import QUICK_RESTART, Background, Gateway, alive, launched, wait_until
from tests.integration.wire import Answer, Json, chat

PAUSING = Path(__file__).resolve().parents[1] / "fakes" / "pausing_mlx.py"
LONG = 1_000_000  # tokens
NAMES = ("stopped", "wedged", "working")
REPLACED = ("stopped", "wedged")  # after about 11 seconds each
WITHIN = 60.0  # seconds: half of timeouts.progress
SILENT = 13.5  # seconds: more than what is too long for one that does nothing

pytestmark = pytest.mark.slow


def model(folder: Path, pause: Path) -> Json:
    command = [sys.executable, str(PAUSING), "--host", "{host}", "--port", "{port}", "--model", "{model}"]
    return {
        "command": [*command, "--max-tokens", str(LONG)],
        "model": str(folder),
        "env": {"PAUSE": str(pause)},
        "restart": QUICK_RESTART,
        "resume": "off",
    }


@pytest.fixture
def gateway(tiny_model: Path, tmp_path: Path) -> Iterator[Gateway]:
    models = {name: model(tiny_model, tmp_path / name) for name in NAMES}
    with launched({"models": models}, tmp_path / "gateway") as running:
        yield running


def reading(gateway: Gateway, name: str) -> Background:
    """The answer to a request, which is read as it comes."""

    def read() -> Answer:
        with gateway.stream(chat("once", name, max_tokens=LONG)) as stream:
            return stream.rest()

    return Background(read)


def is_learned(gateway: Gateway, name: str) -> bool:
    (backend,) = gateway.http.get("/api/status").json()["models"][name]["backends"]
    return bool(backend["silence_limit"] == FLOOR)


def replaced(gateway: Gateway, name: str, old: int) -> bool:
    """By a new process; the old one has ended."""
    pid = gateway.backend(f"{name}:0")["pid"]
    return pid is not None and pid != old and not alive(old)


def test_what_does_nothing_is_replaced_and_what_works_is_not(gateway: Gateway, tmp_path: Path) -> None:
    """A process that is stopped; one whose generation thread is stuck; one that works and sends nothing."""
    answers = {name: reading(gateway, name) for name in NAMES}
    for name in NAMES:
        wait_until(partial(is_learned, gateway, name))
    pids = {name: int(gateway.backend(f"{name}:0")["pid"]) for name in NAMES}
    began = time.monotonic()
    (tmp_path / "wedged").write_text("sleep")
    (tmp_path / "working").write_text("search")
    os.kill(pids["stopped"], SIGSTOP)
    for name in REPLACED:
        wait_until(partial(replaced, gateway, name, pids[name]), WITHIN)
        assert time.monotonic() - began < WITHIN
        assert gateway.backend(f"{name}:0")["last_failure"]["cause"] == "stalled"
        assert answers[name].result().code == "backend_stalled"
    wait_until(lambda: time.monotonic() - began > SILENT)
    assert gateway.backend("working:0")["pid"] == pids["working"]
    assert gateway.backend("working:0")["last_failure"] is None
    assert answers["working"].running
    gateway.http.post("/api/backends/working:0/stop")

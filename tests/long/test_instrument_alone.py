"""The instrument's file alone, under versions of mlx-lm in environments of their own. Needs a package index, minutes.

    python -m pytest -q tests/long/test_instrument_alone.py

And what takes long: an instrument that hangs, beside a server that goes on.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from backends import mlx_server
from backends.domain.engine_command import BoundPromptCache, ReleasePool, SetLimits, encoded
from backends.domain.report import EngineReport, parse_report
from tests.integration.harness import free_port, launched, wait_until
from tests.integration.wire import Json, chat, whole

KILLER = {"prompt": "a", "max_tokens": 4, "stop": [1]}  # a number among the stop words ends the generation thread
PATIENCE = 30.0  # seconds
VERSIONS = ("0.31.3", "0.32.2")


def environment_of(version: str, folder: Path) -> Path:
    """The interpreter of a new environment with that mlx-lm."""
    packages = [f"mlx-lm=={version}", "mlx[cpu]" if sys.platform == "linux" else "mlx"]
    python = folder / "bin" / "python"
    try:
        if shutil.which("uv") is not None:
            subprocess.run(["uv", "venv", "-q", str(folder)], check=True)
            subprocess.run(["uv", "pip", "install", "-q", "--python", str(python), *packages], check=True)
        else:
            subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
            subprocess.run([str(python), "-m", "pip", "install", "-q", *packages], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"cannot be installed here: {error}")
    return python


class Alone:
    """A server under the file, and the gateway's end of its channel in our hands."""

    def __init__(self, python: Path, model: Path, folder: Path) -> None:
        file = shutil.copy(mlx_server.INSTRUMENT, folder / "alone.py")
        self.url, self.log = f"http://127.0.0.1:{(port := free_port())}", folder / "log"
        ours, theirs = socket.socketpair()
        self.ours, self.part = ours, b""
        ours.settimeout(PATIENCE)
        argv = [str(python), "-P", file, "server", "--model", str(model), "--port", str(port)]
        env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
        env |= {"MLX_GATEWAY_CHANNEL": str(theirs.fileno()), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(argv, env=env, cwd=folder, pass_fds=(theirs.fileno(),), stderr=log)
        theirs.close()

    def report(self, wanted: Callable[[EngineReport], object]) -> EngineReport:
        """The next one that is so, within PATIENCE."""
        until, report = time.monotonic() + PATIENCE, None
        while time.monotonic() < until:
            while b"\n" not in self.part:
                data = self.ours.recv(1 << 16)
                assert data, self.log.read_text()
                self.part += data
            line, self.part = self.part.split(b"\n", 1)
            report = parse_report(line)
            if wanted(report):
                return report
        raise AssertionError(f"the last report was {report}\n{self.log.read_text()}")

    def ask(self, **more: Any) -> Json:
        body = {"messages": [{"role": "user", "content": "The river runs. " * 30}], "max_tokens": 400, **more}
        answer: Json = httpx.post(f"{self.url}/v1/chat/completions", json=body, timeout=60.0).json()
        return answer


@pytest.fixture(params=VERSIONS)
def alone(request: pytest.FixtureRequest, tmp_path: Path, tiny_model: Path) -> Iterator[Alone]:
    server = Alone(environment_of(request.param, tmp_path / "env"), tiny_model, tmp_path)
    yield server
    server.process.kill()
    server.process.wait()
    server.ours.close()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_file_alone(alone: Alone) -> None:
    first = alone.report(lambda report: report.generating)
    assert first.active <= first.peak
    wait_until(lambda: "Starting httpd" in alone.log.read_text())
    text = alone.ask()["choices"][0]["message"]["content"]
    busy = alone.report(lambda report: report.decoding)
    assert busy.longest is not None
    assert busy.longest > 30
    alone.report(lambda report: (report.reading, report.decoding) == (0, 0) and report.cached_bytes)
    assert alone.ask(seed=3)["choices"][0]["message"]["content"] == text, "served alone"
    alone.report(lambda report: report.decoding)
    for command in (BoundPromptCache(size=0, entries=5), SetLimits(cache=0), ReleasePool()):
        alone.ours.sendall(encoded(command))
    emptied = alone.report(lambda report: report.cached_bytes == 0 and report.cached_sequences == 0)
    assert emptied.pooled < busy.peak
    alone.report(lambda report: report.pooled == 0)
    assert alone.ask()["choices"][0]["message"]["content"] == text
    with httpx.Client(base_url=alone.url, timeout=2.0) as client, suppress(httpx.HTTPError):  # 0.31.3 never answers
        client.post("/v1/completions", json=KILLER)
    alone.report(lambda report: report.generating is False)
    alone.process.send_signal(signal.SIGTERM)
    assert alone.process.wait(30.0) == -signal.SIGTERM


HANG = """
import os, threading, time
def hang():
    while not os.path.exists(os.environ["SABOTAGE_AT"]):
        time.sleep(0.02)
    import mlx.core as mx
    mx.get_active_memory = lambda: time.sleep(10_000)
if "MLX_GATEWAY_CHANNEL" in os.environ:
    threading.Thread(target=hang, daemon=True).start()
"""


@pytest.mark.slow
def test_a_server_goes_on_when_its_instrument_hangs(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(HANG)
    trigger = tmp_path / "trigger"
    env = {"PYTHONPATH": str(tmp_path), "SABOTAGE_AT": str(trigger)}
    with launched({"models": {"tiny": {"model": str(tiny_model), "env": env}}}, tmp_path / "gateway") as gateway:

        def report() -> Json | None:
            found: Json | None = gateway.http.get("/api/status").json()["models"]["tiny"]["backends"][0]["report"]
            return found

        wait_until(report, what="a report")
        pid = gateway.backend("tiny:0")["pid"]
        trigger.touch()
        wait_until(lambda: report() is None, 20.0, "no report")
        assert whole(gateway.ask(chat("hello", "tiny", max_tokens=5)))
        now = gateway.backend("tiny:0")
        assert (now["pid"], now["state"], now["last_failure"]) == (pid, "ready", None)

"""A gateway as its users run it: a process with a config file, a port and a log.

Each gateway has a state folder of its own, which its children inherit in their environment: it identifies all processes
that the gateway ever started, including orphans.
"""

import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from signal import SIGCONT, SIGKILL, SIGTERM
from typing import Any, TypeVar

import httpx
import psutil
import yaml

from tests.integration.wire import CHAT, PATIENCE, Answer, Json, Stream, of_response

T = TypeVar("T")

FAKE = Path(__file__).resolve().parents[1] / "fakes" / "fake_mlx.py"
STATE_VARIABLE = "MLX_GATEWAY_STATE_DIR"
POLL = 0.05
QUICK_RESTART = {"min_backoff": "200ms", "max_backoff": "1s", "max_failures": 100}
HASTY_RESTART = {**QUICK_RESTART, "max_failures": 2}  # crash looping, or given up, after two failures

RUNNING: list["Gateway"] = []  # a failing test reports their logs


def wait_until(predicate: Callable[[], T], deadline: float = PATIENCE, what: str = "") -> T:
    """The first true value of ``predicate``; AssertionError after ``deadline`` seconds."""
    until = time.monotonic() + deadline
    while not (value := predicate()):
        if time.monotonic() > until:
            raise AssertionError(f"{what or predicate} did not come true within {deadline:g} s; last: {value!r}")
        time.sleep(POLL)
    return value


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextmanager
def listening_on(port: int) -> Iterator[None]:
    """Another socket holds that port."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", port))
        sock.listen()
        yield


def fake(mode: str = "", **model: Any) -> Json:
    """Config of a model that the fake serves; ``mode``: its behaviour for every request."""
    command = [sys.executable, str(FAKE), "--host", "{host}", "--port", "{port}", "--model", "{model}"]
    return {"command": [*command, "--mode", mode] if mode else command, "model": "fake", **model}


# -- the process -------------------------------------------------------------------------------------------------------


class Gateway:
    """``mlx-gateway serve`` with a config, in ``folder``. Created by ``launched``."""

    def __init__(self, process: "subprocess.Popen[bytes]", folder: Path, log_from: int) -> None:
        self.process = process
        self.folder = folder
        self._log_from = log_from  # bytes; the log before is of an earlier gateway in this folder
        self.url = ""
        self.http = httpx.Client(timeout=PATIENCE)

    @property
    def log(self) -> str:
        return (self.folder / "log").read_bytes()[self._log_from :].decode(errors="replace")

    def await_listening(self) -> None:
        def listening() -> str | None:
            found = re.search(r"^listening on (\S+)$", self.log, re.MULTILINE)
            assert found or self.process.poll() is None, f"it exited with {self.process.returncode}:\n{self.log}"
            return found[1] if found else None

        self.url = wait_until(listening, what="listening") or ""
        self.http.base_url = self.url

    # -- queries --

    def health(self) -> Json:
        health: Json = self.http.get("/health").json()
        return health

    def backend(self, name: str) -> Json:
        """One backend as /health shows it; ``name``: its id."""
        backends = self.health()["models"][name.partition(":")[0]]["backends"]
        found: Json = next(b for b in backends if b["id"] == name)
        return found

    def backend_url(self, name: str) -> str:
        backends = self.http.get("/api/status").json()["models"][name.partition(":")[0]]["backends"]
        return str(next(b["url"] for b in backends if b["id"] == name))

    def output(self, name: str) -> str:
        return self.http.get(f"/api/backends/{name}/logs", params={"lines": 2000}).text

    def await_health(self, status: str = "ok", deadline: float = PATIENCE) -> Json:
        def reached() -> Json | None:
            health = self.health()
            return health if health["status"] == status else None

        return wait_until(reached, deadline, f"/health {status}") or {}

    def await_state(self, name: str, *states: str, deadline: float = PATIENCE) -> Json:
        def reached() -> Json | None:
            backend = self.backend(name)
            return backend if backend["state"] in states else None

        return wait_until(reached, deadline, f"{name} {states}") or {}

    def await_failure(self, name: str, deadline: float = PATIENCE) -> Json:
        """The backend's ``last_failure``, once it has one."""
        return wait_until(lambda: self.backend(name)["last_failure"], deadline, f"a failure of {name}") or {}

    def await_life(self, name: str, old_pid: int, deadline: float = PATIENCE) -> Json:
        """The backend once it is ready with another process than ``old_pid``."""

        def reached() -> Json | None:
            backend = self.backend(name)
            return backend if backend["state"] == "ready" and backend["pid"] != old_pid else None

        return wait_until(reached, deadline, f"a new instance of {name}") or {}

    def inflight(self, model: str = "tiny") -> int:
        return sum(b["inflight"] for b in self.health()["models"][model]["backends"])

    def queued(self, model: str = "tiny") -> int:
        return int(self.http.get("/api/status").json()["models"][model]["queued"])

    def signal_backend(self, name: str, number: int) -> int:
        """Returns the pid that the signal was sent to."""
        pid = int(self.backend(name)["pid"])
        os.kill(pid, number)
        return pid

    # -- requests --

    def ask(self, body: Json, path: str = CHAT, **headers: str) -> Answer:
        """The whole answer, streamed or not."""
        if body.get("stream"):
            with Stream(self.url, body, path, headers) as stream:
                return stream.rest()
        with httpx.Client(base_url=self.url, timeout=PATIENCE) as client:
            return of_response(client.post(path, json=body, headers=headers))

    def stream(self, body: Json, path: str = CHAT, **headers: str) -> Stream:
        return Stream(self.url, body, path, headers)

    # -- shutdown --

    def terminate(self, deadline: float = PATIENCE) -> int:
        self.process.send_signal(SIGTERM)
        return self.process.wait(deadline)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(PATIENCE)

    def leftovers(self) -> list[str]:
        """Every process of this gateway except itself; none may outlive it."""
        marker = str(self.folder / "state")
        return [line for p in descendants(marker) if p.pid != self.process.pid and (line := _described(p))]


def _described(process: psutil.Process) -> str:
    """ "" if it has ended meanwhile."""
    try:
        return f"{process.pid} {' '.join(process.cmdline())}"
    except psutil.Error:
        return ""


def alive(pid: int) -> bool:
    """False for a zombie: in a container, orphans of a killed gateway may stay unreaped."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def descendants(marker: str) -> list[psutil.Process]:
    """All processes with ``marker`` as their state folder, except zombies."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(STATE_VARIABLE) == marker and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, STATE_VARIABLE: str(folder / "state"), "PYTHONUNBUFFERED": "1"}


def command(*args: str) -> list[str]:
    return [sys.executable, "-m", "gateway", *args]


def write_config(folder: Path, config: Json) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def spawn(args: Sequence[str], folder: Path) -> Gateway:
    log = folder / "log"
    begin = log.stat().st_size if log.exists() else 0
    with log.open("ab") as out:
        process = subprocess.Popen(command(*args), stdout=out, stderr=out, env=environment(folder), cwd=folder)
    return Gateway(process, folder, begin)


@contextmanager
def launched(config: Json, folder: Path, *, ready: bool = True) -> Iterator[Gateway]:
    """A gateway that listens; with ``ready``, once all its backends are ready. Asserts that no process is left."""
    port = [] if "port" in config.get("server", {}) else ["--port", "0"]
    gateway = spawn(["serve", str(write_config(folder, config)), *port], folder)
    with supervised(gateway):
        gateway.await_listening()
        if ready:
            gateway.await_health()
        yield gateway


@contextmanager
def supervised(gateway: Gateway) -> Iterator[None]:
    """Ends the gateway, and asserts that its processes ended with it."""
    RUNNING.append(gateway)
    try:
        yield
        if gateway.process.poll() is None:
            assert gateway.terminate() == 0
        wait_until(lambda: not gateway.leftovers(), 5, "no process left behind")
    finally:
        gateway.http.close()
        _clean_up(gateway)
        RUNNING.remove(gateway)


def _clean_up(gateway: Gateway) -> None:
    """Ends what a failed test left, so that it does not disturb the next."""
    if gateway.process.poll() is None:
        gateway.kill()
    for process in descendants(str(gateway.folder / "state")):
        try:
            process.send_signal(SIGCONT)
            process.send_signal(SIGKILL)
        except psutil.Error:
            continue


class Background:
    """Runs ``work`` in a thread; ``result`` returns its result or raises its exception."""

    def __init__(self, work: Callable[[], Answer]) -> None:
        self._work = work
        self._result: Answer | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._result = self._work()
        except BaseException as error:  # noqa: BLE001 ``result`` raises it again
            self._error = error

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def result(self, deadline: float = PATIENCE) -> Answer:
        self._thread.join(deadline)
        assert not self._thread.is_alive(), f"no answer within {deadline:g} s"
        if self._error is not None:
            raise self._error
        assert self._result is not None
        return self._result

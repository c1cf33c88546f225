"""A real kill by the kernel's OOM killer, in a cgroup with a limit; needs root and a writable hierarchy (v1 or v2)."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from backends.memory import cgroup
from backends.memory.cgroup import Group
from tests.conftest import Launch
from tests.integration.harness import QUICK_RESTART, Background, wait_until
from tests.integration.wire import chat, whole

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="cgroups are of Linux")]

HELD = 700 << 20  # bytes of another program
HOLD = f"import sys; held = b'x' * {HELD}; print(len(held), flush=True); sys.stdin.read()"
ROOM = 24 << 20  # bytes beyond what is used: enough for a short prompt, not for a long one


class Confined:
    """A group of our own within ``parent``."""

    def __init__(self, parent: Group) -> None:
        self.folder = parent.folder / f"test-{os.getpid()}"
        self._version = parent.version
        self.folder.mkdir()

    @property
    def delegated(self) -> bool:
        return (self.folder / self._version.limit).exists()

    def hold(self, pid: int) -> None:
        (self.folder / "cgroup.procs").write_text(str(pid))

    def limit(self, room: int) -> None:
        """``room``: bytes beyond what is used now."""
        used = int((self.folder / self._version.usage).read_text())
        (self.folder / self._version.limit).write_text(str(used + room))


@pytest.fixture
def confined() -> Iterator[Confined]:
    parent = next((group for group in cgroup.of_process() if (group.folder / group.version.usage).exists()), None)
    if parent is None:
        pytest.skip("no memory cgroup")
    try:
        group = Confined(parent)
    except OSError as error:
        pytest.skip(f"no cgroup can be made here: {error}")
    folder = group.folder
    if not group.delegated:
        folder.rmdir()
        pytest.skip("the parent group delegates no memory controller")
    yield group

    def removed() -> bool:
        try:
            folder.rmdir()
        except OSError:  # its processes have just ended
            return False
        return True

    wait_until(removed)


def prefer(victim: int) -> None:
    """The OOM killer takes this process first: not the gateway, which is in the same group."""
    Path(f"/proc/{victim}/oom_score_adj").write_text("1000")


def test_a_prompt_that_the_oom_killer_ended_a_backend_for_is_not_sent_to_the_next(
    confined: Confined, launch: Launch, tiny_model: Path
) -> None:
    model = {"model": str(tiny_model), "replicas": 2, "load": "on_demand", "resume": "off", "restart": QUICK_RESTART}
    gateway = launch({"models": {"tiny": model}}, ready=False)
    confined.hold(gateway.process.pid)
    assert whole(gateway.ask(chat("hello", max_tokens=4)))
    for name in ("tiny:0", "tiny:1"):
        prefer(gateway.await_state(name, "ready")["pid"])
    confined.limit(ROOM)
    answer = gateway.ask(chat("the river and the lamp " * 2000, max_tokens=4))
    confined.limit(1 << 40)
    backends = gateway.health()["models"]["tiny"]["backends"]
    failures = [backend["last_failure"] for backend in backends if backend["last_failure"]]
    assert [(failure["cause"], failure["exit"]) for failure in failures] == [("oom", -9)]
    assert (answer.status, answer.code) == (503, "backend_oom")


@contextmanager
def another_program(group: Confined) -> Iterator["subprocess.Popen[bytes]"]:
    """In the same group; it holds HELD bytes."""
    command = ["sh", "-c", 'read go; exec "$@"', "sh", sys.executable, "-c", HOLD]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdin
            assert process.stdout
            group.hold(process.pid)
            process.stdin.write(b"go\n")
            process.stdin.flush()
            process.stdout.readline()
            yield process
        finally:
            process.kill()


def test_a_restart_waits_until_another_program_gives_the_memory_back(
    confined: Confined, launch: Launch, tiny_model: Path
) -> None:
    model = {"model": str(tiny_model), "memory": "700MiB", "load": "on_demand", "restart": QUICK_RESTART}
    gateway = launch({"memory": {"budget": "1GiB"}, "models": {"tiny": model}}, ready=False)
    confined.hold(gateway.process.pid)
    assert whole(gateway.ask(chat("hello", max_tokens=4)))
    old = gateway.await_state("tiny:0", "ready")["pid"]
    prefer(old)
    with another_program(confined) as program:
        confined.limit(ROOM)
        broken = Background(lambda: gateway.ask(chat("the river and the lamp " * 1200, max_tokens=4)))
        backend = gateway.await_state("tiny:0", "waiting_for_memory")
        failure, holder = backend["last_failure"], f"PID {program.pid} ("
        assert (failure["cause"], failure["exit"]) == ("oom", -9)
        assert holder in failure["message"]
        assert holder in backend["loading"]["phase"]
        assert backend["loading"]["phase"].startswith("waits for memory: ")
        assert "needs 700 MiB" in backend["loading"]["phase"]
        told = gateway.ask(chat("hello", max_tokens=4), **{"x-stainless-read-timeout": "1.5"})
        assert (told.status, told.code) == (503, "insufficient_memory")
        assert told.error is not None
        assert holder in told.error["message"]
        patient = Background(lambda: gateway.ask(chat("hello", max_tokens=4)))
        wait_until(lambda: gateway.queued() == 2)
        assert gateway.http.get("/api/quarantine").json() == {"requests": [], "ceilings": {}}, "it is not to blame"
        backend = gateway.backend("tiny:0")
        assert (backend["state"], backend["pid"], backend["restarts"]) == ("waiting_for_memory", None, 0)
        began = time.monotonic()
    confined.limit(1 << 40)
    gateway.await_life("tiny:0", old)
    took = time.monotonic() - began
    assert whole(patient.result())
    assert whole(broken.result()), "also the one that was in flight"
    assert took < 15.0, "a load, and no long pause before it"

"""Whether a process works: real processes here, and for macOS a stand-in for its libraries."""

import ctypes
import errno
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from signal import SIGCONT, SIGKILL, SIGSTOP
from typing import Any

import pytest

from backends.process import activity as module
from backends.process import groups
from backends.process.activity import RUSAGE_INFO_V4, activity
from tests.lives import until

Start = Callable[[str], subprocess.Popen[bytes]]

BUSY = "print(flush=True)\nwhile True: pass"
ASLEEP = "import time\nprint(flush=True)\ntime.sleep(60)"
IN_A_CHILD = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {BUSY!r}])"


@pytest.fixture
def start() -> Iterator[Start]:
    started: list[subprocess.Popen[bytes]] = []

    def run(code: str) -> subprocess.Popen[bytes]:
        argv = [sys.executable, "-S", "-c", code]
        started.append(subprocess.Popen(argv, stdout=subprocess.PIPE, start_new_session=True))
        assert started[-1].stdout is not None
        started[-1].stdout.readline()
        return started[-1]

    yield run
    for process in started:
        groups.signal_session(process.pid, groups.create_time(process.pid) or 0.0, SIGKILL)
        process.communicate()


def share(process: subprocess.Popen[bytes], seconds: float = 0.3) -> float:
    """Of a core."""
    created = groups.create_time(process.pid) or 0.0
    began, before = time.monotonic(), activity(process.pid, created)
    time.sleep(seconds)
    after, passed = activity(process.pid, created), time.monotonic() - began
    assert before is not None
    assert after is not None
    return (after.computed + after.queued - before.computed - before.queued) / passed


@pytest.mark.parametrize("code", [BUSY, IN_A_CHILD], ids=["itself", "in a child of it"])
def test_one_that_computes(code: str, start: Start) -> None:
    """Or waits for a core: the machine may be busy."""
    assert share(start(code)) > 0.5


def test_one_that_sleeps(start: Start) -> None:
    assert share(start(ASLEEP)) < 0.1


async def test_one_that_is_stopped(start: Start) -> None:
    process = start(BUSY)
    created = groups.create_time(process.pid) or 0.0

    def stopped() -> bool:
        found = activity(process.pid, created)
        return found is not None and found.stopped

    assert not stopped()
    process.send_signal(SIGSTOP)
    await until(stopped)
    assert share(process) < 0.1
    process.send_signal(SIGCONT)
    await until(lambda: not stopped())


def test_one_that_has_ended(start: Start) -> None:
    process = start(ASLEEP)
    created = groups.create_time(process.pid) or 0.0
    process.kill()
    process.wait()
    assert activity(process.pid, created) is None


def test_a_session_that_cannot_be_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_descriptors(*_: object) -> list[int]:
        raise OSError(errno.EMFILE, "too many open files")

    monkeypatch.setattr(groups, "members", no_descriptors)
    assert activity(1234, 1.0) is None


class Libraries:
    """libproc and libSystem, as real C functions. An Apple silicon machine counts in 125/3 ns."""

    def __init__(self, ticks: int, *, failed: int = 0, denominator: int = 3) -> None:
        buffer = ctypes.POINTER(ctypes.c_char)
        self.ticks, self.failed, self.denominator = ticks, failed, denominator
        self.proc_pid_rusage: Any = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_int, buffer)(self._rusage)
        self.mach_timebase_info: Any = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(self._timebase)

    def _rusage(self, pid: int, flavor: int, out: Any) -> int:
        assert (pid, flavor) == (4321, RUSAGE_INFO_V4)
        ctypes.memmove(ctypes.addressof(out.contents) + 16 + 34 * 8, self.ticks.to_bytes(8, sys.byteorder), 8)
        return self.failed

    def _timebase(self, out: int) -> int:
        ctypes.memmove(out, struct.pack("=II", 125, self.denominator), 8)
        return 0


@pytest.mark.parametrize(
    ("libraries", "seconds"),
    [
        (Libraries(24_000_000 * 7), 7.0),
        (Libraries(24_000_000 * 7, failed=-1), 0.0),
        (Libraries(24_000_000 * 7, denominator=0), 0.0),
    ],
)
def test_the_time_that_macos_counts(libraries: Libraries, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_libraries", lambda: (libraries, libraries))
    assert module._runnable(4321) == pytest.approx(seconds)


def test_a_macos_without_the_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_libraries", lambda: (object(), object()))
    assert module._runnable(4321) == 0.0

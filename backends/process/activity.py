"""Whether a child works: the seconds that the processes of its session computed, or were ready to and had to wait.

A process that is starved by others (nice, a loaded machine) computes next to nothing, and is no more stuck than one
that computes: measured, a server with nice 19 beside two busy processes on two cores had 0.7 % of a core, and was ready
for 1.2; an idle one 0.25 % and none.

    Linux    the run time, and the time in the run queue, of each thread: /proc/PID/task/TID/schedstat
    macOS    the CPU time, or ``ri_runnable_time`` of proc_pid_rusage where that is more: the time that its threads were
             ready, computing included (sys/resource.h)

Reads other processes, which can block: called in a thread. The part for macOS is written from the headers and tested
with a stand-in for its libraries, not on a Mac.
"""

import ctypes
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from backends.domain.activity import Activity
from backends.process import groups

RUSAGE_INFO_V4 = 4
RUNNABLE_OFFSET = 288  # bytes, of ri_runnable_time in rusage_info_v4: after a 16-byte UUID and 34 8-byte numbers
RUSAGE_BUFFER_SIZE = 512  # bytes; rusage_info_v4 has 296
PROC = Path("/proc")


def activity(leader: int, created: float) -> Activity | None:
    """Of the session that (leader, created) leads; None = it has no process, or it cannot be read."""
    try:
        pids = groups.members(leader, created)
    except OSError:  # the gateway has no file descriptors left
        return None
    found = [one for pid in pids if (one := _of_process(pid)) is not None]
    if not found:
        return None
    computed, queued = sum(one.computed for one in found), sum(one.queued for one in found)
    return Activity(computed, queued, any(one.stopped for one in found))


def _of_process(pid: int) -> Activity | None:
    with suppress(psutil.Error, OSError):
        process = psutil.Process(pid)
        times = process.cpu_times()
        computed = float(times.user + times.system)
        return Activity(computed, _queued(process, computed), process.status() == psutil.STATUS_STOPPED)
    return None


def _queued(process: psutil.Process, computed: float) -> float:
    """Raises OSError."""
    if sys.platform == "darwin":
        return max(0.0, _runnable(process.pid) - computed)
    return sum(_queued_thread(task) for task in (PROC / str(process.pid) / "task").iterdir())


def _queued_thread(task: Path) -> float:
    """Seconds that a thread was ready to run and did not; 0 for one that has ended, or on a kernel without the file."""
    try:
        return int((task / "schedstat").read_text().split()[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return 0.0


@cache
def _libraries() -> tuple[Any, Any]:
    """libproc and libSystem."""
    return ctypes.CDLL("/usr/lib/libproc.dylib"), ctypes.CDLL("/usr/lib/libSystem.B.dylib")


class _Timebase(ctypes.Structure):
    """struct mach_timebase_info: nanoseconds for each unit of the kernel's times, as a fraction."""

    _fields_ = [("numerator", ctypes.c_uint32), ("denominator", ctypes.c_uint32)]


def _runnable(pid: int) -> float:
    """Seconds; 0 = not available."""
    buffer, timebase = ctypes.create_string_buffer(RUSAGE_BUFFER_SIZE), _Timebase()
    try:
        proc, system = _libraries()
        failed = proc.proc_pid_rusage(pid, RUSAGE_INFO_V4, buffer) or system.mach_timebase_info(ctypes.byref(timebase))
    except (OSError, AttributeError):
        return 0.0
    if failed or not timebase.denominator:
        return 0.0
    ticks = int.from_bytes(buffer.raw[RUNNABLE_OFFSET : RUNNABLE_OFFSET + 8], sys.byteorder)
    return float(ticks * timebase.numerator / timebase.denominator / 1e9)

"""Memory of one process, sampled while it runs: the verdict on its end needs the last samples.

A sample asks the kernel about another process, which can block while that process allocates or ends; so every method is
called in a thread.
"""

import sys
from collections.abc import Callable, Sequence

import psutil

from backends.memory import cgroup, host
from backends.memory.cgroup import Group
from backends.memory.host import HostMemory

SHORT_FOR = 3.0  # seconds after a sample: the memory of a killed process is free again when its end is noticed


class ProcessMemory:
    """``now`` and ``peak`` in bytes, ``now`` None if it could not be read. ``short``: the machine, or a cgroup of the
    process, was short of memory, or the kernel's OOM killer has struck. ``limited``: the process has its own memory
    limit. ``clock``: monotonic seconds."""

    def __init__(self, memory: HostMemory, clock: Callable[[], float]) -> None:
        self._host = memory
        self._clock = clock
        self._groups: Sequence[Group] = ()
        self._oom_kills = 0  # at the last look
        self._short_at = float("-inf")
        self.pid = 0
        self.now: int | None = None
        self.peak = 0
        self.short = False
        self.limited = False

    def begin(self, pid: int) -> None:
        """The process exists."""
        self.pid = pid
        self._groups = cgroup.of_process(pid)
        self._oom_kills = cgroup.oom_kills(self._groups)

    def sample(self) -> None:
        try:
            process = psutil.Process(self.pid)
            self.now = host.footprint(self.pid)
            self.peak = max(self.peak, self.now)
            self.limited = _limited(process)
        except (psutil.Error, OSError):  # the process has ended, or the gateway has no file descriptors left
            self.now = None
        else:
            self._look()

    def end(self) -> None:
        """The process has ended, and is reaped. ``short`` then holds for its end."""
        self._look()

    def _look(self) -> None:
        now = self._clock()
        self._groups = cgroup.of_process(self.pid) or self._groups  # a wrapper may move it
        kills, before = cgroup.oom_kills(self._groups), self._oom_kills
        self._oom_kills = kills
        if kills > before or self._host.short_of_memory() or any(map(host.is_short, cgroup.limits(self._groups))):
            self._short_at = now
        self.short = now - self._short_at <= SHORT_FOR


def _limited(process: psutil.Process) -> bool:
    """Linux only: macOS neither shows the limits of another process nor enforces a limit on address space."""
    if sys.platform != "linux":
        return False
    limits = (process.rlimit(psutil.RLIMIT_AS), process.rlimit(psutil.RLIMIT_DATA))
    return any(soft != psutil.RLIM_INFINITY for soft, _ in limits)

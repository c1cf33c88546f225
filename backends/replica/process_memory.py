"""Memory of one process, sampled while it runs: the verdict on its end needs the last sample."""

import sys
from dataclasses import dataclass

import psutil

from backends.memory import host


@dataclass(slots=True)
class ProcessMemory:
    """``now`` and ``peak`` in bytes, ``now`` None if it could not be read. ``short``: the whole machine was short of
    memory. ``limited``: the process has its own memory limit."""

    pid: int
    now: int | None = None
    peak: int = 0
    short: bool = False
    limited: bool = False

    def sample(self) -> None:
        try:
            process = psutil.Process(self.pid)
            self.now = host.footprint(process.pid)
            self.peak = max(self.peak, self.now)
            self.limited = _limited(process)
            memory = psutil.virtual_memory()
            self.short = memory.available < host.SHORT_OF_MEMORY * memory.total
        except (psutil.Error, OSError):  # the process has ended, or the gateway has no file descriptors left
            self.now = None


def _limited(process: psutil.Process) -> bool:
    """Linux only: macOS neither shows the limits of another process nor enforces a limit on address space."""
    if sys.platform != "linux":
        return False
    limits = (process.rlimit(psutil.RLIMIT_AS), process.rlimit(psutil.RLIMIT_DATA))
    return any(soft != psutil.RLIM_INFINITY for soft, _ in limits)

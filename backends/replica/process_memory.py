"""Memory of one process, sampled while it lives: a verdict on its death needs the last sample."""

import sys
from dataclasses import dataclass

import psutil

from backends.memory import host

SHORT_OF_MEMORY = 0.04  # of the machine's memory available: below it, a SIGKILL from outside means out of memory


@dataclass(slots=True)
class ProcessMemory:
    """``now`` and ``peak`` in bytes, ``now`` None where it could not be read. ``short``: the whole machine was short of
    memory. ``limited``: the process runs under a limit of its own."""

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
            self.short = memory.available < SHORT_OF_MEMORY * memory.total
        except (psutil.Error, OSError):  # the process is gone, or this one is out of descriptors
            self.now = None


def _limited(process: psutil.Process) -> bool:
    """Linux only: macOS neither tells the limits of another process nor enforces one on address space."""
    if sys.platform != "linux":
        return False
    limits = (process.rlimit(psutil.RLIMIT_AS), process.rlimit(psutil.RLIMIT_DATA))
    return any(soft != psutil.RLIM_INFINITY for soft, _ in limits)

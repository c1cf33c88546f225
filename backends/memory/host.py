"""Total and available memory of this machine, and the footprint of a process.

macOS: from the kernel (``mach``), because the count of free pages says nothing there; a process counts with its
physical footprint, which unlike the resident size includes Metal memory. Linux: MemAvailable and the limits of the
cgroups (``cgroup``); a process counts with its resident set.

``HostMemory`` is the only owner of a reading: all callers within ``MAX_AGE`` get the same figures.
"""

import sys
from collections.abc import Callable

import psutil

from backends.memory import cgroup, mach
from backends.memory.cgroup import Memory

MAX_AGE = 0.25  # seconds, of a reading
SHORT_OF_MEMORY = 0.04  # share of memory that is available; below it, a SIGKILL from outside means out of memory


def memory() -> Memory:
    """Of the machine, or of the cgroup that this process is confined to. Not cached."""
    if sys.platform == "darwin":
        try:
            return Memory(mach.mach().total(), mach.mach().available())
        except (OSError, AttributeError):  # a kernel without the call: psutil, which is coarser
            pass
    return cgroup.confined(whole(), cgroup.limits(cgroup.of_process()))


def whole() -> Memory:
    """Of the machine, without limits, as psutil tells."""
    seen = psutil.virtual_memory()
    return Memory(int(seen.total), int(seen.available))


def available() -> int:
    return memory().available


class HostMemory:
    """The machine's memory, read at most once in ``max_age`` seconds. ``clock``: monotonic seconds. Thread-safe.

    When a request ends, the scheduler and each monitor read at once; memory does not change that fast.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        *,
        read: Callable[[], Memory] = memory,
        max_age: float = MAX_AGE,
    ) -> None:
        self._clock = clock
        self._read = read
        self._max_age = max_age
        self._reading: tuple[float, Memory] | None = None  # (monotonic seconds, figures)

    def memory(self) -> Memory:
        now, reading = self._clock(), self._reading
        if reading is None or now - reading[0] >= self._max_age:
            self._reading = reading = now, self._read()
        return reading[1]

    def available(self) -> int:
        """Bytes."""
        return self.memory().available

    def short_of_memory(self) -> bool:
        """So little memory is available that the system may be killing processes."""
        return is_short(self.memory())


def is_short(seen: Memory) -> bool:
    return seen.available < SHORT_OF_MEMORY * seen.total


def footprint(pid: int) -> int:
    """Of one process, in bytes. Raises psutil.Error."""
    if sys.platform == "darwin" and (found := mach.footprint(pid)):
        return found
    return int(psutil.Process(pid).memory_info().rss)

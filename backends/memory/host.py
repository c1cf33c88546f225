"""Total and available memory of this machine, and the footprint of a process.

macOS: from the kernel (``mach``), because the count of free pages says nothing there; a process counts with its
physical footprint, which unlike the resident size includes Metal memory. Linux: MemAvailable and the limits of the
cgroups, version 2 or 1; a process counts with its resident set.

``HostMemory`` is the only owner of a reading: all callers within ``MAX_AGE`` get the same figures.
"""

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from backends.memory import mach

CGROUP = Path("/sys/fs/cgroup")
MAX_AGE = 0.25  # seconds, of a reading
SHORT_OF_MEMORY = 0.04  # share of memory that is available; below it, a SIGKILL from outside means out of memory


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes. ``available``: can be allocated without swapping."""

    total: int
    available: int


def memory() -> Memory:
    """Of the machine, or of the cgroup that this process is confined to. Not cached."""
    if sys.platform == "darwin":
        try:
            return Memory(mach.mach().total(), mach.mach().available())
        except (OSError, AttributeError):  # a kernel without the call: psutil, which is coarser
            pass
    seen = psutil.virtual_memory()
    return _confined(Memory(int(seen.total), int(seen.available)), _cgroup())


def available() -> int:
    return memory().available


class HostMemory:
    """The machine's memory, read at most once in ``max_age`` seconds. ``clock``: monotonic seconds.

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
        now = self._clock()
        if self._reading is None or now - self._reading[0] >= self._max_age:
            self._reading = now, self._read()
        return self._reading[1]

    def available(self) -> int:
        """Bytes."""
        return self.memory().available

    def short_of_memory(self) -> bool:
        """So little memory is available that the system may be killing processes."""
        seen = self.memory()
        return seen.available < SHORT_OF_MEMORY * seen.total


def footprint(pid: int) -> int:
    """Of one process, in bytes. Raises psutil.Error."""
    if sys.platform == "darwin" and (found := mach.footprint(pid)):
        return found
    return int(psutil.Process(pid).memory_info().rss)


# -- cgroups of Linux --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Hierarchy:
    """File names of one cgroup version. ``entry``: matches its line in /proc/self/cgroup."""

    entry: re.Pattern[str]
    folder: str
    limit: str
    usage: str
    reclaimable: re.Pattern[str]  # in memory.stat: the file cache that is dropped under pressure


_HIERARCHIES = (
    _Hierarchy(
        re.compile(r"^0::/(.*)$", re.MULTILINE),
        "",
        "memory.max",
        "memory.current",
        re.compile(r"^inactive_file (\d+)$", re.MULTILINE),
    ),
    _Hierarchy(
        re.compile(r"^\d+:(?:[^:\n]*,)?memory(?:,[^:\n]*)?:/(.*)$", re.MULTILINE),
        "memory",
        "memory.limit_in_bytes",  # unlimited: nearly 2**63
        "memory.usage_in_bytes",
        re.compile(r"^total_inactive_file (\d+)$", re.MULTILINE),
    ),
)


def _confined(whole: Memory, limits: list[Memory]) -> Memory:
    for limit in limits:
        whole = Memory(min(whole.total, limit.total), min(whole.available, limit.available))
    return whole


def _cgroup(own: Path = Path("/proc/self/cgroup"), root: Path = CGROUP) -> list[Memory]:
    """The limits of this process's cgroup and of its parents; [] = none."""
    try:
        entries = own.read_text()
    except OSError:
        return []
    found: list[Memory | None] = []
    for files in _HIERARCHIES:
        if (entry := files.entry.search(entries)) is not None:
            top = root / files.folder
            folder = top / entry[1]
            places = (place for place in (folder, *folder.parents) if place.is_relative_to(top))
            found += [_limit_of(place, files) for place in places]
    return [limit for limit in found if limit is not None]


def _limit_of(folder: Path, files: _Hierarchy) -> Memory | None:
    try:
        most, now = (folder / files.limit).read_text().strip(), int((folder / files.usage).read_text())
        stat = (folder / "memory.stat").read_text()
    except (OSError, ValueError):
        return None
    if not most.isdigit():
        return None  # "max"
    cached = files.reclaimable.search(stat)
    return Memory(int(most), max(0, int(most) - now + (int(cached[1]) if cached else 0)))

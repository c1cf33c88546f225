"""The cgroups that confine a process on Linux, version 2 or 1: limits, usage, and how often the kernel's OOM killer
struck in them. Elsewhere there are none.

The limits of all groups around a process count, up to the root of the hierarchy that is visible here. A container may
see its own group as the root, or (version 1) a path that does not exist in it: then only the root counts.

The counter of OOM kills is evidence where available memory is none: an allocation that exceeds the limit at once is
never seen by a reading per second, and after the kill the memory is free again.
"""

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
PROC = Path("/proc")
MAX_GROUPS = 1000  # within one, that are looked at
_OOM_KILL = re.compile(r"^oom_kill (\d+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes. ``available``: can be allocated without swapping."""

    total: int
    available: int


@dataclass(frozen=True, slots=True)
class _Version:
    """File names of one cgroup version. ``entry``: matches its line in /proc/PID/cgroup."""

    entry: re.Pattern[str]
    folder: str
    limit: str
    usage: str
    reclaimable: re.Pattern[str]  # in memory.stat: the file cache that is dropped under pressure
    events: str  # has a line "oom_kill COUNT"; since Linux 4.13


_VERSIONS = (
    _Version(
        entry=re.compile(r"^0::/(.*)$", re.MULTILINE),
        folder="",
        limit="memory.max",
        usage="memory.current",
        reclaimable=re.compile(r"^inactive_file (\d+)$", re.MULTILINE),
        events="memory.events",
    ),
    _Version(
        entry=re.compile(r"^\d+:(?:[^:\n]*,)?memory(?:,[^:\n]*)?:/(.*)$", re.MULTILINE),
        folder="memory",
        limit="memory.limit_in_bytes",  # unlimited: nearly 2**63
        usage="memory.usage_in_bytes",
        reclaimable=re.compile(r"^total_inactive_file (\d+)$", re.MULTILINE),
        events="memory.oom_control",
    ),
)


@dataclass(frozen=True, slots=True)
class Group:
    """A group that a process is in, directly or through a group within."""

    folder: Path
    version: _Version


def of_process(pid: int | str = "self", *, proc: Path = PROC, root: Path = ROOT) -> list[Group]:
    """The innermost group of each version first. [] = none, or no such process."""
    entries = _read(proc / str(pid) / "cgroup")
    found: list[Group] = []
    for version in _VERSIONS:
        if (entry := version.entry.search(entries)) is not None:
            top = root / version.folder
            folder = top / entry[1]
            places = (place for place in (folder, *folder.parents) if place.is_relative_to(top))
            found += [Group(place, version) for place in places]
    return found


def limits(groups: Sequence[Group]) -> list[Memory]:
    return [limit for group in groups if (limit := _limit_of(group)) is not None]


def confined(whole: Memory, within: Sequence[Memory]) -> Memory:
    for limit in within:
        whole = Memory(min(whole.total, limit.total), min(whole.available, limit.available))
    return whole


def narrowest(whole: Memory, groups: Sequence[Group]) -> Group | None:
    """The group that has less available than the whole machine and all others; None = no group has."""
    found = [(limit.available, group) for group in groups if (limit := _limit_of(group)) is not None]
    available, group = min(found, key=lambda one: one[0], default=(whole.available, None))
    return group if available < whole.available else None


def members(group: Group) -> list[int]:
    """Pids of the processes in the group, and in the groups within."""
    folders = (group.folder, *islice((path.parent for path in group.folder.glob("*/**/cgroup.procs")), MAX_GROUPS))
    return [int(pid) for folder in folders for pid in _read(folder / "cgroup.procs").split() if pid.isdigit()]


def oom_kills(groups: Sequence[Group], *, proc: Path = PROC) -> int:
    """Processes of the innermost group that counts them, or of the whole machine, that the OOM killer has ended so far;
    0 where nobody counts."""
    counts = (_count(group.folder / group.version.events, _OOM_KILL) for group in groups)
    count = next((count for count in counts if count is not None), None)
    return (_count(proc / "vmstat", _OOM_KILL) or 0) if count is None else count


def _limit_of(group: Group) -> Memory | None:
    version = group.version
    most, now = _read(group.folder / version.limit).strip(), _read(group.folder / version.usage).strip()
    if not most.isdigit() or not now.isdigit():
        return None  # no such group, or "max"
    cached = _count(group.folder / "memory.stat", version.reclaimable) or 0
    return Memory(int(most), max(0, int(most) - int(now) + cached))


def _count(path: Path, line: re.Pattern[str]) -> int | None:
    found = line.search(_read(path))
    return None if found is None else int(found[1])


def _read(path: Path) -> str:
    """ "" if there is no such file."""
    with suppress(OSError, ValueError):
        return path.read_text()
    return ""

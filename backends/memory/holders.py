"""Reads who holds the memory of this machine, or of its GPU: the figures, and the processes by their size.

Of a process counts what ``host.footprint`` says. On macOS that of other users' processes cannot be read, so these hold
nothing here; that suits the question, which is whether waiting for a process is worth while. A process is ours if its
session is led by one of ours.
"""

import os
import sys
from collections.abc import Mapping

import psutil

from backends.memory import cgroup, host, mach, nvidia
from backends.memory.occupancy import Holder, Occupancy, Place
from backends.process import groups

MAX_PROCESSES = 20_000


def occupancy(place: Place, own: frozenset[int]) -> Occupancy | None:
    """``Occupancies``. The machine's takes about 0.1 ms for each process."""
    return _of_machine(own) if place is Place.MACHINE else _of_device(own)


def _of_machine(own: frozenset[int]) -> Occupancy:
    seen = host.memory()
    sizes = {pid: _footprint(pid) for pid in _pids()[:MAX_PROCESSES]}
    ours, theirs = _split(sizes, own | {os.getpid()})
    taken = seen.total - seen.available - sum(ours.values())
    others = max(0, min(taken, sum(theirs.values())))  # what processes share is in the size of each
    return Occupancy(Place.MACHINE, seen.total, seen.available, others, _largest(theirs), ours)


def _pids() -> list[int]:
    """Of the processes that share this memory: all, or those in the cgroup whose limit is the narrowest."""
    narrow = cgroup.narrowest(host.whole(), cgroup.of_process())
    return psutil.pids() if narrow is None else cgroup.members(narrow)


def _of_device(own: frozenset[int]) -> Occupancy | None:
    driver = nvidia.nvml()
    if driver is None:
        return None
    try:
        total, free = driver.memory()
    except OSError:
        return None
    try:
        sizes = driver.processes()
    except (OSError, AttributeError):  # an older driver
        sizes = {}
    ours, theirs = _split(sizes, own)
    # Nothing but processes takes it, listed or not. Where we have processes and none of them is listed, nobody can tell
    # their share from that of others.
    others = max(0, total - free - sum(ours.values())) if ours or not own else 0
    return Occupancy(Place.DEVICE, total, free, others, _largest(theirs), ours)


def _split(sizes: Mapping[int, int], own: frozenset[int]) -> tuple[dict[int, int], dict[int, int]]:
    """(ours by the leader of the session, others by pid)."""
    ours: dict[int, int] = {}
    theirs: dict[int, int] = {}
    for pid, size in sizes.items():
        leader = pid if pid in own else groups.session(pid)
        if leader in own:
            ours[leader] = ours.get(leader, 0) + size
        elif size:
            theirs[pid] = size
    return ours, theirs


def _largest(sizes: Mapping[int, int]) -> Holder | None:
    pid = max(sizes, key=lambda pid: sizes[pid], default=None)
    return None if pid is None else Holder(pid, _name(pid), sizes[pid])


def _footprint(pid: int) -> int:
    """Bytes; 0 = it has ended, or may not be looked at."""
    try:
        return host.footprint(pid)
    except (psutil.Error, OSError):
        return 0


def _name(pid: int) -> str:
    """As it can be told: a process may call itself anything, line breaks and bytes that are no text included."""
    return "".join(char if char.isprintable() else "?" for char in _own_name(pid)) or "?"


def _own_name(pid: int) -> str:
    """Not psutil's on macOS: that reads the command line of a process with a long name, which can block there."""
    if sys.platform == "darwin":
        return mach.name(pid)
    try:
        return psutil.Process(pid).name()
    except (psutil.Error, OSError):
        return ""

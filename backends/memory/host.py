"""What this machine has in memory and can still give, and what a process of ours takes of it.

macOS: "free" pages say nothing there. What can be given is all but what is wired, compressed, or anonymous and not
purgeable (the file cache goes when it is needed), and nothing while the kernel calls the pressure critical. A process
takes its physical footprint, which unlike the resident size has what Metal holds. Linux: MemAvailable, and what the
cgroup leaves; a process takes its resident set.

The parts for macOS were written from its documentation and tested with recorded output, not on a Mac.
"""

import ctypes
import re
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psutil

CRITICAL = 4  # kern.memorystatus_vm_pressure_level: 1 normal, 2 warning
CGROUP = Path("/sys/fs/cgroup")
WITHIN = 2.0  # seconds for a command that takes milliseconds
RUSAGE_INFO_V0 = 0
FOOTPRINT_AT = 72  # bytes into rusage_info_v0: ri_phys_footprint, after a UUID of 16 bytes and seven numbers of 8


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes. ``available``: can be given without swapping."""

    total: int
    available: int


def memory() -> Memory:
    """Of the whole machine, or of the part of it that this process is confined to."""
    seen = psutil.virtual_memory()
    if sys.platform == "darwin":
        return Memory(int(seen.total), _mac_available(int(seen.total), int(seen.available)))
    return _confined(Memory(int(seen.total), int(seen.available)), _cgroup())


def available() -> int:
    return memory().available


def footprint(pid: int) -> int:
    """Bytes that the process takes. Raises psutil.Error."""
    if sys.platform == "darwin" and (found := _mac_footprint(pid)):
        return found
    return int(psutil.Process(pid).memory_info().rss)


# -- macOS -------------------------------------------------------------------------------------------------------------


def _mac_available(total: int, otherwise: int) -> int:
    try:
        pressure = _output("sysctl", "-n", "kern.memorystatus_vm_pressure_level").strip()
        return mac_available(total, _output("vm_stat"), int(pressure or 1))
    except (OSError, subprocess.SubprocessError, ValueError):
        return otherwise


def mac_available(total: int, vm_stat: str, pressure: int) -> int:
    """``vm_stat``: what that command prints. Raises ValueError where it is something else."""
    if pressure >= CRITICAL:
        return 0
    size = re.search(r"page size of (\d+) bytes", vm_stat)
    pages = {name.strip(): int(count) for name, count in re.findall(r"^(.+?):\s+(\d+)\.$", vm_stat, re.MULTILINE)}
    try:
        held = pages["Pages wired down"] + pages["Pages occupied by compressor"] + pages["Anonymous pages"]
        purgeable = pages["Pages purgeable"]
    except KeyError as missing:
        raise ValueError(f"vm_stat says nothing of {missing}") from None
    if size is None:
        raise ValueError("vm_stat says nothing of its page size")
    return max(0, total - int(size[1]) * (held - purgeable))


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=WITHIN, check=True).stdout


@cache
def _libproc() -> ctypes.CDLL:
    return ctypes.CDLL("/usr/lib/libproc.dylib", use_errno=True)


def _mac_footprint(pid: int) -> int:
    """0 where it cannot be had."""
    buffer = ctypes.create_string_buffer(512)
    try:
        failed = _libproc().proc_pid_rusage(pid, RUSAGE_INFO_V0, buffer)
    except (OSError, AttributeError):
        return 0
    return 0 if failed else int.from_bytes(buffer.raw[FOOTPRINT_AT : FOOTPRINT_AT + 8], sys.byteorder)


# -- Linux -------------------------------------------------------------------------------------------------------------


def _confined(whole: Memory, limits: list[Memory]) -> Memory:
    for limit in limits:
        whole = Memory(min(whole.total, limit.total), min(whole.available, limit.available))
    return whole


def _cgroup(own: Path = Path("/proc/self/cgroup"), root: Path = CGROUP) -> list[Memory]:
    """The limits of this process's group and of those above it (version 2), where there are any."""
    try:
        entry = next(line for line in own.read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        return []
    folder = root / entry[3:].lstrip("/")
    found = [_limit_of(place) for place in (folder, *folder.parents) if place.is_relative_to(root)]
    return [limit for limit in found if limit is not None]


def _limit_of(folder: Path) -> Memory | None:
    try:
        most, now = (folder / "memory.max").read_text().strip(), int((folder / "memory.current").read_text())
        stat = (folder / "memory.stat").read_text()
    except (OSError, ValueError):
        return None
    if not most.isdigit():
        return None  # "max"
    cached = re.search(r"^inactive_file (\d+)$", stat, re.MULTILINE)
    return Memory(int(most), max(0, int(most) - now + (int(cached[1]) if cached else 0)))

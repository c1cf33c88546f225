"""Who holds the memory of this machine: real processes; and on a Mac, with a stand-in for its library."""

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from ctypes import CFUNCTYPE, c_int, c_uint32, c_void_p
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from backends.memory import cgroup, holders, host, mach
from backends.memory.cgroup import Group, Memory
from backends.memory.mach import FOOTPRINT_OFFSET, NAME_BUFFER_SIZE
from backends.memory.occupancy import Holder, Occupancy, Place

MIB = 2**20
HOLD = "import sys; held = bytearray(64 << 20); print(len(held), flush=True); sys.stdin.read()"


@pytest.fixture
def child() -> Iterator[int]:
    """A process that leads its session and holds 64 MiB."""
    command = [sys.executable, "-c", HOLD]
    process = subprocess.Popen(command, start_new_session=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    yield process.pid
    process.kill()
    process.communicate()


def occupancy(*own: int) -> Occupancy:
    found = holders.occupancy(Place.MACHINE, frozenset(own))
    assert found is not None
    return found


def test_ours_are_not_others(child: int) -> None:
    found = occupancy(child)
    assert 64 * MIB <= found.own[child] < 200 * MIB
    assert found.own[os.getpid()] > 10 * MIB, "the gateway itself"
    assert found.largest is None or found.largest.pid not in {child, os.getpid()}
    assert 0 <= found.others <= found.total - found.available


def test_a_process_that_is_not_ours_is_named(child: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "pids", lambda: [os.getpid(), child, 2**22 + 1])
    monkeypatch.setattr(cgroup, "of_process", list)
    found = occupancy()
    assert found.largest is not None
    assert (found.largest.pid, child in found.own) == (child, False)
    assert found.largest.name.startswith("python")
    assert found.others <= found.largest.size


def test_in_a_cgroup_only_its_processes_share_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outer, inner = tmp_path / "a", tmp_path / "a" / "b"
    (inner / "c").mkdir(parents=True)
    for folder, limit, used, pids in ((outer, "max", 9, "5\n"), (inner, 900 * MIB, 899 * MIB, "6\n7\n")):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "cgroup.procs").write_text(pids)
    (inner / "c" / "cgroup.procs").write_text("8\n")
    version = SimpleNamespace(limit="memory.max", usage="memory.current", reclaimable=cgroup._OOM_KILL)
    groups = [Group(inner, version), Group(outer, version)]  # type: ignore[arg-type]
    monkeypatch.setattr(cgroup, "of_process", lambda: groups)
    sizes = {5: 800 * MIB, 6: 10 * MIB, 7: 20 * MIB, 8: 700 * MIB}
    monkeypatch.setattr(host, "footprint", lambda pid: sizes[pid])
    monkeypatch.setattr(host, "whole", lambda: Memory(2**40, 2**39))
    monkeypatch.setattr(holders, "_name", str)
    found = occupancy()
    assert (found.total, found.available, found.others) == (900 * MIB, MIB, 730 * MIB)
    assert found.largest == Holder(8, "8", 700 * MIB)
    monkeypatch.setattr(host, "whole", lambda: Memory(2**30, MIB // 2))
    monkeypatch.setattr(psutil, "pids", lambda: [5])
    assert occupancy().largest == Holder(5, "5", 800 * MIB)


class LibProc:
    """Real C functions, as libproc has them. Other users' processes may not be looked at."""

    def __init__(self, footprints: dict[int, int]) -> None:
        self._footprints = footprints
        self.proc_pid_rusage: Any = CFUNCTYPE(c_int, c_int, c_int, c_void_p)(self._rusage)
        self.proc_name: Any = CFUNCTYPE(c_int, c_int, c_void_p, c_uint32)(self._name)

    def _rusage(self, pid: int, flavor: int, out: int) -> int:
        assert flavor == mach.RUSAGE_INFO_V0
        if pid not in self._footprints:
            return -1
        ctypes.memmove(out + FOOTPRINT_OFFSET, self._footprints[pid].to_bytes(8, sys.byteorder), 8)
        return 0

    def _name(self, pid: int, out: int, size: int) -> int:
        assert size == NAME_BUFFER_SIZE
        name = f"Märchen {pid}".encode()
        ctypes.memmove(out, name, len(name))
        return len(name)


def test_on_a_mac_the_footprint_counts_and_no_command_line_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    library = LibProc({501: 3000 * MIB, 502: 9000 * MIB, 503: 7000 * MIB})

    def hidden(pid: int) -> Any:
        raise psutil.AccessDenied(pid)

    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(mach, "_libproc", lambda: library)
    monkeypatch.setattr(mach, "mach", lambda: SimpleNamespace(total=lambda: 16 << 30, available=lambda: 1 << 30))
    monkeypatch.setattr(psutil, "pids", lambda: [1, 501, 502, 503])
    monkeypatch.setattr(psutil, "Process", hidden)
    monkeypatch.setattr(cgroup, "of_process", list)
    sessions = {1: 1, 501: 502, 502: 502, 503: 1}
    monkeypatch.setattr(os, "getsid", sessions.__getitem__)
    found = occupancy(502)
    assert found.own == {502: 12000 * MIB}
    assert (found.total, found.available) == (16 << 30, 1 << 30)
    assert (found.largest, found.others) == (Holder(503, "Märchen 503", 7000 * MIB), (15 << 30) - 12000 * MIB)


@pytest.mark.parametrize(
    ("own", "told"), [("a\nb", "a?b"), ("\udcff\x1b[0m", "??[0m"), ("", "?"), ("größer", "größer")]
)
def test_a_name_is_told_as_text(own: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holders, "_own_name", lambda _: own)
    assert holders._name(1) == told
    told.encode()


def test_a_library_without_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mach, "_libproc", object)
    assert mach.name(1) == ""

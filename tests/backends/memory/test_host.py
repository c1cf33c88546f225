"""What a machine can give: recorded output of macOS, and cgroups in a folder."""

import os
from pathlib import Path

import psutil
import pytest

from backends.memory import host
from backends.memory.host import Memory, mac_available

VM_STAT = """\
Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                                4270.
Pages active:                            352010.
Pages inactive:                          345622.
Pages speculative:                         4889.
Pages throttled:                              0.
Pages wired down:                        200000.
Pages purgeable:                          10000.
"Translation faults":                1018927561.
Pages copy-on-write:                   42113221.
File-backed pages:                       250000.
Anonymous pages:                         500000.
Pages stored in compressor:              600000.
Pages occupied by compressor:            110000.
"""
GIB16 = 16 * 2**30


def test_what_a_mac_can_give_is_all_but_what_it_cannot_take_back() -> None:
    assert mac_available(GIB16, VM_STAT, 1) == GIB16 - (200_000 + 110_000 + 500_000 - 10_000) * 16384
    assert mac_available(2**30, VM_STAT, 2) == 0, "never less than nothing"


def test_under_critical_pressure_it_can_give_nothing() -> None:
    assert mac_available(GIB16, VM_STAT, 4) == 0


@pytest.mark.parametrize("said", ["", VM_STAT.replace("wired", "tired"), VM_STAT.replace("page size", "size")])
def test_other_output_is_not_guessed_at(said: str) -> None:
    with pytest.raises(ValueError, match="vm_stat"):
        mac_available(GIB16, said, 1)


def group(folder: Path, most: str, now: int, cached: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{most}\n")
    (folder / "memory.current").write_text(f"{now}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {cached}\nactive_file 7\n")


def test_the_limits_of_all_groups_around_a_process_count(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.write_text("12:cpu:/old\n0::/a/b\n")
    root = tmp_path / "root"
    group(root, "max", 1)
    group(root / "a", "1000", 900, cached=300)
    group(root / "a" / "b", "800", 100)
    limits = host._cgroup(own, root)
    assert limits == [Memory(800, 700), Memory(1000, 400)]
    assert host._confined(Memory(5000, 600), limits) == Memory(800, 400)
    assert host._cgroup(tmp_path / "none", root) == []


def test_this_machine() -> None:
    seen = host.memory()
    assert 0 < seen.available <= seen.total <= psutil.virtual_memory().total
    assert host.available() > 0


def test_the_footprint_of_a_process() -> None:
    assert host.footprint(os.getpid()) > 2**20
    with pytest.raises(psutil.Error):
        host.footprint(2**22 + 1)

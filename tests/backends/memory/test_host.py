"""What a machine can give: how often it is asked, and cgroups in a folder. (macOS: ``test_mach``.)"""

import os
from pathlib import Path

import psutil
import pytest

from backends.memory import host
from backends.memory.host import MAX_AGE, HostMemory, Memory


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


def test_the_limits_of_version_1_count_too(tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.write_text("12:cpu,cpuacct:/x\n9:memory:/docker/1\n0::/\n")
    root = tmp_path / "root"
    for folder, most, now in ((root / "memory", 2**63 - 4096, 7000), (root / "memory" / "docker" / "1", 1000, 900)):
        folder.mkdir(parents=True)
        (folder / "memory.limit_in_bytes").write_text(f"{most}\n")
        (folder / "memory.usage_in_bytes").write_text(f"{now}\n")
        (folder / "memory.stat").write_text("inactive_file 1\ntotal_inactive_file 300\n")
    assert host._confined(Memory(5000, 600), host._cgroup(own, root)) == Memory(1000, 400)
    own.write_text("9:cpuset,memory:/gone\n")
    assert host._confined(Memory(5000, 600), host._cgroup(own, root)) == Memory(5000, 600), "only the root is left"


class Machine:
    """Its memory and its clock; ``asked``: how often it was read."""

    def __init__(self) -> None:
        self.now = 0.0
        self.asked = 0
        self.seen = Memory(100, 50)

    def read(self) -> Memory:
        self.asked += 1
        return self.seen


def test_all_who_ask_in_one_moment_cost_one_reading() -> None:
    machine = Machine()
    memory = HostMemory(lambda: machine.now, read=machine.read)
    assert {memory.available() for _ in range(200)} == {50}
    assert (memory.short_of_memory(), machine.asked) == (False, 1)
    machine.seen, machine.now = Memory(100, 3), MAX_AGE / 2
    assert memory.available() == 50
    machine.now = MAX_AGE
    assert (memory.available(), memory.short_of_memory(), machine.asked) == (3, True, 2)


def test_this_machine() -> None:
    seen = host.memory()
    assert 0 < seen.available <= seen.total <= psutil.virtual_memory().total
    assert host.available() > 0


def test_the_footprint_of_a_process() -> None:
    assert host.footprint(os.getpid()) > 2**20
    with pytest.raises(psutil.Error):
        host.footprint(2**22 + 1)

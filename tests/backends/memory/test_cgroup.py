"""Cgroups of both versions, in a folder: nested, unlimited, missing, and their counts of OOM kills."""

from pathlib import Path

import pytest

from backends.memory import cgroup
from backends.memory.cgroup import Group, Memory


class Machine:
    """``proc`` and ``root`` stand for /proc and /sys/fs/cgroup."""

    def __init__(self, folder: Path) -> None:
        self.proc, self.root = folder / "proc", folder / "root"
        (self.proc / "7").mkdir(parents=True)

    def of_process(self, *entries: str) -> list[Group]:
        (self.proc / "7" / "cgroup").write_text("".join(f"{entry}\n" for entry in entries))
        return cgroup.of_process(7, proc=self.proc, root=self.root)

    def confined(self, *entries: str) -> Memory:
        return cgroup.confined(Memory(5000, 600), cgroup.limits(self.of_process(*entries)))

    def kills(self, *entries: str) -> int:
        return cgroup.oom_kills(self.of_process(*entries), proc=self.proc)

    def v2(self, path: str, most: str, now: int, *, cached: int | None = 0, kills: int | None = None) -> None:
        folder = self.root / path
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.max").write_text(f"{most}\n")
        (folder / "memory.current").write_text(f"{now}\n")
        if cached is not None:
            (folder / "memory.stat").write_text(f"anon 5\ninactive_file {cached}\nactive_file 7\n")
        if kills is not None:
            (folder / "memory.events").write_text(f"low 0\noom 9\noom_kill {kills}\noom_group_kill 0\n")

    def v1(self, path: str, most: int, now: int, *, kills: int | None = None) -> None:
        folder = self.root / "memory" / path
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.limit_in_bytes").write_text(f"{most}\n")
        (folder / "memory.usage_in_bytes").write_text(f"{now}\n")
        (folder / "memory.stat").write_text("inactive_file 1\ntotal_inactive_file 300\n")
        if kills is not None:
            (folder / "memory.oom_control").write_text(f"oom_kill_disable 0\nunder_oom 0\noom_kill {kills}\n")


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


UNLIMITED = 2**63 - 4096  # as version 1 says it


def test_the_limits_of_all_groups_around_a_process_count(machine: Machine) -> None:
    machine.v2("", "max", 1)
    machine.v2("a", "1000", 900, cached=300)
    machine.v2("a/b", "800", 100)
    machine.v2("a/b/c", "max", 100)
    entries = ("12:cpu:/old", "0::/a/b/c")
    assert cgroup.limits(machine.of_process(*entries)) == [Memory(800, 700), Memory(1000, 400)]
    assert machine.confined(*entries) == Memory(800, 400)
    assert cgroup.of_process(8, proc=machine.proc, root=machine.root) == [], "no such process"


def test_a_limit_counts_also_where_the_size_of_the_file_cache_is_not_told(machine: Machine) -> None:
    machine.v2("a", "1000", 900, cached=None)
    assert machine.confined("0::/a") == Memory(1000, 100)


def test_the_limits_of_version_1_count_too(machine: Machine) -> None:
    machine.v1("", UNLIMITED, 7000)
    machine.v1("docker/1", 1000, 900)
    assert machine.confined("12:cpu,cpuacct:/x", "9:memory:/docker/1", "0::/") == Memory(1000, 400)
    assert machine.confined("9:cpuset,memory:/gone") == Memory(5000, 600), "only the root is left"


@pytest.mark.parametrize("path", ["a", "a/b", "a/b/gone"])
def test_the_innermost_group_that_counts_kills_is_asked(machine: Machine, path: str) -> None:
    machine.v2("a", "1000", 1, kills=8)
    machine.v2("a/b", "max", 1, kills=3)
    assert machine.kills(f"0::/{path}") == (8 if path == "a" else 3)


def test_version_1_counts_kills_too(machine: Machine) -> None:
    machine.v1("", UNLIMITED, 1, kills=0)
    machine.v1("a", 1000, 1, kills=2)
    assert machine.kills("9:memory:/a", "0::/") == 2


def test_without_a_group_the_machine_counts_kills(machine: Machine) -> None:
    machine.v2("", "max", 1)
    assert machine.kills("0::/") == 0, "an old kernel"
    (machine.proc / "vmstat").write_text("nr_free_pages 1\noom_kill 5\n")
    assert machine.kills("0::/") == 5

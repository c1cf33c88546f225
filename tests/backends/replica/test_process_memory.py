"""The memory of a process while it lives, and what is known of the machine's at its end."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from backends.memory import cgroup
from backends.memory.cgroup import Memory
from backends.memory.host import HostMemory
from backends.replica.process_memory import SHORT_FOR, ProcessMemory


class Scene:
    """A process in a group of a cgroup hierarchy in a folder, and a machine whose memory the test sets."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        self.machine = Memory(100, 50)
        self.group = folder / "cgroup" / "a"
        self.group.mkdir(parents=True)
        (self.group / "memory.current").write_text("10")
        self.set(limit="max", kills=3)
        entries = folder / "proc" / str(os.getpid()) / "cgroup"
        entries.parent.mkdir(parents=True)
        entries.write_text("0::/a\n")
        monkeypatch.setattr(cgroup.of_process, "__kwdefaults__", {"proc": folder / "proc", "root": folder / "cgroup"})
        self.memory = ProcessMemory(HostMemory(self.clock, read=lambda: self.machine, max_age=0.0), self.clock)
        self.memory.begin(os.getpid())

    def clock(self) -> float:
        return self.now

    def set(self, *, limit: str = "max", kills: int = 3) -> None:
        (self.group / "memory.max").write_text(limit)
        (self.group / "memory.events").write_text(f"low 0\noom 9\noom_kill {kills}\noom_group_kill 0\n")


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    return Scene(tmp_path, monkeypatch)


def test_it_is_measured(scene: Scene) -> None:
    scene.memory.sample()
    assert scene.memory.now == pytest.approx(psutil.Process().memory_info().rss, rel=0.5)
    assert scene.memory.peak == scene.memory.now
    scene.memory.end()
    assert not scene.memory.short


def test_the_machine_was_short_when_it_ended_though_its_memory_is_free_again(scene: Scene) -> None:
    scene.machine = Memory(100, 1)
    scene.memory.sample()
    scene.machine = Memory(100, 50)
    scene.now += SHORT_FOR
    scene.memory.end()
    assert scene.memory.short


def test_a_shortage_long_ago_has_not_killed_it(scene: Scene) -> None:
    scene.machine = Memory(100, 1)
    scene.memory.sample()
    scene.machine = Memory(100, 50)
    scene.now += SHORT_FOR + 0.1
    scene.memory.end()
    assert not scene.memory.short


def test_the_kernel_killed_for_memory_between_two_samples(scene: Scene) -> None:
    scene.memory.sample()
    scene.set(kills=4)
    scene.memory.end()
    assert scene.memory.short, "though all readings show enough memory"


def test_a_kill_that_a_sample_has_seen_before_the_end_counts(scene: Scene) -> None:
    """A process that was killed takes a while to die."""
    scene.set(kills=4)
    scene.memory.sample()
    scene.now += 1.0
    scene.memory.end()
    assert scene.memory.short


def test_kills_before_it_began_do_not_count(scene: Scene) -> None:
    scene.memory.end()
    assert not scene.memory.short


def test_its_own_group_was_nearly_full(scene: Scene) -> None:
    scene.set(limit="10")
    scene.memory.sample()
    scene.memory.end()
    assert scene.memory.short


@pytest.mark.skipif(sys.platform != "linux", reason="no other system tells the limits of a process")
def test_a_limit_of_its_own_is_noticed(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    limit: Any = (1 << 30, psutil.RLIM_INFINITY)
    monkeypatch.setattr(psutil.Process, "rlimit", lambda *_: limit)
    scene.memory.sample()
    assert scene.memory.limited
    monkeypatch.setattr("backends.replica.process_memory.sys.platform", "darwin")
    scene.memory.sample()
    assert not scene.memory.limited


def test_a_process_that_is_gone_weighs_nothing(scene: Scene) -> None:
    with subprocess.Popen(["true"]) as gone:
        gone.wait()
    scene.memory.pid = gone.pid
    scene.memory.sample()
    assert scene.memory.now is None

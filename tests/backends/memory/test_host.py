"""What a machine can give, and how often it is asked. (macOS: ``test_mach``.)"""

import os

import psutil
import pytest

from backends.memory import host
from backends.memory.cgroup import Memory
from backends.memory.host import MAX_AGE, HostMemory


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

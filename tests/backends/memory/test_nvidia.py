"""The memory of an NVIDIA GPU, through a stand-in for the driver's library that fills memory as the real one does."""

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from ctypes import CFUNCTYPE, POINTER, c_char_p, c_int, c_uint, c_uint64, c_void_p
from typing import Any

import pytest

from backends.memory import holders, nvidia
from backends.memory.nvidia import MAX_PROCESSES, NOT_AVAILABLE, Nvml
from backends.memory.occupancy import Holder, Occupancy, Place

GIB = 2**30
DEVICE = 0xBEEF
IN_USE = 79 * GIB
PROCESS_SIZE = 24  # bytes, by the public header: a word and its padding, 8 bytes, two words


class Driver:
    """Real C functions, so that types and pointers are those of a real call."""

    def __init__(self, processes: dict[int, int], *, failing: str = "") -> None:
        self.listed = processes
        self.failing = failing
        self.nvmlInit_v2: Any = CFUNCTYPE(c_int)(lambda: self._status("init"))
        self.nvmlDeviceGetHandleByIndex_v2: Any = CFUNCTYPE(c_int, c_uint, POINTER(c_void_p))(self._handle)
        self.nvmlDeviceGetMemoryInfo: Any = CFUNCTYPE(c_int, c_void_p, c_void_p)(self._memory)
        self.nvmlDeviceGetComputeRunningProcesses_v3: Any = CFUNCTYPE(c_int, c_void_p, POINTER(c_uint), c_void_p)(
            self._processes
        )

    def _status(self, name: str) -> int:
        return 9 if name == self.failing else 0

    def _handle(self, index: int, out: Any) -> int:
        assert index == 0
        out[0] = DEVICE
        return self._status("handle")

    def _memory(self, device: int, out: int) -> int:
        assert device == DEVICE
        ctypes.memmove(out, (c_uint64 * 3)(80 * GIB, 80 * GIB - IN_USE, IN_USE), 24)
        return self._status("memory")

    def _processes(self, device: int, count: Any, out: int) -> int:
        assert (device, count[0]) == (DEVICE, MAX_PROCESSES)
        for n, (pid, size) in enumerate(self.listed.items()):
            row = pid.to_bytes(4, sys.byteorder) + bytes(4) + size.to_bytes(8, sys.byteorder) + b"\xff" * 8
            ctypes.memmove(out + n * PROCESS_SIZE, c_char_p(row), PROCESS_SIZE)
        count[0] = len(self.listed)
        return self._status("processes")


def seen(monkeypatch: pytest.MonkeyPatch, driver: Any, own: frozenset[int] = frozenset()) -> Occupancy | None:
    bound = Nvml(driver)
    monkeypatch.setattr(nvidia, "nvml", lambda: bound)
    return holders.occupancy(Place.DEVICE, own)


@pytest.fixture
def child() -> Iterator[int]:
    """A process that leads its session."""
    process = subprocess.Popen(["sleep", "100"], start_new_session=True)
    yield process.pid
    process.kill()
    process.wait()


def test_ours_and_the_largest_of_the_others_are_told_apart(monkeypatch: pytest.MonkeyPatch, child: int) -> None:
    driver = Driver({os.getpid(): 60 * GIB, child: 5 * GIB, 1: GIB, 2**22 + 1: NOT_AVAILABLE})
    found = seen(monkeypatch, driver, frozenset({child}))
    assert found is not None
    assert (found.total, found.available) == (80 * GIB, GIB)
    assert (found.own, found.others) == ({child: 5 * GIB}, 74 * GIB)
    assert found.largest is not None
    assert (found.largest.pid, found.largest.size) == (os.getpid(), 60 * GIB)
    assert found.largest.name


def test_what_is_not_listed_is_held_by_others_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    for driver in (Driver({}), Driver({1: 5}, failing="processes")):
        assert seen(monkeypatch, driver) == Occupancy(Place.DEVICE, 80 * GIB, GIB, IN_USE)
    old = Driver({})
    del old.nvmlDeviceGetComputeRunningProcesses_v3
    assert seen(monkeypatch, old) == Occupancy(Place.DEVICE, 80 * GIB, GIB, IN_USE)


def test_where_none_of_ours_is_listed_their_share_is_not_known(monkeypatch: pytest.MonkeyPatch, child: int) -> None:
    for driver in (Driver({}), Driver({1: 5 * GIB})):
        found = seen(monkeypatch, driver, frozenset({child}))
        assert found is not None
        assert (found.others, found.own) == (0, {})


def test_a_pid_of_another_container_has_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    found = seen(monkeypatch, Driver({2**22 + 1: IN_USE}))
    assert found is not None
    assert found.largest == Holder(2**22 + 1, "?", IN_USE)


def test_a_driver_that_fails_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert seen(monkeypatch, Driver({}, failing="memory")) is None
    for failing in ("init", "handle"):
        with pytest.raises(OSError, match="returned 9"):
            Nvml(Driver({}, failing=failing))


def test_a_machine_without_a_driver_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def missing(name: str) -> Any:
        asked.append(name)
        raise OSError("no such library")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    for platform, looks in (("linux", [nvidia.LIBRARY]), ("darwin", [])):
        monkeypatch.setattr(sys, "platform", platform)
        asked.clear()
        nvidia.nvml.cache_clear()
        assert [holders.occupancy(Place.DEVICE, frozenset()) for _ in range(3)] == [None] * 3
        assert asked == looks
    nvidia.nvml.cache_clear()

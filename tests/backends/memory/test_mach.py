"""The kernel's figures on macOS, through a stand-in for libSystem that fills the same memory as the real one."""

import ctypes
import os
import subprocess
import sys
from ctypes import CFUNCTYPE, POINTER, c_char_p, c_int, c_size_t, c_uint32, c_void_p
from typing import Any

import pytest

from backends.memory import cgroup, host, mach
from backends.memory.cgroup import Memory
from backends.memory.host import HostMemory
from backends.memory.mach import HOST_VM_INFO64, HOST_VM_INFO64_COUNT, Mach, VmStatistics64
from backends.replica.process_memory import ProcessMemory

GIB16 = 16 * 2**30
PAGE = 16384
HOST_PORT = 77
OFFSETS = {  # of the public header, by hand: four words, nine numbers of 8 bytes, two words, four numbers, four words
    "free_count": 0,
    "wire_count": 12,
    "zero_fill_count": 16,
    "purges": 80,
    "purgeable_count": 88,
    "speculative_count": 92,
    "decompressions": 96,
    "swapouts": 120,
    "compressor_page_count": 128,
    "internal_page_count": 140,
    "total_uncompressed_pages_in_compressor": 144,
}


class LibSystem:
    """Real C functions, so that types and pointers are those of a real call."""

    def __init__(self, *, pressure: int = 1, failing: str = "", words: int = HOST_VM_INFO64_COUNT) -> None:
        self.pressure = pressure
        self.failing = failing
        self.words = words
        self.pages = {"wire_count": 200_000, "compressor_page_count": 110_000, "internal_page_count": 500_000}
        self.pages |= {"purgeable_count": 10_000, "free_count": 4_270, "external_page_count": 250_000}
        self.calls: list[str] = []
        self.mach_host_self: Any = CFUNCTYPE(c_uint32)(self._self)
        self.host_page_size: Any = CFUNCTYPE(c_int, c_uint32, POINTER(c_size_t))(self._page_size)
        self.host_statistics64: Any = CFUNCTYPE(c_int, c_uint32, c_int, c_void_p, POINTER(c_uint32))(self._statistics)
        self.sysctlbyname: Any = CFUNCTYPE(c_int, c_char_p, c_void_p, POINTER(c_size_t), c_void_p, c_size_t)(
            self._sysctl
        )

    def _self(self) -> int:
        self.calls.append("mach_host_self")
        return HOST_PORT

    def _page_size(self, port: int, out: Any) -> int:
        assert port == HOST_PORT
        out[0] = PAGE
        return 5 if self.failing == "host_page_size" else 0

    def _statistics(self, port: int, flavor: int, out: int, count: Any) -> int:
        self.calls.append("host_statistics64")
        assert (port, flavor, count[0]) == (HOST_PORT, HOST_VM_INFO64, HOST_VM_INFO64_COUNT)
        for name, pages in self.pages.items():
            ctypes.memmove(out + getattr(VmStatistics64, name).offset, pages.to_bytes(4, sys.byteorder), 4)
        count[0] = self.words
        return 5 if self.failing == "host_statistics64" else 0

    def _sysctl(self, name: bytes, out: int, size: Any, *new: int | None) -> int:
        assert new == (None, 0)
        width, value = {"hw.memsize": (8, GIB16), "kern.memorystatus_vm_pressure_level": (4, self.pressure)}[
            name.decode()
        ]
        assert size[0] == width
        ctypes.memmove(out, value.to_bytes(width, sys.byteorder), width)
        return -1 if self.failing == name.decode() else 0


@pytest.fixture
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a process for a figure that the kernel gives")

    monkeypatch.setattr(subprocess, "Popen", refuse)


def on_a_mac(monkeypatch: pytest.MonkeyPatch, library: LibSystem) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    bound = Mach(library)
    monkeypatch.setattr(mach, "mach", lambda: bound)


def test_the_layout_is_that_of_the_header() -> None:
    assert {name: getattr(VmStatistics64, name).offset for name in OFFSETS} == OFFSETS
    assert ctypes.sizeof(VmStatistics64) == 152
    assert HOST_VM_INFO64_COUNT == 38


def test_what_a_mac_can_give_is_all_but_what_it_cannot_take_back(
    monkeypatch: pytest.MonkeyPatch, no_processes: None
) -> None:
    library = LibSystem()
    on_a_mac(monkeypatch, library)
    assert host.memory() == Memory(GIB16, GIB16 - (200_000 + 110_000 + 500_000 - 10_000) * PAGE)
    assert host.available() == host.memory().available
    assert library.calls.count("mach_host_self") == 1, "each call takes a reference to the port"


def test_it_is_never_less_than_nothing() -> None:
    library = LibSystem(pressure=2)
    library.pages["wire_count"] = 2**31
    assert Mach(library).available() == 0


def test_under_critical_pressure_it_can_give_nothing() -> None:
    library = LibSystem(pressure=4)
    assert Mach(library).available() == 0
    assert Mach(library).total() == GIB16


def test_a_kill_under_critical_pressure_is_for_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jetsam. The pressure is over when the end of the process is noticed."""
    now = 0.0
    memory = ProcessMemory(HostMemory(lambda: now, max_age=0.0), lambda: now)
    on_a_mac(monkeypatch, LibSystem(pressure=4))
    memory.begin(os.getpid())
    memory.sample()
    on_a_mac(monkeypatch, LibSystem())
    now = 1.0
    memory.end()
    assert memory.short
    now = 10.0
    memory.end()
    assert not memory.short


@pytest.mark.parametrize(
    "library",
    [
        *(LibSystem(failing=name) for name in ("host_statistics64", "host_page_size", "hw.memsize")),
        LibSystem(failing="kern.memorystatus_vm_pressure_level"),
        LibSystem(words=36),
    ],
)
def test_a_call_that_fails_leaves_it_to_psutil(
    library: LibSystem, monkeypatch: pytest.MonkeyPatch, no_processes: None
) -> None:
    with pytest.raises(OSError, match="returned"):
        Mach(library).available()
    on_a_mac(monkeypatch, library)
    monkeypatch.setattr(cgroup, "of_process", list)
    monkeypatch.setattr("psutil.virtual_memory", lambda: Memory(GIB16, 5))
    assert host.memory() == Memory(GIB16, 5)


def test_a_library_without_the_calls_leaves_it_to_psutil(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AttributeError):
        Mach(object())

    def missing() -> Mach:
        raise OSError("no such library")

    monkeypatch.setattr(mach, "mach", missing)
    monkeypatch.setattr(cgroup, "of_process", list)
    monkeypatch.setattr("psutil.virtual_memory", lambda: Memory(GIB16, 5))
    monkeypatch.setattr(sys, "platform", "darwin")
    assert host.memory() == Memory(GIB16, 5)

"""Memory statistics of macOS, read from the kernel by ctypes rather than by running ``sysctl`` and ``vm_stat``.

    host_statistics64(HOST_VM_INFO64)             pages by kind; the figures that ``vm_stat`` prints
    sysctlbyname(kern.memorystatus_vm_pressure_level, hw.memsize)
    proc_pid_rusage, proc_name                    the physical footprint and the name of one process

Layouts and constants are those of the public XNU headers (mach/vm_statistics.h, mach/host_info.h, sys/resource.h).
Caveat: newer kernels append fields to ``vm_statistics64``. The count that is passed in is the size of the caller's
buffer in 32-bit words, and the kernel fills no more, so this older and shorter layout remains valid.

Written from the headers and tested with a stand-in for libSystem, not on a Mac.
"""

import ctypes
import sys
from ctypes import c_int, c_size_t, c_uint32, c_uint64
from functools import cache
from typing import Any

LIB_SYSTEM = "/usr/lib/libSystem.B.dylib"
KERN_SUCCESS = 0
HOST_VM_INFO64 = 4  # flavor
PRESSURE_CRITICAL = 4  # kern.memorystatus_vm_pressure_level: 1 normal, 2 warning, 4 critical
RUSAGE_INFO_V0 = 0
FOOTPRINT_OFFSET = 72  # bytes, of ri_phys_footprint in rusage_info_v0: after a 16-byte UUID and seven 8-byte numbers
RUSAGE_BUFFER_SIZE = 512  # bytes; rusage_info_v0 has 96
NAME_BUFFER_SIZE = 256  # bytes; a name has at most 32


class VmStatistics64(ctypes.Structure):
    """struct vm_statistics64 up to revision 1, in pages; natural_t is 32 bits wide."""

    _fields_ = [
        ("free_count", c_uint32),
        ("active_count", c_uint32),
        ("inactive_count", c_uint32),
        ("wire_count", c_uint32),
        ("zero_fill_count", c_uint64),
        ("reactivations", c_uint64),
        ("pageins", c_uint64),
        ("pageouts", c_uint64),
        ("faults", c_uint64),
        ("cow_faults", c_uint64),
        ("lookups", c_uint64),
        ("hits", c_uint64),
        ("purges", c_uint64),
        ("purgeable_count", c_uint32),
        ("speculative_count", c_uint32),
        ("decompressions", c_uint64),
        ("compressions", c_uint64),
        ("swapins", c_uint64),
        ("swapouts", c_uint64),
        ("compressor_page_count", c_uint32),
        ("throttled_count", c_uint32),
        ("external_page_count", c_uint32),
        ("internal_page_count", c_uint32),  # anonymous
        ("total_uncompressed_pages_in_compressor", c_uint64),
    ]


HOST_VM_INFO64_COUNT = ctypes.sizeof(VmStatistics64) // ctypes.sizeof(c_int)


class Mach:
    """The kernel calls, bound once. ``library``: libSystem or a stand-in."""

    def __init__(self, library: Any) -> None:
        """Raises AttributeError if a function is missing."""
        library.mach_host_self.restype = c_uint32
        library.host_page_size.argtypes = (c_uint32, ctypes.c_void_p)
        library.host_statistics64.argtypes = (c_uint32, c_int, ctypes.c_void_p, ctypes.c_void_p)
        library.sysctlbyname.argtypes = (
            ctypes.c_char_p,
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_void_p,
            c_size_t,
        )
        self._library = library
        self._host = library.mach_host_self()  # once: each call takes another reference to the port

    def total(self) -> int:
        """Bytes of memory of the machine. Raises OSError."""
        return self._sysctl(b"hw.memsize", c_uint64())

    def available(self) -> int:
        """Bytes that can be allocated: all but wired, compressed, and anonymous non-purgeable memory, since the file
        cache is dropped on demand; 0 while the kernel reports critical pressure. Raises OSError."""
        if self._sysctl(b"kern.memorystatus_vm_pressure_level", c_int()) >= PRESSURE_CRITICAL:
            return 0
        pages = self._vm_statistics()
        held = pages.wire_count + pages.compressor_page_count + pages.internal_page_count - pages.purgeable_count
        return max(0, self.total() - self._page_size() * int(held))

    def _vm_statistics(self) -> VmStatistics64:
        pages, count = VmStatistics64(), c_uint32(HOST_VM_INFO64_COUNT)
        failed = self._library.host_statistics64(self._host, HOST_VM_INFO64, ctypes.byref(pages), ctypes.byref(count))
        if failed != KERN_SUCCESS or count.value < HOST_VM_INFO64_COUNT:
            raise OSError(f"host_statistics64 returned {failed} and {count.value} of {HOST_VM_INFO64_COUNT} words")
        return pages

    def _page_size(self) -> int:
        """Of the kernel, the unit of the statistics. Under emulation, a process may see a smaller one."""
        size = c_size_t()
        if (failed := self._library.host_page_size(self._host, ctypes.byref(size))) != KERN_SUCCESS:
            raise OSError(f"host_page_size returned {failed}")
        return size.value

    def _sysctl(self, name: bytes, value: c_int | c_uint64) -> int:
        """``value``: of the type of the variable ``name``."""
        size = c_size_t(ctypes.sizeof(value))
        failed = self._library.sysctlbyname(name, ctypes.byref(value), ctypes.byref(size), None, 0)
        if failed or size.value != ctypes.sizeof(value):
            raise OSError(f"sysctlbyname({name.decode()}) returned {failed} and {size.value} bytes")
        return int(value.value)


@cache
def mach() -> Mach:
    """Raises OSError, AttributeError."""
    return Mach(ctypes.CDLL(LIB_SYSTEM, use_errno=True))


@cache
def _libproc() -> ctypes.CDLL:
    return ctypes.CDLL("/usr/lib/libproc.dylib", use_errno=True)


def footprint(pid: int) -> int:
    """Bytes; 0 = not available."""
    buffer = ctypes.create_string_buffer(RUSAGE_BUFFER_SIZE)
    try:
        failed = _libproc().proc_pid_rusage(pid, RUSAGE_INFO_V0, buffer)
    except (OSError, AttributeError):
        return 0
    return 0 if failed else int.from_bytes(buffer.raw[FOOTPRINT_OFFSET : FOOTPRINT_OFFSET + 8], sys.byteorder)


def name(pid: int) -> str:
    """ "" = not available."""
    buffer = ctypes.create_string_buffer(NAME_BUFFER_SIZE)
    try:
        length = _libproc().proc_name(pid, buffer, NAME_BUFFER_SIZE)
    except (OSError, AttributeError):
        return ""
    return buffer.raw[: max(0, length)].decode(errors="replace")

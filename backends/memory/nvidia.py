"""The memory of the first NVIDIA GPU and the processes that hold it, from the driver's library (NVML) by ctypes.

mlx has a CUDA build for Linux. Elsewhere, and on a machine without the driver, there is no such library, and the look
for it is made once. Constants and layouts are those of the public header nvml.h.

Caveat: in a container the driver may list no processes, or list them by the pids of the host.
"""

import ctypes
import sys
from ctypes import c_uint, c_uint64, c_void_p
from functools import cache
from typing import Any

LIBRARY = "libnvidia-ml.so.1"
MAX_PROCESSES = 256
NOT_AVAILABLE = 2**64 - 1  # as the memory of a process


class MemoryInfo(ctypes.Structure):
    """nvmlMemory_t, in bytes."""

    _fields_ = [("total", c_uint64), ("free", c_uint64), ("used", c_uint64)]


class ProcessInfo(ctypes.Structure):
    """nvmlProcessInfo_t since version 2."""

    _fields_ = [("pid", c_uint), ("memory", c_uint64), ("gpu_instance", c_uint), ("compute_instance", c_uint)]


class Nvml:
    """``library``: libnvidia-ml or a stand-in. Raises OSError if a call fails, AttributeError if a function is
    missing."""

    def __init__(self, library: Any) -> None:
        self._library = library
        self._call("nvmlInit_v2")
        self._device = c_void_p()
        self._call("nvmlDeviceGetHandleByIndex_v2", c_uint(0), ctypes.byref(self._device))

    def memory(self) -> tuple[int, int]:
        """(total, free) bytes."""
        info = MemoryInfo()
        self._call("nvmlDeviceGetMemoryInfo", self._device, ctypes.byref(info))
        return info.total, info.free

    def processes(self) -> dict[int, int]:
        """Pid -> bytes."""
        found, count = (ProcessInfo * MAX_PROCESSES)(), c_uint(MAX_PROCESSES)
        self._call("nvmlDeviceGetComputeRunningProcesses_v3", self._device, ctypes.byref(count), found)
        return {info.pid: info.memory for info in found[: count.value] if info.memory != NOT_AVAILABLE}

    def _call(self, name: str, *args: Any) -> None:
        if status := getattr(self._library, name)(*args):
            raise OSError(f"{name} returned {status}")


@cache
def nvml() -> Nvml | None:
    """None = there is no driver."""
    if sys.platform != "linux":
        return None
    try:
        return Nvml(ctypes.CDLL(LIBRARY))
    except (OSError, AttributeError):
        return None

"""What processes were seen to hold, by command line, over all instances and runs; bytes. Preferred to estimates.

high-water mark    the highest footprint; where the process tells, without freed buffers and prompt cache. While a
                   model loads, it rises twice a second: so it must rise by a share to be noted
idle size          of an idle process with empty caches (weights, runtime, Python). The last one counts: another
                   version of the engine has other figures
"""

from pathlib import Path
from typing import Any

from backends.memory.units import is_size
from backends.process.learned import Learned

MIN_GROWTH = 1.01  # factor by which a mark must rise to be noted
MAX_SHARE = 0.75  # of the machine's memory, that a mark may ask for: more is never free, nor can Metal wire more


def high_water_marks(folder: Path | None = None, *, total: int | None = None) -> Learned[int]:
    """``folder``: None = in memory only. ``total``: bytes of memory of the machine, None = no limit: a mark is never so
    high that the model could not be loaded any more; with compressed memory, a process on macOS can grow beyond what
    the machine has."""

    def clean(mark: Any) -> int | None:
        if not is_size(mark, total):
            return None
        return int(mark) if total is None else min(int(mark), int(MAX_SHARE * total))

    path = folder and folder / "memory.json"
    return Learned(path, "memory peaks", clean, counts=lambda known, mark: mark > known * MIN_GROWTH)


def idle_sizes(folder: Path | None = None, *, total: int | None = None) -> Learned[int]:
    """Likewise."""
    path = folder and folder / "memory_base.json"
    return Learned(path, "memory of idle models", lambda size: int(size) if is_size(size, total) else None)

"""Who holds a memory, and whether a start waits for it: values in, decisions out.

A replica that ran out of memory is not started again into a memory that others fill: it would run out of it again, at
its load or at its first request. So before that start what it needs must be there:

    others hold what is missing,         it waits as long as that is so, but one start is tried after ``LONGEST_WAIT``,
    and it would fit without them        because the need is an estimate
    our other processes hold it          it does not wait: they keep it
    nobody is found to hold it, or       it waits for ``PATIENCE``: memory may be reclaimed late
    it needs more than there is at all

Then it is started, or refused where the machine's memory is the budget and nobody else holds it, as a first start is.

Pure: no I/O, no clock.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from backends.domain.snapshot import WAITS_FOR_MEMORY
from backends.memory import units
from backends.memory.reclaim import PATIENCE

LONGEST_WAIT = 600.0  # seconds


class Place(StrEnum):
    MACHINE = "machine"  # main memory; on macOS the GPU's too
    DEVICE = "device"  # of the GPU of a CUDA machine


@dataclass(frozen=True, slots=True)
class Holder:
    """One process. ``size``: bytes."""

    pid: int
    name: str
    size: int


@dataclass(frozen=True, slots=True)
class Occupancy:
    """Of one memory, in bytes. ``others``: held by processes that are not ours, as far as is known; ``largest``: of
    these, None = none is known. ``own``: by the leader of the session, of our processes that are known to hold some."""

    place: Place
    total: int
    available: int
    others: int = 0
    largest: Holder | None = None
    own: Mapping[int, int] = field(default_factory=dict)


# (memory, pids of the session leaders that are ours) -> what was read; None = there is no such memory, or it cannot be
# read. Blocks, and does not raise.
Occupancies = Callable[[Place, frozenset[int]], Occupancy | None]


def held_by_others(seen: Occupancy, need: int, room: int) -> bool:
    """Others hold what is missing, and it would fit without them. ``room``: bytes that the replica can have now."""
    return 0 < need - room <= seen.others and need <= seen.total


def longest_wait(seen: Occupancy, need: int, room: int) -> float:
    """Seconds that a start waits for the missing memory."""
    if held_by_others(seen, need, room):
        return LONGEST_WAIT
    return 0.0 if need <= seen.total and sum(seen.own.values()) >= need - room else PATIENCE


def waiting(seen: Occupancy, need: int, room: int) -> str:
    """For users, while a start waits."""
    return f"{WAITS_FOR_MEMORY}: {numbers(seen, need, room)}"


def numbers(seen: Occupancy, need: int, room: int) -> str:
    of_gpu = " on the GPU" if seen.place is Place.DEVICE else ""
    return f"{units.memory(max(0, room))} available{of_gpu}, needs {units.memory(need)}{holder(seen, need - room)}"


def holder(seen: Occupancy, missing: int) -> str:
    """Who holds ``missing`` bytes; "" = nobody else holds so much."""
    if seen.others < missing:
        return ""
    if seen.largest is None:
        return f"; other processes hold {units.memory(seen.others)}"
    return f"; PID {seen.largest.pid} ({seen.largest.name}) holds {units.memory(seen.largest.size)}"

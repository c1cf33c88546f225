"""What each replica may use now: ``share`` applied to the replicas of this machine, their files, and what their
processes have told.

Which memory is divided: on a Mac there is one, and its GPU recommends a working set that all processes share, which a
process tells once it runs. On a machine with an NVIDIA GPU it is the GPU's, as its driver tells.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from backends.domain.share import Share, Source
from backends.domain.spec import BackendSpec, Launch
from backends.memory.occupancy import Occupancy
from backends.memory.share import MOST_OF_DEVICE, UNKNOWN, Appetite, Claimant, capacity, divide, split
from backends.process.learned import Learned


class Sharer(Protocol):
    """A replica."""

    spec: BackendSpec
    launch: Launch

    @property
    def id(self) -> str: ...

    @property
    def memory(self) -> int:
        """What its process holds now, in bytes."""
        ...

    @property
    def working_set(self) -> int | None:
        """Bytes that its GPU recommends for all processes; None = not known."""
        ...


@dataclass(frozen=True, slots=True)
class Presence:
    """``charge``: bytes granted or held, 0 = none. ``here``: loaded, or about to be."""

    replica: Sharer
    charge: int
    here: bool


class Shares:
    """``total``: bytes of memory of the machine; ``available``: of it, now. ``budget``: bytes for all models; None =
    what the machine can give. ``appetites``: by model, what its files tell; None = not known (yet)."""

    def __init__(
        self,
        *,
        total: int,
        available: Callable[[], int],
        budget: int | None,
        appetites: Mapping[str, Callable[[], Appetite | None]],
        peaks: Learned[int],
        bases: Learned[int],
    ) -> None:
        self.peaks = peaks  # of what processes hold without freed buffers and prompt cache, where they tell that
        self.bases = bases
        self._total = total
        self._available = available
        self._budget = budget
        self._appetites = appetites
        self._working_set: int | None = None

    def note_device(self, seen: Occupancy, held: int) -> None:
        """``seen``: of the memory of a GPU. ``held``: bytes of it that our processes hold, as they tell."""
        own = sum(seen.own.values()) or held
        self._working_set = min(seen.available + own, int(MOST_OF_DEVICE * seen.total))

    def appetite(self, replica: Sharer) -> Appetite | None:
        """By the files, corrected by what processes have told of themselves; None = not known."""
        by_files = self._appetites.get(replica.spec.model, lambda: None)()
        base = None if by_files is None else self.bases.get(replica.launch)
        if by_files is None or base is None:
            return by_files
        measured = max(0, (self.peaks.get(replica.launch) or 0) - base)
        return replace(by_files, base=base, measured=measured, source=Source.MEASURED)

    def of(self, replica: Sharer, present: Iterable[Presence]) -> Share:
        """``present``: all replicas, ``replica`` included and here."""
        appetite = self.appetite(replica)
        if appetite is None:
            return UNKNOWN
        known: list[Claimant] = []
        unknown = held = 0
        for one in present:
            held += one.replica.memory
            if (of_one := self.appetite(one.replica)) is not None:
                known.append(Claimant(one.replica.id, one.replica.spec.model, of_one, resident=one.here))
            elif one.here:
                unknown += max(one.charge, one.replica.spec.memory or 0)
            self._working_set = _least(self._working_set, one.replica.working_set)
        available = self._available() if self._budget is None else 0
        whole, most = self._capacity(available, held), self._capacity(self._total)
        return split(divide(whole - unknown, known, most)[replica.id], appetite)

    def _capacity(self, available: int, held: int = 0) -> int:
        return capacity(
            total=self._total, available=available, held=held, budget=self._budget, working_set=self._working_set
        )


def _least(one: int | None, other: int | None) -> int | None:
    return one if other is None else other if one is None else min(one, other)

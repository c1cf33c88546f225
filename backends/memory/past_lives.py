"""What the lives of one replica have shown about the memory that the next one needs.

Pure: no I/O, no clock.
"""

import re
from dataclasses import dataclass, field

from backends.domain.failure import Cause, Failure
from backends.memory.occupancy import Place

TOLERANCE = 0.1  # share of the memory that was enough: what other programs use changes by itself
_OF_DEVICE = re.compile(r"cuda|cublas|malloc_async", re.IGNORECASE)


def place_of(failure: Failure) -> Place:
    """The memory that a replica ran out of."""
    told = (failure.message, *failure.evidence)
    return Place.DEVICE if any(_OF_DEVICE.search(line) for line in told) else Place.MACHINE


@dataclass(slots=True)
class PastLives:
    """``ran_out``: the memory that the last life ran out of; None = it did not, or a later one has answered requests.
    ``on_device``: a life was seen to use the memory of the GPU; ``device_size``: bytes of it that one had when it was
    ready. ``before``: bytes that were available when the present life, or the last one, began; ``enough``: the least
    before a life that answered requests."""

    ran_out: Place | None = None
    on_device: bool = False
    device_size: int = 0
    before: dict[Place, int] = field(default_factory=dict)
    enough: dict[Place, int] = field(default_factory=dict)

    @property
    def asked(self) -> Place | None:
        """The memory that must have what the next life needs, whatever the budget is; None = the budget decides. That
        of a GPU is not asked for a replica that was never seen to use it."""
        return Place.DEVICE if self.on_device else self.ran_out

    def least(self, place: Place, need: int) -> int:
        """``need`` in bytes, but no more than was enough before."""
        enough = self.enough.get(place)
        return need if enough is None else min(need, int(enough * (1 - TOLERANCE)))

    def begins(self, available: int) -> None:
        """``available``: bytes of the machine."""
        self.before = {Place.MACHINE: available}

    def ended(self, failure: Failure, *, answered: bool) -> None:
        """``answered``: this life has answered a request."""
        if answered:
            self.ran_out = None
            for place, available in self.before.items():
                self.enough[place] = min(available, self.enough.get(place, available))
        if failure.cause is Cause.OOM:
            self.ran_out = place_of(failure)
            self.on_device = self.on_device or self.ran_out is Place.DEVICE

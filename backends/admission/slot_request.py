"""What a request for a slot says of itself: which replicas may take it, how it may share one, and what it will cost.

Pure: no I/O, no clock.
"""

from collections.abc import Mapping
from enum import IntEnum
from types import MappingProxyType
from typing import NamedTuple

from backends.admission.excluded import NOTHING, Excluded
from backends.domain.priority import Priority
from backends.domain.snapshot import Seat
from backends.domain.work import NO_WORK, Work


class Isolation(IntEnum):
    """With whom it may be in flight; the higher value is the stricter one."""

    SHARED = 0  # in a batch
    ALONE = 1  # with no other request on its replica
    APART = 2  # nor on any replica that uses the same memory


class SlotRequest(NamedTuple):
    """``exclude``: what was tried already, which makes this a failover. ``within``: seconds that it may be queued,
    None = only the bound of the queue. ``reserves``: one that is isolated keeps others out until its replica is idle.
    ``unbatchable``: isolated likewise, where the engine is mlx_lm.server. ``prefer``: the instance that it goes to
    where nothing else counts. ``held``: tokens of the prompt that instances have in their prompt caches, as far as is
    known. ``work``: what it asks of the engine. ``long``: its prompt takes long to read, or it is a slice of such a
    one: no other prompt should be read beside it, and this one beside no other. ``goes_on``: it was admitted before and
    goes on, with its next slice or where it was stopped. ``priority``: its class."""

    exclude: Excluded = NOTHING
    within: float | None = None
    isolation: Isolation = Isolation.SHARED
    reserves: bool = True
    unbatchable: bool = False
    prefer: Seat | None = None
    held: Mapping[Seat, int] = MappingProxyType({})
    work: Work = NO_WORK
    long: bool = False
    goes_on: bool = False
    priority: Priority = Priority.INTERACTIVE

    @property
    def again(self) -> bool:
        """It was admitted before: it is not sent away because the queue is full, and newcomers do not go first."""
        return self.goes_on or bool(self.exclude)

    def cached_on(self, seat: Seat) -> int:
        """Tokens of the prompt that this instance has in its prompt cache, as far as is known."""
        return self.held.get(seat, 0)

    @property
    def alone(self) -> bool:
        return self.isolation >= Isolation.ALONE

    @property
    def apart(self) -> bool:
        return self.isolation is Isolation.APART


ANY = SlotRequest()

"""Which members of a batch are stopped when it grows beyond the memory that it may take: (members, room) -> keys.

Answers may become longer than was likely when they were admitted. What is cached is dropped first, as far as the batch
needs its place (``replica.batch_memory``). Before memory runs out, and everybody loses, members are then stopped one by
one, the latest first, until the rest fits:

    AGAIN    those whose client has no content yet: they are sent again when there is room
    REPLAY   those whose answer can be generated again: they go on after what was delivered has come again
    LOST     the others, and only where the memory is exceeded by more than the prediction may be wrong

A batch fits if it does as it is likely to go on, which is how its members were admitted, or in what is near: a batch
whose answers end early may for a moment need more than one whose answers do not. So who was admitted is not stopped at
once.

The last one is never stopped: alone it has as much memory as it will ever have. Those that were stopped before, and
are about to leave the batch, are not part of it here.

Pure.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Generic, TypeVar

from backends.admission.batch import Member, fits
from backends.memory.kv_cost import KvCost

Key = TypeVar("Key")

NEAR = 256  # tokens of an answer: what is written until the batch is looked at again, and the next step of its cache


class Stop(IntEnum):
    """What it means to a request to be stopped; the least is stopped first."""

    AGAIN = 0
    REPLAY = 1
    LOST = 2
    NEVER = 3  # it ends in any case, or is not a client's


@dataclass(frozen=True, slots=True)
class Growing(Generic[Key]):
    """``admitted``: event loop time."""

    key: Key
    member: Member
    stop: Stop
    admitted: float


def to_stop(cost: KvCost, batch: Sequence[Growing[Key]], room: int, *, error: float) -> list[Key]:
    """``error``: share by which the prediction may be wrong."""
    if _fits(cost, batch, room):
        return []
    left, stopped = list(batch), list[Key]()
    for one in sorted(batch, key=lambda each: (each.stop, -each.admitted)):
        enough = room if one.stop < Stop.LOST else int(room * (1 + error))
        alive = sum(each.stop is not Stop.NEVER for each in left)
        if one.stop is Stop.NEVER or alive == 1 or _fits(cost, left, enough):
            break
        left.remove(one)
        stopped.append(one.key)
    return stopped


def near(members: Iterable[Member]) -> list[Member]:
    """As they will be soon."""
    return [replace(each, likely=min(each.likely, each.written + NEAR)) for each in members]


def _fits(cost: KvCost, batch: Sequence[Growing[Key]], room: int) -> bool:
    return fits(cost, near(each.member for each in batch), room) or fits(cost, [each.member for each in batch], room)

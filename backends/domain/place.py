"""Where a queued request stands, and what it waits for. Pure."""

from dataclasses import dataclass
from enum import StrEnum


class WaitsFor(StrEnum):
    """What a queued request waits for, where a replica is ready, in the words that its client gets."""

    SLOT = "busy"
    MORE_URGENT = "keeping slots for more urgent requests"
    TURN = "reading a long prompt, or about to"
    MEMORY = "waiting for memory that other requests use"
    IDLE = "busy with requests that this one cannot run beside"


@dataclass(frozen=True, slots=True)
class Place:
    """``before``: queued requests that are served earlier, if no more urgent one comes. ``eta``: seconds until it is
    served; None = not known. ``numbers``: of what it waits for, as text for people; "" = none."""

    before: int = 0
    eta: float | None = None
    waits_for: WaitsFor = WaitsFor.SLOT
    numbers: str = ""

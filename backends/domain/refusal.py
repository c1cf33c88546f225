"""Why a pool gave no lease. Pure."""

from dataclasses import dataclass
from enum import StrEnum


class Why(StrEnum):
    QUEUE_FULL = "queue_full"
    QUEUE_TIMEOUT = "queue_timeout"  # replicas are up, and busy
    LOADING = "loading"  # waited, and none became ready
    UNAVAILABLE = "unavailable"  # none is up, and none is coming up


@dataclass(frozen=True, slots=True)
class Refusal:
    why: Why
    waited: float = 0.0  # seconds
    queued: int = 0  # requests in line

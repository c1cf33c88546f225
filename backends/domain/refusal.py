"""Why a pool gave no lease. Pure."""

from dataclasses import dataclass
from enum import StrEnum


class Why(StrEnum):
    QUEUE_FULL = "queue_full"
    QUEUE_TIMEOUT = "queue_timeout"  # replicas are ready, and busy
    LOADING = "loading"  # queue timeout, and no replica is ready
    UNAVAILABLE = "unavailable"  # no replica is up or starting


@dataclass(frozen=True, slots=True)
class Refusal:
    why: Why
    waited: float = 0.0  # seconds
    queued: int = 0  # queued requests
    unbatchable: bool = False  # it could not have shared a batch, so it waited for an idle replica

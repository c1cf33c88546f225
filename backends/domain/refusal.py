"""Why a pool gave no lease. Pure."""

from dataclasses import dataclass
from enum import StrEnum


class Why(StrEnum):
    QUEUE_FULL = "queue_full"
    DISPLACED = "displaced"  # the queue was full as a request of a more urgent class came
    QUEUE_TIMEOUT = "queue_timeout"  # replicas are ready, and busy
    LOADING = "loading"  # queue timeout, and no replica is ready
    UNAVAILABLE = "unavailable"  # no replica will be ready within the request's patience


@dataclass(frozen=True, slots=True)
class Refusal:
    why: Why
    waited: float = 0.0  # seconds
    queued: int = 0  # queued requests
    patience: float = 0.0  # seconds that it could have waited; 0 = unknown
    unbatchable: bool = False  # it could not have shared a batch, so it waited for an idle replica

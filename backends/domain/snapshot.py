"""Frozen snapshot of a replica for other components: advice only, never a licence to act. Pure."""

from dataclasses import dataclass
from typing import NamedTuple

from backends.domain.engine import Engine
from backends.domain.failure import Failure
from backends.domain.inflight_limit import InflightLimit
from backends.domain.report import EngineReport
from backends.domain.share import Share
from backends.domain.state import State

WAITS_FOR_MEMORY = "waits for memory"  # the beginning of a phase; the numbers follow


class Seat(NamedTuple):
    """One instance of one replica: its prompt cache ends with it."""

    backend: str
    generation: int


@dataclass(frozen=True, slots=True)
class Loading:
    """Progress of a load, in seconds. ``expected``: as earlier loads took; None = never loaded before."""

    phase: str
    seconds: float
    expected: float | None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """``since`` and ``last_failure_at`` are seconds since the epoch; ``eta`` seconds; ``memory`` bytes."""

    id: str
    model: str
    state: State
    pid: int | None
    url: str | None  # listen address
    inflight: int  # requests whose clients wait
    restarts: int
    generation: int
    since: float
    eta: float | None  # until it can probably answer; 0 = now; None = unknown
    eta_known: bool = False  # ``eta`` is no mere guess: loads were seen, and the present one takes no longer than they
    retry_in: float | None = None  # seconds until it is started again by itself; None = not by the clock
    recovers: bool = False  # it can answer, or will be able to without a person or a new request
    given_up: bool = False  # failed, or failed as soon as its process has ended
    responsive: bool = True
    faltering: bool = False  # ready, but its process has just ended or failed a health check
    slots: int = 0  # requests that may be in flight now
    limit: InflightLimit | None = None  # and when nothing is wrong
    memory: int | None = None
    share: Share | None = None  # what its process may use now; None = there is none
    last_failure: Failure | None = None
    last_failure_at: float | None = None
    note: str = ""  # for users: why it gave up, what it waits for
    unloaded: bool = False  # also while it is being unloaded: the next request loads it
    missing: bool = False  # unloaded although its model is in use: failed, evicted, or refused memory
    crash_looping: bool = False  # it has failed again and again, and goes on trying
    failed_lives: int = 0  # in a row, that failed before they had answered a request
    evicting: bool = False  # drained to be unloaded, then loaded again for queued requests
    loading: Loading | None = None
    abandoned: int = 0  # requests whose clients have left, and on which the backend still works
    silence_limit: float | None = None  # seconds without progress after which a process that does nothing is replaced
    engine: Engine = Engine.OTHER  # what answers there, as far as it is known
    report: EngineReport | None = None  # of the process itself; None = no instrument, or it has fallen silent

    @property
    def short_of_memory(self) -> bool:
        """It is loaded as soon as the memory that it needs is there."""
        return self.loading is not None and self.loading.phase.startswith(WAITS_FOR_MEMORY)

"""What the outside may know of a backend: frozen, and advice only, never a licence to act. Pure."""

from dataclasses import dataclass
from typing import NamedTuple

from backends.domain.failure import Failure
from backends.domain.state import State


class Seat(NamedTuple):
    """One life of one replica: what it has cached is gone with it."""

    backend: str
    generation: int


@dataclass(frozen=True, slots=True)
class Loading:
    """How far a load has come. Seconds; ``expected``: as earlier loads took, None = it was never loaded."""

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
    url: str | None  # where it listens
    inflight: int
    restarts: int
    generation: int
    since: float
    eta: float | None  # until it can probably answer; 0 = now; None = nobody knows
    responsive: bool = True
    slots: int = 0  # requests at once that it takes now
    memory: int | None = None
    last_failure: Failure | None = None
    last_failure_at: float | None = None
    note: str = ""  # why it gave up, what it waits for
    unloaded: bool = False  # or being unloaded: the next request loads it
    evicting: bool = False  # it finishes what is in flight, and is then loaded again for requests in line
    loading: Loading | None = None

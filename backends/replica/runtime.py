"""The environment of a replica, passed in by the composition root: time, chance, environment variables, run record."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from backends.diagnosis.incidents import Incidents
from backends.domain.cadence import Cadence
from backends.memory.host import HostMemory
from backends.memory.kv_cost import KvCost
from backends.memory.scheduler import MemoryScheduler
from backends.process.learned import Learned
from backends.replica.learned_rates import Rates, learned_rates
from backends.replica.load_times import load_times
from backends.replica.remote_host import RemoteHosts


class Children(Protocol):
    """The record on disk of the processes that must not outlive the gateway. Called in threads; may block."""

    def intend(self, *, backend: str, grace: float) -> str:
        """Before the spawn. ``grace``: seconds from SIGTERM to SIGKILL. Returns the mark for its environment."""
        ...

    def add(self, mark: str, *, pid: int, create_time: float) -> None: ...

    def remove(self, mark: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Runtime:
    """``clock``: monotonic seconds, the event loop's time; ``wall``: seconds since the epoch; ``chance``: uniform in
    [0, 1); ``host``: memory of the whole machine; ``measure``: called in a thread with the name
    of a model before its launch, to read from its files what the scheduler needs; ``batch_cost``: of a model, what that
    has found of the cost of its batches, and ``doubled``: after how many tokens one takes twice as long to read; None =
    not known."""

    clock: Callable[[], float]
    wall: Callable[[], float]
    chance: Callable[[], float]
    children: Children
    environ: Mapping[str, str]
    scheduler: MemoryScheduler
    host: HostMemory
    measure: Callable[[str], None] = lambda _: None
    batch_cost: Callable[[str], KvCost | None] = lambda _: None
    doubled: Callable[[str], float | None] = lambda _: None
    load_times: Learned[float] = field(default_factory=load_times)
    rates: Learned[Rates] = field(default_factory=learned_rates)
    incidents: Incidents = field(default_factory=Incidents)
    cadence: Cadence = field(default_factory=Cadence)
    remote_hosts: RemoteHosts = field(default_factory=RemoteHosts)
    ports: set[int] = field(default_factory=set)  # assigned to children, whether they listen already or not

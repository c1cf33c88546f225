"""All models and their replicas: started in order, stopped in reverse, leaving no process behind."""

import asyncio
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from backends.admission.pool import Pool
from backends.domain.snapshot import Snapshot
from backends.domain.spec import BackendSpec, Launch
from backends.domain.state import StartReason, State
from backends.process.reaper_control import ReaperHandle
from backends.replica import events
from backends.replica.remote import RemoteReplica
from backends.replica.runtime import Runtime
from backends.replica.supervised import SupervisedReplica
from backends.tasks import Tasks

log = logging.getLogger(__name__)


AnyBackend = SupervisedReplica | RemoteReplica


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """One model: its replicas and the bounds of its queue."""

    name: str
    replicas: tuple[BackendSpec, ...]
    max_queue: int
    queue_timeout: float


class Fleet:
    """``pools``: by public name of the model, in the order of the config."""

    def __init__(self, plans: Sequence[ModelPlan], runtime: Runtime, reaper: ReaperHandle | None = None) -> None:
        self._runtime = runtime
        self._reaper = reaper
        self._tasks = Tasks("fleet")
        self.backends: dict[str, AnyBackend] = {}
        self.pools: dict[str, Pool] = {}
        for plan in plans:
            replicas = [_build(spec, runtime) for spec in plan.replicas]
            self.backends.update((replica.id, replica) for replica in replicas)
            self.pools[plan.name] = Pool(replicas, max_queue=plan.max_queue, queue_timeout=plan.queue_timeout)

    def start(self) -> None:
        """Begins to load all replicas that are not on demand. Returns before any is ready."""
        if self._reaper is not None:
            self._reaper.start()
            self._tasks.start(self._watch_reaper(self._reaper), "reaper")
        for backend in self.backends.values():
            if not backend.spec.on_demand:
                backend.load(StartReason.EAGER)
        self._tasks.start(self._enforce_residency(), "residency")

    async def close(self) -> None:
        """Stop every replica; returns when all processes have ended. A failure to stop one replica does not affect the
        others; then raises ExceptionGroup."""
        try:
            closing = (backend.close() for backend in reversed(self.backends.values()))
            results = await asyncio.gather(*closing, return_exceptions=True)
        finally:
            await self._tasks.close()
        if errors := [result for result in results if isinstance(result, Exception)]:
            raise ExceptionGroup("replicas were not closed properly", errors)

    def kill(self) -> None:
        """SIGKILL all processes now, without grace."""
        for backend in self.backends.values():
            backend.kill()

    def snapshots(self, model: str | None = None) -> list[Snapshot]:
        chosen: Iterable[AnyBackend] = self.backends.values()
        return [backend.snapshot() for backend in chosen if model is None or backend.spec.model == model]

    def sharing(self, backend: str) -> set[str]:
        """Ids of the backends on the same memory host, itself included."""
        memory_host = self.backends[backend].spec.memory_host
        return {name for name, other in self.backends.items() if other.spec.memory_host == memory_host}

    def load(self, model: str) -> bool:
        """By an operator: also loads replicas that have given up or were stopped. True: there was one to load."""
        down = [b for b in self._supervised(model) if not b.is_up_or_starting]
        for backend in down:
            backend.command(events.Start())
        return bool(down)

    def unload(self, model: str) -> bool:
        """By an operator: drains and unloads the replicas. True: there was one to unload."""
        down = (State.UNLOADED, State.STOPPED, State.FAILED)
        up = [b for b in self._supervised(model) if b.next_state not in down]
        for backend in up:
            backend.unload()
        return bool(up)

    def _supervised(self, model: str | None = None) -> list[SupervisedReplica]:
        chosen = [b for b in self.backends.values() if isinstance(b, SupervisedReplica)]
        return [b for b in chosen if model is None or b.spec.model == model]

    async def _enforce_residency(self) -> None:
        """Unloads replicas that were idle for long enough, recycles those that have grown too large, and loads those
        that are missing."""
        while True:
            await asyncio.sleep(self._runtime.cadence.residency_tick)
            idle = {model: self._idle(model) for model in self.pools}
            for backend in self._supervised():
                backend.enforce_residency(spare=self._spare(backend), model_idle=idle[backend.spec.model])
                backend.restore()

    def _idle(self, model: str) -> float:
        """Seconds without a request in flight."""
        replicas = self._supervised(model)
        if any(replica.clients for replica in replicas):
            return 0.0
        return self._runtime.clock() - max((replica.used_at for replica in replicas), default=0.0)

    def _spare(self, backend: SupervisedReplica) -> bool:
        """Another replica of the model can take over."""
        others = (b for b in self.pools[backend.spec.model].backends if b is not backend)
        return any(b.state is State.READY and b.responsive for b in others)

    async def _watch_reaper(self, reaper: ReaperHandle) -> None:
        while True:
            await asyncio.sleep(self._runtime.cadence.reaper_tick)
            reaper.check(self._runtime.clock())


def _build(spec: BackendSpec, runtime: Runtime) -> AnyBackend:
    if isinstance(spec.target, Launch):
        return SupervisedReplica(spec, spec.target, runtime)
    return RemoteReplica(spec, spec.target, runtime)

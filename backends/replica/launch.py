"""Bringing a process up: what can be known beforehand, the wait for the memory of the last one, a port, the spawn."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from backends.domain.failure import Aftermath, Blame, Cause, Failure
from backends.domain.spec import BackendSpec, Launch
from backends.memory.reclaim import PATIENCE, ReclaimWait
from backends.process import ports
from backends.process.child import PASSING, SpawnError, spawn
from backends.process.output import LineSplitter, Ring
from backends.replica.instance import Instance
from backends.replica.preflight import filled, preflight
from backends.replica.runtime import Runtime
from backends.upstream.h1_client import H1Dialer

log = logging.getLogger(__name__)

OUR_PROBES = ('"GET /health HTTP/1.1" 200 -', '"GET /health HTTP/1.0" 200 -')
MEMORY_POLL = 0.5  # seconds


class Launcher:
    """Of one replica, for all its instances."""

    def __init__(self, spec: BackendSpec, launch: Launch, runtime: Runtime, ring: Ring) -> None:
        self._spec = spec
        self._launch = launch
        self._runtime = runtime
        self._ring = ring
        self._headroom = ReclaimWait()
        self._life: Instance | None = None

    async def launch(
        self,
        generation: int,
        *,
        wanted: Callable[[], bool],
        enter: Callable[[], Awaitable[Failure | None]],
        waits: Callable[[str], None],
        condemn: Callable[[Failure], None],
        proved: Callable[[], None],
    ) -> Instance | Failure:
        """``wanted`` turns false when the replica was told to stop meanwhile: then no process is launched. ``enter``
        waits for memory, or says why there is none. ``waits`` is told what the launch waits for, "" = nothing more."""
        try:
            if (refused := preflight(self._launch)) is not None:
                return refused
            if (refused := await enter()) is not None:
                return refused
            await self._memory_back(wanted, waits)
            if not wanted():
                return _called_off(self._spec.id)
            self._life = await self._spawn(generation, condemn, proved)
        except SpawnError as error:
            blame = Blame.MACHINE if error.passing else Blame.OPERATOR
            return Failure(Cause.DEPENDENCY, Aftermath.EXITED, str(error), blame=blame)
        except OSError as error:  # a host that is not ours; no descriptors left
            message = f"no port could be had on {self._launch.host}: {error.strerror or error}; check server_args.host"
            blame = Blame.MACHINE if error.errno in PASSING else Blame.OPERATOR
            return Failure(Cause.DEPENDENCY, Aftermath.EXITED, message, blame=blame)
        return self._life

    def ended(self, life: Instance) -> None:
        """The process is gone, and so is what it left of its group."""
        self._headroom.note(life.peak)
        self._life = None
        self._runtime.children.remove(life.child.pid)
        self._runtime.ports.discard(life.port)

    async def _memory_back(self, wanted: Callable[[], bool], waits: Callable[[str], None]) -> None:
        """Waits, not for ever, until the system has back what the last instance used."""
        told = False
        deadline = self._runtime.clock() + PATIENCE
        while wanted() and self._runtime.clock() < deadline:
            missing = self._headroom.missing(self._runtime.available())
            if not missing:
                break
            if not told:
                log.warning("backend waits", extra={"backend": self._spec.id, "reason": missing})
            told = True
            waits(missing)
            await asyncio.sleep(MEMORY_POLL)
        if told and wanted():
            waits("")
        self._headroom.begin(self._runtime.available())

    async def _spawn(self, generation: int, condemn: Callable[[Failure], None], proved: Callable[[], None]) -> Instance:
        """Raises SpawnError."""
        launch, runtime = self._launch, self._runtime
        port = launch.port or ports.free_port(launch.host, avoid=runtime.ports)
        runtime.ports.add(port)
        fill = {"host": launch.host, "port": str(port), "model": self._spec.upstream_model}
        argv = [filled(word, fill) for word in launch.argv]
        first_seq = self._ring.last_seq
        env = {**runtime.environ, **launch.env}
        try:
            child = await spawn(argv, env, on_line=self._heard_line, splitter=LineSplitter)
        except SpawnError:
            runtime.ports.discard(port)
            raise
        runtime.children.add(backend=self._spec.id, pid=child.pid, create_time=child.create_time)
        return Instance(
            backend=self._spec.id,
            generation=generation,
            is_mlx=self._spec.is_mlx,
            port=port,
            child=child,
            dialer=H1Dialer(launch.host, port, jitter=runtime.chance),
            ring=self._ring,
            first_seq=first_seq,
            condemn=condemn,
            proved=proved,
        )

    def _heard_line(self, line: str) -> None:
        if line.endswith(OUR_PROBES):
            return  # every two seconds, it would be most of what there is to read
        self._ring.append(line)
        if self._life is not None and "Prompt processing progress" in line:
            self._life.last_progress_at = self._runtime.clock()


def _called_off(name: str) -> Failure:
    message = f"{name} was told to stop before its process was launched"
    return Failure(Cause.NONE, Aftermath.NOT_LAUNCHED, message, blame=Blame.GATEWAY)

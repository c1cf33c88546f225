"""Launching a process: preflight, the wait for the memory of the last one, a port, the spawn; at its end all is given
back.

What asks the disk, the resolver or the table of sockets runs in threads: on the event loop it would hold up every
stream. Caveat: so two launches that begin in one moment may reach the scheduler in either order.
"""

import asyncio
import errno
import logging
from collections.abc import Awaitable, Callable
from functools import partial

from backends.admission.lease import InFlight
from backends.diagnosis.log_parser import LogParser
from backends.domain.failure import Aftermath, Blame, Cause, Failure
from backends.domain.spec import BackendSpec, Launch
from backends.memory.reclaim import PATIENCE, ReclaimWait
from backends.process import groups, ports
from backends.process.child import PASSING, ChildProcess, SpawnError, spawn
from backends.process.output import LineSplitter, Ring
from backends.replica.call_judge import CallJudge
from backends.replica.instance import WINDOW, Instance
from backends.replica.monitor import LivenessMonitor, Watched
from backends.replica.preflight import filled, preflight
from backends.replica.process_memory import ProcessMemory
from backends.replica.runtime import Runtime
from backends.upstream.h1_client import H1Dialer

log = logging.getLogger(__name__)

OUR_PROBES = ('"GET /health HTTP/1.1" 200 -', '"GET /health HTTP/1.0" 200 -')
PORT_TRIES = 20  # that another launch may win in the same moment


class Launcher:
    """Of one replica, for all its instances."""

    def __init__(self, spec: BackendSpec, launch: Launch, runtime: Runtime, *, ring: Ring, inflight: InFlight) -> None:
        self._spec = spec
        self._launch = launch
        self._runtime = runtime
        self._ring = ring
        self._inflight = inflight
        self._headroom = ReclaimWait()
        self._life: Instance | None = None

    async def launch(
        self,
        generation: int,
        *,
        wanted: Callable[[], bool],
        enter: Callable[[], Awaitable[Failure | None]],
        waits: Callable[[str], None],
        proved: Callable[[], None],
    ) -> Instance | Failure:
        """``wanted`` turns false when the replica was told to stop meanwhile: then no process is launched. ``enter``
        waits for memory, or says why there is none. ``waits`` is told what the launch waits for, "" = nothing more."""
        try:
            if (refused := await asyncio.to_thread(self._examined)) is not None:
                return refused
            if not wanted():
                return _called_off(self._spec.id)
            if (refused := await enter()) is not None:
                return refused
            await self._memory_back(wanted, waits)
            if not wanted():
                return _called_off(self._spec.id)
            port = await self._reserved_port()
            if not wanted():
                self._runtime.ports.discard(port)
                return _called_off(self._spec.id)
            self._headroom.begin(self._runtime.available())
            self._life = await self._spawn(generation, port, proved)
        except SpawnError as error:
            blame = Blame.MACHINE if error.passing else Blame.OPERATOR
            return Failure(Cause.DEPENDENCY, Aftermath.EXITED, str(error), blame=blame)
        except OSError as error:  # a host that is not ours; no descriptors left
            message = f"no free port on {self._launch.host}: {error.strerror or error}; check server_args.host"
            blame = Blame.MACHINE if error.errno in PASSING else Blame.OPERATOR
            return Failure(Cause.DEPENDENCY, Aftermath.EXITED, message, blame=blame)
        return self._life

    async def ended(self, life: Instance) -> None:
        """Give back what the life held. A process that even SIGKILL did not end stays on record: the reaper, and the
        next start of a gateway, try again."""
        self._headroom.note(life.memory.peak)
        self._life = None
        self._runtime.ports.discard(life.port)
        await asyncio.to_thread(self._forget, life.child)

    def _forget(self, child: ChildProcess) -> None:
        if groups.members(child.pid, child.create_time):
            log.warning("process not ended, left on record", extra={"backend": self._spec.id, "pid": child.pid})
        else:
            self._runtime.children.remove(child.pid)

    def _examined(self) -> Failure | None:
        """What is wrong with its files or its port. The size of its model is known when this returns. Blocks."""
        refused = preflight(self._launch)
        if refused is None:
            self._runtime.measure(self._spec.model)
        return refused

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
            await asyncio.sleep(self._runtime.cadence.memory_poll)
        if told and wanted():
            waits("")

    async def _spawn(self, generation: int, port: int, proved: Callable[[], None]) -> Instance:
        """Raises SpawnError, OSError; then ``port`` is given back."""
        log = LogParser(WINDOW)
        try:
            child = await self._child(port, log)
        except BaseException:
            self._runtime.ports.discard(port)
            raise
        return self._instance(generation, port, child, log=log, proved=proved)

    def _instance(
        self, generation: int, port: int, child: ChildProcess, *, log: LogParser, proved: Callable[[], None]
    ) -> Instance:
        spec, runtime = self._spec, self._runtime
        dialer = H1Dialer(self._launch.host, port, jitter=runtime.chance)
        memory = ProcessMemory(child.pid)
        monitor = LivenessMonitor(
            Watched(generation, dialer, log, memory),
            spec,
            self._inflight,
            clock=runtime.clock,
            cadence=runtime.cadence,
            proved=proved,
        )
        calls = CallJudge(
            spec.id, generation, dialer, has_process=True, cadence=runtime.cadence, recheck=monitor.recheck
        )
        return Instance(spec.id, generation, port, child, dialer, log, memory, monitor, calls)

    async def _child(self, port: int, log: LogParser) -> ChildProcess:
        launch, runtime = self._launch, self._runtime

        def record(pid: int, create_time: float) -> None:
            runtime.children.add(backend=self._spec.id, pid=pid, create_time=create_time)

        fill = {"host": launch.host, "port": str(port), "model": self._spec.upstream_model}
        return await spawn(
            [filled(word, fill) for word in launch.argv],
            {**runtime.environ, **launch.env},
            record=record,
            on_line=partial(self._heard_line, log),
            splitter=LineSplitter,
            cadence=runtime.cadence,
        )

    async def _reserved_port(self) -> int:
        """On ``runtime.ports`` when this returns, so that no other launch gets it. Raises OSError."""
        launch, reserved = self._launch, self._runtime.ports
        if launch.port:
            reserved.add(launch.port)
            return launch.port
        for _ in range(PORT_TRIES):
            port = await asyncio.to_thread(ports.free_port, launch.host, frozenset(reserved))
            if port not in reserved:
                reserved.add(port)
                return port
        raise OSError(errno.EAGAIN, "other launches took each port that was found")

    def _heard_line(self, log: LogParser, line: str) -> None:
        if line.endswith(OUR_PROBES):
            return  # every two seconds, it would be most of what there is to read
        self._ring.append(line)
        log.feed(line)


def _called_off(name: str) -> Failure:
    message = f"{name} was told to stop before its process was launched"
    return Failure(Cause.NONE, Aftermath.NOT_LAUNCHED, message, blame=Blame.GATEWAY)

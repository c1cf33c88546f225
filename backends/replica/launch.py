"""Launch of a process: preflight, wait for the memory of the previous instance, port, spawn; and the release of all
resources when the process has ended.

Calls to the disk, the resolver and the socket table run in threads: on the event loop they would delay every stream.
Caveat: two launches that begin at the same time may therefore reach the scheduler in either order.
"""

import asyncio
import errno
import logging
from collections.abc import Awaitable, Callable, Mapping
from functools import partial

from backends.admission.inflight import InFlight
from backends.diagnosis.engine import EngineIdentity
from backends.diagnosis.log_parser import LogParser
from backends.domain.activity import Activity
from backends.domain.failure import Aftermath, Blame, Cause, Failure, Reason
from backends.domain.spec import BackendSpec, Launch
from backends.memory import occupancy
from backends.memory.occupancy import Occupancy, Place
from backends.memory.past_lives import PastLives
from backends.memory.reclaim import PATIENCE, Lingering, ReclaimWait
from backends.process import groups, ports
from backends.process.activity import activity
from backends.process.channel import Channel
from backends.process.child import PASSING, REMEDIES, ChildProcess, SpawnError, spawn
from backends.process.output import LineSplitter, Ring
from backends.replica import remote_host
from backends.replica.call_judge import CallJudge
from backends.replica.dropped_calls import DroppedCalls
from backends.replica.instance import LOG_WINDOW, Instance
from backends.replica.monitor import LivenessMonitor, Watched
from backends.replica.preflight import downloads, filled, preflight
from backends.replica.process_memory import ProcessMemory
from backends.replica.runtime import Runtime
from backends.upstream.h1_client import H1Dialer

log = logging.getLogger(__name__)

OUR_PROBES = ('"GET /health HTTP/1.1" 200 -', '"GET /health HTTP/1.0" 200 -')
PORT_TRIES = 20  # another launch may take the same port first


class Launcher:
    """Launches all instances of one replica."""

    def __init__(
        self,
        spec: BackendSpec,
        launch: Launch,
        runtime: Runtime,
        *,
        ring: Ring,
        inflight: InFlight,
        past: PastLives,
        sizes: Callable[[], Mapping[str, str]],
    ) -> None:
        """``sizes``: values of placeholders in the command line, read at each launch."""
        self._spec = spec
        self._launch = launch
        self._runtime = runtime
        self._ring = ring
        self._inflight = inflight
        self._past = past
        self._sizes = sizes
        self._reclaim = ReclaimWait()
        self._downloads = False  # in the present launch
        self._ended_at = 0.0  # when the last process ended

    async def launch(
        self,
        generation: int,
        *,
        wanted: Callable[[], bool],
        enter: Callable[[], Awaitable[Failure | None]],
        waits: Callable[[str], None],
        proved: Callable[[], None],
    ) -> Instance | Failure:
        """``wanted`` returns false once the replica was told to stop: then no process is launched. ``enter`` waits for
        memory, or returns why there is none. ``waits`` gets what the launch is waiting for, "" = it no longer waits."""
        try:
            if (refused := await asyncio.to_thread(self._preflight)) is not None:
                return refused
            if (doubled := self._runtime.doubled(self._spec.model)) is not None:
                self._inflight.reading.assume(doubled)
            if not wanted():
                return _not_launched(self._spec.id)
            if (refused := await enter()) is not None:
                return refused
            await self._wait_for_reclaim(wanted, waits)
            if not wanted():
                return _not_launched(self._spec.id)
            port = await self._reserved_port()
            if not wanted():
                self._runtime.ports.discard(port)
                return _not_launched(self._spec.id)
            available = self._runtime.host.available()
            self._reclaim.begin(available)
            self._past.begins(available)
            return await self._spawn(generation, port, proved)
        except SpawnError as error:
            return _no_launch(str(error), passing=error.passing)
        except OSError as error:  # a host of another machine; no file descriptors left
            message = f"no free port on {self._launch.host}: {error.strerror or error}; check server_args.host"
            if error.errno in PASSING:
                message = f"{self._spec.id} could not be launched: {error.strerror}; {REMEDIES[error.errno or 0]}"
            return _no_launch(message, passing=error.errno in PASSING)

    @property
    def lingering(self) -> Lingering:
        """The memory of the last process, after ``ended``."""
        return self._reclaim.lingering(self._ended_at)

    async def ended(self, instance: Instance) -> None:
        """Releases the resources of the instance. A process that survived SIGKILL stays on record: the reaper, and the
        next gateway that starts, try again to end it."""
        self._reclaim.note(instance.memory.peak)
        self._ended_at = self._runtime.clock()
        self._runtime.ports.discard(instance.port)
        if instance.channel is not None:
            instance.channel.close()
        await asyncio.to_thread(self._remove_record, instance.child)

    def _remove_record(self, child: ChildProcess) -> None:
        if groups.members(child.pid, child.create_time):
            log.warning("process not ended, left on record", extra={"backend": self._spec.id, "pid": child.pid})
        else:
            self._runtime.children.remove(child.mark)

    def _preflight(self) -> Failure | None:
        """The failure that preflight finds; if there is none, the model's files are looked at too. Blocks."""
        refused = preflight(self._launch)
        if refused is None:
            self._runtime.measure(self._spec.model)
            self._downloads = downloads(self._launch)
        return refused

    async def _wait_for_reclaim(self, wanted: Callable[[], bool], waits: Callable[[str], None]) -> None:
        """Waits until the system has reclaimed the memory of the previous instance, for at most PATIENCE seconds since
        that ended: what others hold was waited for before."""
        waited, clock = False, self._runtime.clock
        while wanted() and clock() < self._ended_at + PATIENCE and (what := await self._lacking()):
            if not waited:
                log.warning("backend waits", extra={"backend": self._spec.id, "reason": what})
            waited = True
            waits(what)
            await asyncio.sleep(self._runtime.cadence.memory_poll)
        if waited and wanted():
            waits("")

    async def _lacking(self) -> str:
        """What of that memory is not there yet, and who holds memory, for users; "" = nothing."""
        needed, available = self._reclaim.needed, self._runtime.host.available()
        if available >= needed:
            return ""
        seen = await self._runtime.scheduler.look(Place.MACHINE) or Occupancy(Place.MACHINE, 0, 0)
        return occupancy.waiting(seen, needed, available)

    async def _spawn(self, generation: int, port: int, proved: Callable[[], None]) -> Instance:
        """Raises SpawnError, OSError; ``port`` is released then."""
        log, memory = LogParser(LOG_WINDOW), ProcessMemory(self._runtime.host, self._runtime.clock)
        dropped = DroppedCalls(self._runtime.clock)
        try:
            child, channel = await self._child(port, memory, partial(self._on_line, log, dropped))
        except BaseException:
            self._runtime.ports.discard(port)
            raise
        instance = self._new_instance(generation, port, child, log=log, dropped=dropped, memory=memory, proved=proved)
        if channel is not None:
            channel.listen(instance.monitor.note_report)
            instance.channel = channel
        return instance

    def _new_instance(
        self,
        generation: int,
        port: int,
        child: ChildProcess,
        *,
        log: LogParser,
        dropped: DroppedCalls,
        memory: ProcessMemory,
        proved: Callable[[], None],
    ) -> Instance:
        spec, runtime = self._spec, self._runtime
        dialer = H1Dialer(self._launch.host, port, jitter=runtime.chance)
        identity = EngineIdentity(spec)
        monitor = LivenessMonitor(
            Watched(
                generation,
                dialer,
                identity,
                log,
                may_load=partial(self._may_load, identity, generation, runtime.clock()),
                activity=partial(_activity, child, memory),
            ),
            spec,
            self._inflight,
            clock=runtime.clock,
            cadence=runtime.cadence,
            proved=proved,
        )
        calls = CallJudge(
            spec.id,
            generation,
            dialer,
            identity,
            has_process=True,
            cadence=runtime.cadence,
            recheck=monitor.recheck,
            secrets=spec.secrets,
            dropped=dropped,
        )
        return Instance(spec.id, generation, port, child, dialer, log, memory, monitor, calls, self._downloads)

    def _may_load(self, identity: EngineIdentity, generation: int, launched_at: float) -> float:
        """As ``Watched.may_load``: a router or another foreign server may unload its idle model."""
        used_at = max(self._inflight.answered_at, launched_at)
        fresh = self._runtime.clock() - used_at < remote_host.KEPT_FOR
        is_loaded = identity.is_mlx or fresh or self._inflight.any_decoding(generation)
        return 0.0 if is_loaded else self._spec.timeouts.start

    async def _child(
        self, port: int, memory: ProcessMemory, on_line: Callable[[str], None]
    ) -> tuple[ChildProcess, Channel | None]:
        launch, runtime, spec = self._launch, self._runtime, self._spec
        mark = await asyncio.to_thread(runtime.children.intend, backend=spec.id, grace=spec.timeouts.stop)

        def record(pid: int, create_time: float) -> None:
            runtime.children.add(mark, pid=pid, create_time=create_time)
            memory.begin(pid)

        fill = {"host": launch.host, "port": str(port), "model": spec.upstream_model, **self._sizes()}
        channel: Channel | None = None
        try:
            channel = Channel(spec.id, runtime.clock) if launch.instrumented else None
            child = await spawn(
                [filled(word, fill) for word in launch.argv],
                {**runtime.environ, **launch.env, **({} if channel is None else channel.environ)},
                record=record,
                ended=memory.end,
                on_line=on_line,
                splitter=LineSplitter,
                mark=mark,
                inherits=None if channel is None else channel.theirs,
                cadence=runtime.cadence,
            )
        except BaseException as error:
            if channel is not None:
                channel.close()
            if isinstance(error, SpawnError | OSError):
                await asyncio.to_thread(runtime.children.remove, mark)
            raise
        return child, channel

    async def _reserved_port(self) -> int:
        """The port is in ``runtime.ports`` when this returns, so that no other launch takes it. Raises OSError."""
        launch, reserved = self._launch, self._runtime.ports
        if launch.port:
            reserved.add(launch.port)
            return launch.port
        for _ in range(PORT_TRIES):
            port = await asyncio.to_thread(ports.free_port, launch.host, frozenset(reserved))
            if port not in reserved:
                reserved.add(port)
                return port
        raise OSError(errno.EAGAIN, "other launches took every free port that was found")

    def _on_line(self, log: LogParser, dropped: DroppedCalls, line: str) -> None:
        if line.endswith(OUR_PROBES):
            return  # every 2 s: most of the output would be these lines
        line = self._spec.secrets.hide(line)
        self._ring.append(line)
        log.feed(line)
        dropped.note(log)
        while log.lost_clients:
            self._inflight.noticed(log.lost_clients.popleft())


def _activity(child: ChildProcess, memory: ProcessMemory) -> Activity | None:
    """None also while memory is short: what waits for its pages does not compute, and is not stuck."""
    found = activity(child.pid, child.create_time)
    return None if found is not None and memory.short and not found.stopped else found


def _no_launch(message: str, *, passing: bool) -> Failure:
    blame, reason = (Blame.MACHINE, Reason.EXHAUSTED) if passing else (Blame.OPERATOR, None)
    return Failure(Cause.DEPENDENCY, Aftermath.EXITED, message, blame=blame, reason=reason)


def _not_launched(name: str) -> Failure:
    message = f"{name} was told to stop before its process was launched"
    return Failure(Cause.NONE, Aftermath.NOT_LAUNCHED, message, blame=Blame.GATEWAY)

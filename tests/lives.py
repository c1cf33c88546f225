"""Helpers for tests of backends: a ``Runtime``, fake servers to launch, bare instances, scripted dialers."""

import asyncio
import os
import secrets
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import psutil

from backends.admission.inflight import InFlight
from backends.diagnosis.engine import EngineIdentity
from backends.diagnosis.log_parser import LogParser
from backends.domain.cadence import Cadence
from backends.domain.engine import Engine
from backends.domain.spec import BackendSpec
from backends.memory.host import HostMemory
from backends.memory.scheduler import MemoryScheduler
from backends.process.child import ChildProcess
from backends.replica.call_judge import CallJudge
from backends.replica.instance import LOG_WINDOW, Instance
from backends.replica.monitor import LivenessMonitor, Watched
from backends.replica.process_memory import ProcessMemory
from backends.replica.runtime import Runtime
from backends.upstream.exchange import Dialer, Exchange, ExchangeError, Fault, Head, Offer, Request, Watcher

FAKE = Path(__file__).with_name("fakes") / "fake_mlx.py"
MODEL = "tiny"
TOKEN = b'{"choices": [{"index": 0, "text": "x", "finish_reason": "length"}]}'


def fake(mode: str = "") -> tuple[str, ...]:
    """The argv of a fake server with this ``mode``."""
    return (sys.executable, str(FAKE), "--host", "{host}", "--port", "{port}", "--model", "{model}", "--mode", mode)


def engine(*, is_mlx: bool) -> Engine:
    return Engine.MLX_LM if is_mlx else Engine.OTHER


class Register:
    """A record of child processes in memory."""

    def __init__(self) -> None:
        self.intended: dict[str, str] = {}  # mark → backend
        self.now: dict[int, str] = {}  # pid → backend
        self.ever: list[int] = []  # all pids that were added
        self._run = secrets.token_hex(4)
        self._numbers = count()
        self._pids: dict[str, int] = {}

    def intend(self, *, backend: str, grace: float) -> str:
        assert grace >= 0
        mark = f"{self._run}.{next(self._numbers)}"
        self.intended[mark] = backend
        return mark

    def add(self, mark: str, *, pid: int, create_time: float) -> None:
        assert create_time > 0
        self.now[pid] = self.intended[mark]
        self.ever.append(pid)
        self._pids[mark] = pid

    def remove(self, mark: str) -> None:
        del self.intended[mark]
        if mark in self._pids:  # else the spawn has failed
            del self.now[self._pids.pop(mark)]


HURRIED = Cadence(
    liveness_tick=0.02,
    probe_interval=0.02,
    mend_settle=0.01,
    memory_retry=0.1,
    residency_tick=0.02,
    reaper_tick=0.01,
    supervision_retry=0.0,
    group_poll=0.005,
    memory_poll=0.01,
    start_pause=0.01,
    remote_retry_max=0.01,
)


def runtime(
    register: Register | None = None, cadence: Cadence = HURRIED, scheduler: MemoryScheduler | None = None
) -> Runtime:
    loop = asyncio.get_running_loop()
    return Runtime(
        clock=loop.time,
        wall=time.time,
        chance=lambda: 0.5,
        children=register or Register(),
        environ=dict(os.environ),
        scheduler=scheduler or MemoryScheduler(clock=loop.time, available=lambda: 2**40),
        host=HostMemory(loop.time),
        cadence=cadence,
    )


async def until(predicate: Callable[[], object], what: str = "", within: float = 30.0) -> None:
    """Polls until ``predicate`` is true; AssertionError after ``within`` seconds."""
    deadline = time.monotonic() + within
    while not predicate():
        if time.monotonic() > deadline:
            raise AssertionError(f"{what or predicate} did not come true within {within:g} s")
        await asyncio.sleep(0.005)


def alive(pid: int) -> bool:
    """Whether the process exists and is no zombie, i.e. one that its parent has yet to reap."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def instance(
    dialer: Dialer,
    spec: BackendSpec,
    *,
    generation: int = 1,
    port: int = 8081,
    pid: int | None = None,
    cadence: Cadence = HURRIED,
    clock: Callable[[], float] = time.monotonic,
    inflight: InFlight | None = None,
    proved: Callable[[], None] = lambda: None,
) -> Instance:
    """An instance without a launch; its process is ``pid``, by default that of the test."""
    child = cast("ChildProcess", SimpleNamespace(pid=pid or os.getpid()))
    log, memory = LogParser(LOG_WINDOW), ProcessMemory(HostMemory(clock), clock)
    identity = EngineIdentity(spec)
    watched = Watched(generation, dialer, identity, log)
    flight = InFlight() if inflight is None else inflight
    monitor = LivenessMonitor(watched, spec, flight, clock=clock, cadence=cadence, proved=proved)
    calls = CallJudge(spec.id, generation, dialer, identity, has_process=True, cadence=cadence, recheck=monitor.recheck)
    return Instance(spec.id, generation, port, child, dialer, log, memory, monitor, calls)


# -- a scripted backend ------------------------------------------------------------------------------------------------

Told = (
    tuple[int, bytes] | ExchangeError | None
)  # what a call gets: status and body; the error that breaks it; None = silence


@dataclass(eq=False)
class Scripted:
    """A dialer whose answers ``script`` defines; ``asked``: the requested paths, in order."""

    script: Callable[[Request], Told]
    asked: list[str] = field(default_factory=list)
    opened: list["ScriptedExchange"] = field(default_factory=list)

    def open(self, request: Request) -> Exchange:
        self.asked.append(request.path)
        self.opened.append(ScriptedExchange(self.script(request)))
        return self.opened[-1]

    async def aclose(self) -> None:
        pass


class ScriptedExchange:
    def __init__(self, told: Told) -> None:
        self.last_heard = 0.0
        self.pieces = 0
        self.waiting_since = 0.0
        self.working = True
        self.local_port = 0
        self.watcher: Watcher | None = None
        self.closed = False
        self.aborted: ExchangeError | None = None
        self._told = told
        self._silence: asyncio.Future[Head] = asyncio.get_running_loop().create_future()

    async def start(self) -> Head:
        match self._told:
            case ExchangeError() as error:
                raise error
            case None:
                self.waiting_since = asyncio.get_running_loop().time()
                return await self._silence
            case status, body:
                self._body = body
                return Head(status, ())

    async def read(self, _offer: Offer | None = None) -> bytes:
        body, self._body = self._body, b""
        return body

    def abort(self, error: ExchangeError) -> None:
        self.aborted = error
        if not self._silence.done():
            self._silence.set_exception(error)
            self._silence.exception()  # marks it as retrieved: a test need not await it

    def abandon(self, watcher: Watcher) -> None:
        self.watcher = watcher

    def close(self) -> None:
        self.closed = True
        self._silence.cancel()


def scripted(health: Told = (200, b"{}"), completion: Told = (200, TOKEN)) -> Scripted:
    return Scripted(lambda request: health if request.path == "/health" else completion)


def refused() -> ExchangeError:
    return ExchangeError(Fault.REFUSED, "connection refused")


_: type[Dialer] = Scripted

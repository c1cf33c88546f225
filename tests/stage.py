"""A supervised replica with a real, fake server as its child: launched, monitored, and without leftovers afterwards."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import psutil

from backends.admission.lease import Lease
from backends.domain.cadence import Cadence
from backends.domain.failure import CallFailure, Failure
from backends.domain.spec import BackendSpec, Launch, RestartPolicy, Timeouts
from backends.domain.state import State
from backends.memory.scheduler import MemoryScheduler
from backends.replica import probe
from backends.replica.events import Start
from backends.replica.supervised import SupervisedReplica
from backends.upstream.exchange import Exchange, ExchangeError, Fault, Request
from tests.lives import HURRIED, MODEL, Register, engine, fake, runtime, until

QUICK = RestartPolicy(min_backoff=0.02, max_backoff=0.05, max_failures=3, window=300.0)
LONG = Timeouts(start=60.0, progress=60.0, stop=20.0)


class Scene:
    """One replica, its record of children, and every state that it reported."""

    def __init__(
        self,
        launch: Launch,
        timeouts: Timeouts,
        restart: RestartPolicy,
        *,
        is_mlx: bool = True,
        cadence: Cadence = HURRIED,
        scheduler: MemoryScheduler | None = None,
        memory: int | None = None,
    ) -> None:
        self.register = Register()
        self.runtime = runtime(self.register, cadence, scheduler)
        spec = BackendSpec("m:0", "m", 0, MODEL, launch, engine(is_mlx=is_mlx), 2, timeouts, restart, memory=memory)
        self.backend = SupervisedReplica(spec, launch, self.runtime)
        self.states: list[State] = []
        self.backend.on_change = self.changed

    def changed(self) -> None:
        if self.states[-1:] != [self.backend.state]:
            self.states.append(self.backend.state)

    @property
    def pid(self) -> int:
        pid = self.backend.snapshot().pid
        assert pid is not None
        return pid

    @property
    def failure(self) -> Failure:
        failure = self.backend.snapshot().last_failure
        assert failure is not None
        return failure

    async def state(self, state: State, generation: int | None = None) -> None:
        def reached() -> bool:
            return self.backend.state is state and generation in (None, self.backend.snapshot().generation)

        await until(reached, f"{state} in generation {generation}")

    async def ready(self, generation: int = 1) -> None:
        self.backend.command(Start())
        await self.state(State.READY, generation)

    def ask(self, words: str = "hello") -> tuple[Lease, Exchange]:
        lease = self.backend.admit()
        return lease, lease.open(prompt(words))


def prompt(words: str) -> Request:
    body = probe.canary_request(MODEL, chat=False).body.replace(b'"hi"', f'"{words}"'.encode())
    body = body.replace(b'"max_tokens": 1', b'"max_tokens": 100').replace(b'"stream": false', b'"stream": true')
    return Request("POST", "/v1/completions", body)


@asynccontextmanager
async def scene(
    mode: str | Launch = "",
    *,
    timeouts: Timeouts = LONG,
    restart: RestartPolicy = QUICK,
    is_mlx: bool = True,
    cadence: Cadence = HURRIED,
    scheduler: MemoryScheduler | None = None,
    memory: int | None = None,
) -> AsyncIterator[Scene]:
    """``memory``: bytes that the replica needs. Closes the replica at the end, and asserts that it left no process,
    port, task or lease."""
    launch = mode if isinstance(mode, Launch) else Launch(fake(mode))
    one = Scene(launch, timeouts, restart, is_mlx=is_mlx, cadence=cadence, scheduler=scheduler, memory=memory)
    try:
        yield one
    finally:
        await one.backend.close()
    assert one.backend.state is State.STOPPED
    assert one.register.now == {}
    assert one.runtime.ports == set()
    assert not any(psutil.pid_exists(pid) for pid in one.register.ever)
    assert (one.backend.inflight, len(one.backend._tasks)) == (0, 0)


async def rest(exchange: Exchange) -> bytes:
    """The rest of the body. Raises ExchangeError."""
    got = b""
    while part := await exchange.read():
        got += part
    return got


async def broken(lease: Lease, exchange: Exchange, *, started: bool = True) -> CallFailure:
    """The failure of a request whose answer breaks off, as the request path diagnoses it."""
    try:
        if not started:
            await exchange.start()
        assert b"[DONE]" not in await rest(exchange)
        error = ExchangeError(Fault.INCOMPLETE, "the stream ended early")
    except ExchangeError as caught:
        error = caught
    failure = await lease.diagnose(error)
    exchange.close()
    lease.release()
    return failure

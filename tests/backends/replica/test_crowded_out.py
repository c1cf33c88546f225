"""A replica that runs out of memory because others hold it: who is blamed, and what its next start waits for."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from signal import SIGKILL

import pytest

from backends.domain.failure import Blame, Cause, Reason
from backends.domain.state import State
from backends.memory import scheduler
from backends.memory.occupancy import Holder, Occupancy, Place
from backends.memory.scheduler import MemoryScheduler
from backends.replica.events import Start, Stop
from backends.replica.restart_policy import History
from tests.lives import HURRIED, until
from tests.stage import Scene, broken, scene

GIB = 2**30
NEED = 6 * GIB
FULL, FREE = GIB, 20 * GIB
LOOKS = 0.02  # seconds between two
HOG = "PID 4711 (hog) holds 25.0 GiB"
WAITS = f"waits for memory: 1.0 GiB available, needs 6.0 GiB; {HOG}"


@dataclass(eq=False)
class Machine:
    """32 GiB of that memory; what is not available, another process holds. ``lists``: the GPU's driver does."""

    available: int = FULL
    place: Place = Place.MACHINE
    lists: bool = True
    looks: list[frozenset[int]] = field(default_factory=list)

    def look(self, place: Place, own: frozenset[int]) -> Occupancy | None:
        if place is not self.place:
            return None
        self.looks.append(own)
        others = 25 * GIB if self.available < NEED else 0
        ours = dict.fromkeys(own, GIB) if self.lists else {}
        return Occupancy(place, 32 * GIB, self.available, others, Holder(4711, "hog", others), ours)


@pytest.fixture(autouse=True)
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "DECISION_INTERVAL", LOOKS)


@asynccontextmanager
async def on(machine: Machine, mode: str = "") -> AsyncIterator[Scene]:
    memory = MemoryScheduler(
        clock=asyncio.get_running_loop().time,
        available=lambda: machine.available if machine.place is Place.MACHINE else 64 * GIB,
        budget=64 * GIB,  # it is no question of the budget
        occupancies=machine.look,
        occupancy_interval=LOOKS,
    )
    async with scene(mode, scheduler=memory, memory=NEED) as s:
        yield s


def counted(s: Scene) -> tuple[int, int]:
    history: History = s.backend._machine.history
    return history.streak, len(history.failures)


async def back(s: Scene) -> None:
    """In its second life, or a later one where another program took the port of that."""
    await until(lambda: s.backend.generation > 1 and s.backend.state is State.READY, "it is back")


async def waits(s: Scene) -> None:
    await s.state(State.WAITING_FOR_MEMORY)
    loading = s.backend.snapshot().loading
    assert loading is not None
    assert loading.phase == WAITS
    assert s.backend.recovers, "requests wait for it"


async def test_a_first_request_that_others_left_no_memory_for_blames_nobody() -> None:
    machine = Machine()
    async with on(machine) as s:
        await s.ready()
        lease, exchange = s.ask("FAKE oom-0.32 after=0")
        failure = await broken(lease, exchange, started=False)
        verdict = failure.verdict
        assert (verdict.cause, verdict.blame, verdict.reason) == (Cause.OOM, Blame.MACHINE, Reason.CROWDED_OUT)
        assert f"which others hold (2.0 GiB available, needs 6.0 GiB; {HOG})" in verdict.message, "1 it has itself"
        assert not failure.suspect
        await waits(s)
        assert counted(s) == (0, 0), "its restarts are not delayed"


async def test_no_restart_until_the_memory_is_there_and_then_at_once() -> None:
    machine = Machine()
    async with on(machine) as s:
        await s.ready()
        lease, exchange = s.ask("FAKE metal-oom after=0")
        await broken(lease, exchange, started=False)
        await waits(s)
        looked = len(machine.looks)
        await until(lambda: len(machine.looks) > looked + 2, "it looks again and again")
        assert len(s.register.ever) == 1
        assert s.backend.state is State.WAITING_FOR_MEMORY
        assert machine.looks[-1] == frozenset(), "no process of ours is left"
        machine.available = FREE
        await back(s)
        assert s.backend.snapshot().loading is None


async def test_a_load_that_runs_out_of_memory_passes_likewise() -> None:
    machine = Machine()
    async with on(machine, "load=exit exit=1 say=malloc") as s:
        s.backend.command(Start())
        await waits(s)
        assert (s.failure.cause, s.failure.blame) == (Cause.OOM, Blame.MACHINE)
        assert HOG in s.failure.message
        assert counted(s) == (0, 0)


async def test_with_memory_at_hand_the_replica_and_its_request_are_to_blame_and_nothing_is_waited_for() -> None:
    async with on(Machine(FREE)) as s:
        await s.ready()
        lease, exchange = s.ask("FAKE oom-0.32 after=0")
        failure = await broken(lease, exchange, started=False)
        assert (failure.verdict.cause, failure.verdict.blame) == (Cause.OOM, Blame.BACKEND)
        assert (failure.suspect, failure.alone) == (True, True)
        await back(s)
        assert State.WAITING_FOR_MEMORY not in s.states


async def test_other_deaths_are_not_waited_for() -> None:
    machine = Machine()
    async with on(machine) as s:
        await s.ready()
        os.kill(s.pid, SIGKILL)
        await back(s)
        assert State.WAITING_FOR_MEMORY not in s.states
        assert machine.looks == []


async def test_one_that_was_seen_to_use_a_gpu_is_not_started_into_a_full_one_whatever_it_died_of() -> None:
    gpu = Machine(FREE, Place.DEVICE)
    async with on(gpu) as s:
        await s.ready()
        await until(lambda: s.backend.past.on_device, "its process is listed")
        assert s.backend.past.device_size == GIB
        assert s.backend.past.before[Place.DEVICE] == FREE
        gpu.available = FULL
        os.kill(s.pid, SIGKILL)
        await s.state(State.WAITING_FOR_MEMORY)
        assert s.backend.snapshot().note == WAITS.replace("available", "available on the GPU")
        gpu.available = FREE
        await back(s)


async def test_one_that_does_not_use_the_gpu_is_not_held_up_by_it() -> None:
    gpu = Machine(FULL, Place.DEVICE, lists=False)
    async with on(gpu) as s:
        await s.ready()
        await until(lambda: len(gpu.looks) >= 2, "at the launch and when it was ready")
        os.kill(s.pid, SIGKILL)
        await back(s)
        assert State.WAITING_FOR_MEMORY not in s.states


async def test_where_the_driver_lists_nobody_what_there_was_before_the_launch_tells_who_is_to_blame() -> None:
    gpu = Machine(FULL, Place.DEVICE, lists=False)
    async with on(gpu) as s:
        await s.ready()
        lease, exchange = s.ask("FAKE fail=wedge-0.32 say=cuda after=0")
        failure = await broken(lease, exchange, started=False)
        assert (failure.verdict.blame, failure.suspect) == (Blame.MACHINE, False)
        await s.state(State.WAITING_FOR_MEMORY)
        gpu.available = FREE
        await back(s)


async def test_a_stop_ends_the_wait() -> None:
    async with on(Machine()) as s:
        await s.ready()
        lease, exchange = s.ask("FAKE metal-oom after=0")
        await broken(lease, exchange, started=False)
        await waits(s)
        s.backend.command(Stop())
        await s.state(State.STOPPED)


async def test_a_look_that_takes_too_long_is_not_waited_for_by_the_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    async with on(Machine()) as s:

        async def hang(*_: object, **__: object) -> str:
            await asyncio.sleep(100.0)
            return "never"

        monkeypatch.setattr(s.backend._blame, "_within", HURRIED.exit_wait)
        monkeypatch.setattr(s.runtime.scheduler, "crowded_out", hang)
        await s.ready()
        lease, exchange = s.ask("FAKE oom-0.32 after=0")
        failure = await broken(lease, exchange, started=False)
        assert (failure.verdict.cause, failure.verdict.blame) == (Cause.OOM, Blame.BACKEND)


async def test_nobody_is_admitted_to_a_process_whose_end_is_being_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    async with on(Machine()) as s:
        free: list[tuple[State, bool]] = []
        look = s.runtime.scheduler.crowded_out

        async def noted(*args: object, **more: object) -> str:
            free.append((s.backend.state, s.backend.has_slot()))
            return await look(*args, **more)  # type: ignore[arg-type]

        monkeypatch.setattr(s.runtime.scheduler, "crowded_out", noted)
        await s.ready()
        lease, exchange = s.ask("FAKE metal-oom after=0")
        await broken(lease, exchange, started=False)
        assert free == [(State.READY, False)]

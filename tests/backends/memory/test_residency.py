"""Models that come and go: asleep until they are needed, unloaded when nobody uses them, begun anew when too large."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from signal import SIGKILL
from typing import Any

import pytest

from backends.admission.lease import Lease
from backends.domain.failure import Cause, Reason
from backends.domain.refusal import Refusal, Why
from backends.domain.spec import BackendSpec, Launch, RestartPolicy
from backends.domain.state import State
from backends.fleet import Fleet, ModelPlan
from backends.memory.scheduler import MemoryScheduler
from backends.replica.events import Drain, Recycle, Restart, Start, Stop
from backends.replica.supervised import SupervisedReplica
from tests.lives import MODEL, Register, fake, runtime, until
from tests.stage import LONG, QUICK

MB = 2**20


def model(name: str, *, replicas: int = 1, mode: str = "", **more: Any) -> ModelPlan:
    launch = Launch((*fake(mode), "--served", name))
    specs = [
        BackendSpec(f"{name}:{i}", name, i, MODEL, launch, timeouts=LONG, restart=QUICK, **more)
        for i in range(replicas)
    ]
    return ModelPlan(name, tuple(specs), 10, 20.0)


@asynccontextmanager
async def running(
    *plans: ModelPlan, budget: int | None = None, register: Register | None = None
) -> AsyncIterator[Fleet]:
    register = register or Register()
    around = runtime(register)
    scheduler = MemoryScheduler(clock=around.clock, available=lambda: 2**40, budget=budget)
    fleet = Fleet(plans, replace(around, scheduler=scheduler))
    fleet.start()
    try:
        yield fleet
    finally:
        await fleet.close()
    assert register.now == {}


def one(fleet: Fleet, name: str) -> SupervisedReplica:
    found = fleet.backends[name]
    assert isinstance(found, SupervisedReplica)
    return found


def state(fleet: Fleet, name: str) -> State:
    return fleet.backends[name].state


def backend_restarts(fleet: Fleet) -> int:
    return one(fleet, "a:0").snapshot().restarts


async def leased(fleet: Fleet, name: str) -> Lease:
    lease = await fleet.pools[name].acquire()
    assert isinstance(lease, Lease)
    return lease


async def test_what_is_loaded_on_demand_is_loaded_by_the_first_request() -> None:
    async with running(model("a", on_demand=True), model("b")) as fleet:
        assert (one(fleet, "a:0").unloaded, state(fleet, "a:0")) == (True, State.UNLOADED)
        assert state(fleet, "b:0") is State.STARTING
        loading = asyncio.ensure_future(leased(fleet, "a"))
        await asyncio.sleep(0)
        snapshot = one(fleet, "a:0").snapshot()
        assert snapshot.loading is not None
        assert (snapshot.unloaded, snapshot.loading.expected) == (False, None)
        (await loading).release()
        assert one(fleet, "a:0").snapshot().loading is None


async def test_what_nobody_uses_is_unloaded_and_the_next_request_has_it_back() -> None:
    async with running(model("a", idle_unload=0.2)) as fleet:
        backend = one(fleet, "a:0")
        await until(lambda: backend.state is State.READY)
        lease = await leased(fleet, "a")
        await asyncio.sleep(0.4)
        assert backend.state is State.READY, "a request is in flight"
        lease.release()
        await until(lambda: backend.state is State.UNLOADED)
        (await leased(fleet, "a")).release()
        snapshot = backend.snapshot()
        assert (snapshot.generation, snapshot.last_failure) == (2, None)
        assert snapshot.restarts == 0, "it was only needed again"


async def test_one_that_somebody_stopped_stays_stopped() -> None:
    async with running(model("a", on_demand=True)) as fleet:
        backend = one(fleet, "a:0")
        (await leased(fleet, "a")).release()
        backend.command(Stop())
        await until(lambda: backend.state is State.STOPPED)
        assert not backend.unloaded
        refused = await fleet.pools["a"].acquire()
        assert isinstance(refused, Refusal)
        assert refused.why is Why.UNAVAILABLE
        backend.command(Start())
        await until(lambda: backend.state is State.READY)


async def test_loading_and_unloading_by_name() -> None:
    async with running(model("a", replicas=2, on_demand=True)) as fleet:
        assert fleet.load("a")
        await until(lambda: {state(fleet, "a:0"), state(fleet, "a:1")} == {State.READY})
        assert not fleet.load("a")
        assert fleet.unload("a")
        await until(lambda: {state(fleet, "a:0"), state(fleet, "a:1")} == {State.UNLOADED})
        assert not fleet.unload("a")
        assert fleet.pools["a"].unloaded()


async def test_unloading_lets_requests_finish_and_one_more_calls_it_off() -> None:
    async with running(model("a", on_demand=True)) as fleet:
        backend = one(fleet, "a:0")
        lease = await leased(fleet, "a")
        assert fleet.unload("a")
        assert (backend.state, backend.unloaded) == (State.DRAINING, True)
        second = await leased(fleet, "a")
        assert (backend.state, second.generation) == (State.READY, 1)
        assert fleet.unload("a")
        lease.release()
        assert backend.state is State.DRAINING
        second.release()
        await until(lambda: backend.state is State.UNLOADED)


async def test_loading_by_name_starts_what_has_given_up_too() -> None:
    async with running(model("a")) as fleet:
        backend = one(fleet, "a:0")
        backend.command(Stop())
        await until(lambda: backend.state is State.STOPPED)
        assert fleet.load("a")
        await until(lambda: backend.state is State.READY)


async def test_a_request_while_it_is_being_unloaded_brings_it_back() -> None:
    async with running(model("a", on_demand=True)) as fleet:
        (await leased(fleet, "a")).release()
        fleet.unload("a")
        assert state(fleet, "a:0") is State.STOPPING
        lease = await leased(fleet, "a")
        assert lease.generation == 2
        lease.release()
        assert backend_restarts(fleet) == 0
        one(fleet, "a:0").command(Restart())
        await until(lambda: backend_restarts(fleet) == 1)


async def test_no_room_is_no_failure_and_is_looked_for_again_by_the_next_request() -> None:
    async with running(model("a", memory=300 * MB), model("b", on_demand=True, memory=300 * MB), budget=500 * MB) as f:
        backend = one(f, "b:0")
        await until(lambda: state(f, "a:0") is State.READY)
        for generation in (1, 2):
            refused = await f.pools["b"].acquire()
            assert isinstance(refused, Refusal)
            snapshot = backend.snapshot()
            assert (snapshot.state, snapshot.generation) == (State.UNLOADED, generation)
            assert snapshot.last_failure is not None
            assert (snapshot.last_failure.cause, snapshot.last_failure.reason) == (
                Cause.LOAD_FAILURE,
                Reason.NO_MEMORY,
            )
        one(f, "a:0").command(Stop())
        await until(lambda: state(f, "a:0") is State.STOPPED)
        (await leased(f, "b")).release()


async def test_one_that_nobody_needed_any_more_is_not_denied() -> None:
    async with running(model("a", on_demand=True)) as fleet:
        backend = one(fleet, "a:0")
        backend.load()  # for a request that is gone when it is its turn
        await until(lambda: backend.state is State.UNLOADED)
        assert (backend.recently_denied, backend.snapshot().last_failure) == (False, None)


async def test_one_that_has_to_stay_asks_again_by_itself() -> None:
    async with running(model("a", memory=300 * MB), model("b", memory=300 * MB), budget=500 * MB) as f:
        await until(lambda: State.READY in (state(f, "a:0"), state(f, "b:0")))
        first, second = ("a:0", "b:0") if state(f, "a:0") is State.READY else ("b:0", "a:0")
        await until(lambda: state(f, second) is State.WAITING_FOR_MEMORY)
        one(f, first).command(Stop())
        await until(lambda: state(f, second) is State.READY)
        assert one(f, second).snapshot().restarts == 0, "it was not launched before"


@pytest.mark.parametrize("replicas", [1, 2])
async def test_one_that_grows_too_large_is_begun_anew_between_requests(
    replicas: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    takes: dict[int, int] = {}
    monkeypatch.setattr("backends.memory.host.footprint", lambda pid: takes.get(pid, 50 * MB))
    async with running(model("a", replicas=replicas, memory=100 * MB)) as fleet:
        backend = one(fleet, "a:0")
        await until(lambda: all(b.state is State.READY for b in fleet.backends.values()))
        await until(lambda: backend.residency.size_when_ready == 50 * MB)
        lease = backend.admit()
        pid = backend.snapshot().pid
        assert pid is not None
        takes[pid] = 101 * MB
        await until(lambda: backend.memory == 101 * MB and (replicas == 1 or backend.state is State.DRAINING))
        await asyncio.sleep(0.1)
        assert backend.generation == 1, "not under a request"
        assert backend.has_slot() == (replicas == 1), "while another can take them, it gets no more"
        lease.release()
        await until(lambda: backend.generation == 2 and backend.state is State.READY)
        await asyncio.sleep(0.1)
        assert (backend.generation, backend.has_slot()) == (2, True)


async def test_those_in_line_are_served_when_it_takes_requests_again() -> None:
    async with running(model("a")) as fleet:
        backend = one(fleet, "a:0")
        await until(lambda: backend.state is State.READY)
        lease = await leased(fleet, "a")
        backend.evict()
        waiting = asyncio.ensure_future(leased(fleet, "a"))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        backend.keep()
        lease.release()
        (await asyncio.wait_for(waiting, 1)).release()


async def test_one_that_was_too_large_from_the_start_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("backends.memory.host.footprint", lambda _: 50 * MB)
    async with running(model("a", memory=MB)) as fleet:
        backend = one(fleet, "a:0")
        (await leased(fleet, "a")).release()
        await until(lambda: backend.residency.size_when_ready == 50 * MB)
        await asyncio.sleep(0.1)
        assert (backend.generation, backend.state) == (1, State.READY)


# -- the replicas of a model in use ------------------------------------------------------------------------------------


def all_ready(fleet: Fleet) -> bool:
    return {b.state for b in fleet.backends.values()} == {State.READY}


async def test_the_second_replica_is_loaded_also_when_the_first_has_answered_all_requests() -> None:
    async with running(model("a", replicas=2, on_demand=True, memory=300 * MB), budget=700 * MB) as fleet:
        (await leased(fleet, "a")).release()  # 2 * 300 MB are not free, so they load one after the other
        await until(lambda: all_ready(fleet))


async def test_a_replica_that_died_while_its_model_is_in_use_comes_back() -> None:
    slow = RestartPolicy(min_backoff=0.3, max_backoff=0.3, max_failures=100)
    plan = model("a", replicas=2, on_demand=True)
    plan = replace(plan, replicas=tuple(replace(spec, restart=slow) for spec in plan.replicas))
    async with running(plan) as fleet:
        loading = asyncio.ensure_future(leased(fleet, "a"))
        await until(lambda: one(fleet, "a:0").snapshot().pid)
        await killed(fleet, "a:0")
        (await loading).release()
        assert state(fleet, "a:1") is State.READY
        await until(lambda: all_ready(fleet))


async def test_a_replica_that_found_no_memory_is_missing_and_is_loaded_when_there_is_some() -> None:
    plans = model("a", replicas=2, on_demand=True, memory=300 * MB), model("b", memory=300 * MB)
    async with running(*plans, budget=700 * MB) as fleet:
        await until(lambda: state(fleet, "b:0") is State.READY)
        (await leased(fleet, "a")).release()
        await until(lambda: {state(fleet, f"a:{i}") for i in (0, 1)} == {State.READY, State.UNLOADED})
        absent = next(b for b in fleet.snapshots("a") if b.state is State.UNLOADED)
        assert absent.missing
        assert absent.note == "not loaded: it is loaded as soon as enough memory is free"
        await asyncio.sleep(0.1)
        assert one(fleet, absent.id).generation == absent.generation, "it is not tried in vain"
        one(fleet, "b:0").command(Stop())
        await until(lambda: all(b.state is State.READY for b in fleet.snapshots("a")))


async def test_a_replica_that_gets_no_request_stays_while_its_model_is_in_use() -> None:
    async with running(model("a", replicas=2, on_demand=True, idle_unload=0.2)) as fleet:
        lease = await leased(fleet, "a")
        await until(lambda: all_ready(fleet))
        await asyncio.sleep(0.4)
        assert all_ready(fleet), "one of them is needed for failover"
        lease.release()
        await until(lambda: {b.state for b in fleet.backends.values()} == {State.UNLOADED})


async def test_a_replica_whose_model_is_not_in_use_stays_unloaded() -> None:
    async with running(model("a", replicas=2, on_demand=True)) as fleet:
        (await leased(fleet, "a")).release()
        await until(lambda: all_ready(fleet))
        one(fleet, "a:0").unload()
        await until(lambda: state(fleet, "a:0") is State.UNLOADED)
        await asyncio.sleep(0.1)
        assert state(fleet, "a:0") is State.UNLOADED, "unloaded on purpose"
        one(fleet, "a:1").evict()
        await until(lambda: state(fleet, "a:1") is State.UNLOADED)
        await asyncio.sleep(0.1)
        assert {b.state for b in fleet.backends.values()} == {State.UNLOADED}


async def test_a_load_that_no_request_waits_for_any_more_makes_room_for_another_model() -> None:
    endless = model("a", on_demand=True, memory=300 * MB, mode="load=slow load-time=600")
    async with running(endless, model("b", on_demand=True, memory=300 * MB), budget=500 * MB) as fleet:
        gone = asyncio.ensure_future(fleet.pools["a"].acquire())
        await until(lambda: one(fleet, "a:0").snapshot().pid)
        waiting = asyncio.ensure_future(leased(fleet, "b"))
        await until(lambda: state(fleet, "b:0") is State.WAITING_FOR_MEMORY)
        gone.cancel()
        (await asyncio.wait_for(waiting, 20)).release()
        assert one(fleet, "a:0").snapshot().last_failure is None
        assert state(fleet, "a:0") is State.UNLOADED


# -- demand keeps the history ------------------------------------------------------------------------------------------


async def test_a_model_that_cannot_load_does_not_evict_a_healthy_one_again_and_again() -> None:
    healthy = model("a", on_demand=True, memory=300 * MB)
    broken = model("b", on_demand=True, memory=300 * MB, mode="exit-at-start")
    async with running(healthy, broken, budget=500 * MB) as fleet:
        (await leased(fleet, "a")).release()
        for _ in range(5):
            assert isinstance(await fleet.pools["b"].acquire(), Refusal)
            await until(lambda: state(fleet, "b:0") is State.UNLOADED)
            (await leased(fleet, "a")).release()
        snapshot = one(fleet, "b:0").snapshot()
        assert snapshot.last_failure is not None
        assert (snapshot.last_failure.cause, snapshot.restarts) == (Cause.DEPENDENCY, 0), "that is what is to be mended"
        assert one(fleet, "a:0").generation == 2, "it was evicted once"


async def test_a_model_never_launched_has_no_restarts() -> None:
    nowhere = replace(Launch(fake()), model_folder="/nowhere")
    spec = BackendSpec("a:0", "a", 0, MODEL, nowhere, timeouts=LONG, restart=QUICK, on_demand=True)
    async with running(ModelPlan("a", (spec,), 10, 20.0)) as fleet:
        for _ in range(2):
            assert fleet.load("a")
            await until(lambda: state(fleet, "a:0") is State.FAILED)
        snapshot = one(fleet, "a:0").snapshot()
        assert (snapshot.generation, snapshot.restarts) == (2 * QUICK.max_failures, 0)


async def test_a_load_while_draining_does_not_hide_a_later_crash() -> None:
    async with running(model("a", on_demand=True)) as fleet:
        backend = one(fleet, "a:0")
        lease = await leased(fleet, "a")
        backend.command(Drain())
        assert fleet.load("a")
        lease.release()
        pid = backend.snapshot().pid
        assert pid is not None
        os.kill(pid, SIGKILL)
        await until(lambda: backend.generation == 2 and backend.state is State.READY)
        assert backend.snapshot().restarts == 1


async def test_a_stop_while_waiting_for_memory_launches_no_process() -> None:
    register = Register()
    async with running(
        model("a", on_demand=True, memory=300 * MB), model("b", on_demand=True, memory=300 * MB),
        budget=500 * MB, register=register,
    ) as fleet:  # fmt: skip
        lease = await leased(fleet, "a")
        waiting = asyncio.ensure_future(fleet.pools["b"].acquire())
        backend = one(fleet, "b:0")
        await until(lambda: backend.state is State.WAITING_FOR_MEMORY)
        loading = backend.snapshot().loading
        assert loading is not None
        assert loading.phase == "waits for other models to be unloaded"
        backend.command(Stop())
        await until(lambda: backend.state is State.STOPPED)
        assert len(register.ever) == 1, "only a was launched"
        assert isinstance(await waiting, Refusal)
        lease.release()


async def killed(fleet: Fleet, name: str) -> None:
    pid = one(fleet, name).snapshot().pid
    assert pid is not None
    os.kill(pid, SIGKILL)


async def test_an_eager_replica_that_dies_while_it_is_recycled_comes_back() -> None:
    async with running(model("a", replicas=2)) as fleet:
        await until(lambda: {b.state for b in fleet.backends.values()} == {State.READY})
        lease = one(fleet, "a:0").admit()
        one(fleet, "a:0").post(Recycle())
        assert state(fleet, "a:0") is State.DRAINING
        await killed(fleet, "a:0")
        await until(lambda: one(fleet, "a:0").generation == 2 and state(fleet, "a:0") is State.READY)
        lease.release()


async def test_a_model_that_died_idle_does_not_evict_the_one_in_use() -> None:
    slow = replace(QUICK, min_backoff=0.5, max_backoff=0.5)
    first = model("a", on_demand=True, memory=300 * MB)
    first = replace(first, replicas=tuple(replace(spec, restart=slow) for spec in first.replicas))
    async with running(first, model("b", on_demand=True, memory=300 * MB), budget=500 * MB) as fleet:
        (await leased(fleet, "a")).release()
        await killed(fleet, "a:0")
        await until(lambda: state(fleet, "a:0") is State.BACKOFF)
        (await leased(fleet, "b")).release()
        await until(lambda: state(fleet, "a:0") is State.UNLOADED)
        assert (state(fleet, "b:0"), one(fleet, "b:0").generation) == (State.READY, 1)
        (await leased(fleet, "a")).release()


async def test_an_evicted_model_that_dies_comes_back_for_those_in_line() -> None:
    async with running(model("a", on_demand=True)) as fleet:
        backend = one(fleet, "a:0")
        lease = await leased(fleet, "a")
        backend.evict()
        waiting = asyncio.ensure_future(fleet.pools["a"].acquire())
        await asyncio.sleep(0)
        await killed(fleet, "a:0")
        lease.release()
        granted = await waiting
        assert isinstance(granted, Lease)
        assert granted.generation == 2
        granted.release()


async def test_an_old_failure_does_not_keep_a_model_from_evicting_another(tmp_path: Path) -> None:
    forgiving = replace(QUICK, window=0.3)
    once = model("b", on_demand=True, memory=300 * MB, mode=f"load=exit exit=-9 once={tmp_path / 'failed'}")
    once = replace(once, replicas=tuple(replace(spec, restart=forgiving) for spec in once.replicas))
    async with running(model("a", on_demand=True, memory=300 * MB), once, budget=500 * MB) as fleet:
        waiting = asyncio.ensure_future(fleet.pools["b"].acquire())
        await until(lambda: one(fleet, "b:0").snapshot().last_failure is not None)
        waiting.cancel()
        fleet.unload("b")
        (await leased(fleet, "a")).release()
        await until(lambda: not one(fleet, "b:0").failing)
        (await leased(fleet, "b")).release()


async def test_a_person_unloads_a_model_that_is_loading_or_backing_off() -> None:
    async with running(model("a", on_demand=True, mode="slow-load")) as fleet:
        waiting = asyncio.ensure_future(fleet.pools["a"].acquire())
        await until(lambda: one(fleet, "a:0").snapshot().pid)
        assert fleet.unload("a")
        await until(lambda: state(fleet, "a:0") is State.UNLOADED)
        assert isinstance(await waiting, Refusal)

"""All models together: brought up, shown, brought down, and the reaper kept alive beside them."""

import os
from dataclasses import replace
from pathlib import Path
from signal import SIGKILL

import psutil
import pytest

from backends.domain.spec import BackendSpec, Launch, Remote, Timeouts
from backends.domain.state import State
from backends.fleet import Fleet, ModelPlan
from backends.process.reaper_control import ReaperHandle
from backends.process.run_record import RunRecord
from backends.replica.events import Start
from backends.replica.remote import RemoteReplica
from backends.replica.supervised import SupervisedReplica
from tests.lives import MODEL, Register, alive, fake, runtime, until

pytestmark = pytest.mark.usefixtures("nothing_left")


def model(name: str, *targets: Launch | Remote) -> ModelPlan:
    specs = [BackendSpec(f"{name}:{i}", name, i, MODEL, target) for i, target in enumerate(targets)]
    return ModelPlan(name, tuple(specs), max_queue=3, queue_timeout=5.0)


OURS = Launch(fake())
FAR = Remote("http://127.0.0.1:9")


async def test_every_plan_becomes_a_pool_in_the_order_of_the_config() -> None:
    fleet = Fleet([model("b", OURS, FAR), model("a", FAR)], runtime())
    assert list(fleet.pools) == ["b", "a"]
    assert list(fleet.backends) == ["b:0", "b:1", "a:0"]
    assert isinstance(fleet.backends["b:0"], SupervisedReplica)
    assert isinstance(fleet.backends["b:1"], RemoteReplica)
    assert [backend.id for backend in fleet.pools["b"].backends] == ["b:0", "b:1"]
    assert [s.id for s in fleet.snapshots()] == ["b:0", "b:1", "a:0"]
    assert [s.id for s in fleet.snapshots("a")] == ["a:0"]
    assert fleet.snapshots("other") == []
    assert {s.state for s in fleet.snapshots()} == {State.STOPPED}
    await fleet.close()


async def test_start_begins_all_and_close_ends_all() -> None:
    register = Register()
    fleet = Fleet([model("a", OURS, OURS), model("far", FAR)], runtime(register))
    fleet.start()
    assert {s.state for s in fleet.snapshots()} == {State.STARTING}
    await until(lambda: all(s.state is State.READY for s in fleet.snapshots("a")))
    await until(lambda: fleet.backends["far:0"].state is State.UNREACHABLE)
    urls = {s.url for s in fleet.snapshots()}
    assert len(urls) == 3
    assert sorted(register.now.values()) == ["a:0", "a:1"]
    await fleet.close()
    assert {s.state for s in fleet.snapshots()} == {State.STOPPED}
    assert register.now == {}
    assert not any(alive(pid) for pid in register.ever)


async def test_kill_waits_for_nobody() -> None:
    register = Register()
    plan = model("a", Launch(fake("ignore-sigterm")), FAR)
    patient = replace(plan, replicas=tuple(replace(spec, timeouts=Timeouts(stop=600.0)) for spec in plan.replicas))
    fleet = Fleet([patient], runtime(register))
    fleet.start()
    await until(lambda: fleet.backends["a:0"].state is State.READY)
    fleet.kill()
    await until(lambda: not any(alive(pid) for pid in register.ever))
    await fleet.close()


async def test_a_reaper_that_dies_is_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_record = RunRecord(tmp_path)
    reaper = ReaperHandle(run_record, retry=0.0)
    fleet = Fleet([], runtime(), reaper)
    fleet.start()
    first = reaper.pid
    assert first is not None
    os.kill(first, SIGKILL)
    await until(lambda: reaper.pid != first)
    assert reaper.pid is not None
    assert psutil.pid_exists(reaper.pid)
    await fleet.close()
    run_record.close()
    await reaper.close()


async def test_a_backend_of_a_fleet_serves_its_pool() -> None:
    fleet = Fleet([model("a", OURS)], runtime())
    fleet.backends["a:0"].command(Start())
    lease = await fleet.pools["a"].acquire()
    assert lease.spec.id == "a:0"  # type: ignore[union-attr]
    lease.release()  # type: ignore[union-attr]
    await fleet.close()


async def test_a_replica_whose_end_fails_keeps_no_other_from_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    register = Register()
    fleet = Fleet([model("a", OURS, OURS)], runtime(register))
    fleet.start()
    await until(lambda: all(s.state is State.READY for s in fleet.snapshots()))
    last = fleet.backends["a:1"]
    close = last.close

    async def faulty() -> None:
        raise KeyError("bug")

    monkeypatch.setattr(last, "close", faulty)
    with pytest.raises(ExceptionGroup, match="not closed properly") as caught:
        await fleet.close()
    assert [type(error) for error in caught.value.exceptions] == [KeyError]
    assert fleet.backends["a:0"].state is State.STOPPED
    assert len(fleet._tasks) == 0
    await close()
    assert register.now == {}

"""The actor of one backend, with real child processes: what each command and each way to die leads to."""

import asyncio
import errno
import logging
import os
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from signal import SIGKILL
from typing import Any

import psutil
import pytest

from backends.admission.inflight import InFlight
from backends.domain.engine_command import ReleasePool, encoded
from backends.domain.failure import Aftermath, Blame, Cause, Failure
from backends.domain.report import EngineReport
from backends.domain.secrets import Secrets
from backends.domain.spec import BackendSpec, Launch, RestartPolicy
from backends.domain.state import State
from backends.memory.occupancy import Holder, Occupancy, Place
from backends.memory.past_lives import PastLives
from backends.memory.reclaim import PATIENCE
from backends.memory.scheduler import Resident
from backends.process import ports
from backends.process.child import ChildProcess
from backends.process.output import Ring
from backends.replica import liveness
from backends.replica.events import Drain, Restart, Start, Stop
from backends.replica.instance import Instance
from backends.replica.launch import Launcher
from backends.replica.supervised import SupervisedReplica
from tests.lives import HURRIED, MODEL, alive, fake, runtime, until
from tests.stage import LONG, QUICK, Scene, broken, rest, scene

pytestmark = pytest.mark.usefixtures("nothing_left")


# -- an instance -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_mlx", [True, False])
async def test_from_start_to_close(is_mlx: bool) -> None:
    async with scene(is_mlx=is_mlx) as s:
        before = s.backend.snapshot()
        assert (before.state, before.pid, before.url, before.restarts) == (State.STOPPED, None, None, 0)
        assert (s.backend.is_up_or_starting, s.backend.has_slot(), s.backend.responsive) == (False, False, False)
        assert s.backend.command(Start()) is None
        assert (s.backend.is_up_or_starting, s.backend.has_slot()) == (True, False)
        await s.state(State.READY)
        await until(lambda: s.backend.responsive and s.backend.snapshot().memory)
        now = s.backend.snapshot()
        assert (now.generation, now.restarts, now.eta, now.last_failure, now.note) == (1, 0, 0.0, None, "")
        assert now.url == f"http://127.0.0.1:{next(iter(s.runtime.ports))}"
        assert s.register.now == {now.pid: "m:0"}
        lease, exchange = s.ask()
        assert (await exchange.start()).status == 200
        assert b"[DONE]" in await rest(exchange)
        exchange.close()
        lease.release()
        assert s.backend.command(Start()) == "it is ready already"
        assert not any("/health" in line for line in s.backend.output.tail(100)), "our probes are not kept"
    assert s.states == [State.STARTING, State.READY, State.STOPPING, State.STOPPED]
    assert s.backend.snapshot().last_failure is None


async def test_slots_are_bounded_and_only_on_a_life() -> None:
    async with scene() as s:
        with pytest.raises(RuntimeError, match="m:0 has no process"):
            s.backend.admit()
        await s.ready()
        leases = [s.backend.admit() for _ in range(2)]
        assert (s.backend.has_slot(), s.backend.inflight, s.backend.snapshot().inflight) == (False, 2, 2)
        for lease in leases:
            lease.release()
        assert s.backend.has_slot()


async def test_one_that_is_killed_comes_back_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="backends.replica.supervised")
    async with scene() as s:
        await s.ready()
        first = s.pid
        os.kill(first, SIGKILL)
        await s.state(State.READY, generation=2)
        now = s.backend.snapshot()
        assert (now.restarts, now.pid == first) == (1, False)
        assert (s.failure.cause, s.failure.exit, s.failure.generation) == (Cause.KILLED, -SIGKILL, 1)
        assert s.failure.aftermath is Aftermath.EXITED
        assert now.last_failure_at is not None
        assert now.last_failure_at <= now.since
        assert s.register.now == {now.pid: "m:0"}
    assert s.states[:4] == [State.STARTING, State.READY, State.STOPPING, State.BACKOFF]
    (record,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    told = record.__dict__
    assert (told["backend"], told["state"], told["cause"], told["exit"]) == ("m:0", "stopping", "killed", -SIGKILL)
    (waits,) = [r.__dict__ for r in caplog.records if r.__dict__.get("state") == "backoff"]
    assert waits["retry_in"] >= 0


TELLING = """
import json, os, socket, sys, threading
channel = socket.socket(fileno=int(os.environ.pop("MLX_GATEWAY_CHANNEL")))
def report(active):
    channel.sendall(json.dumps({"active": active, "pooled": 0, "peak": 9, "generating": True}).encode() + b"\\n")
def listen():
    while command := channel.recv(1000):
        report(len(command))
report(3)
threading.Thread(target=listen, daemon=True).start()
sys.argv = sys.argv[1:]
import runpy
runpy.run_path(sys.argv[0], run_name="__main__")
"""


async def test_a_process_with_an_instrument_is_heard_and_told() -> None:
    python, *program = fake()
    async with scene(Launch((python, "-c", TELLING, *program), instrumented=True)) as s:
        assert (s.backend.report, s.backend.tell(ReleasePool())) == (None, False)
        await s.ready()
        await until(lambda: s.backend.report == EngineReport(active=3, pooled=0, peak=9, generating=True))
        assert s.backend.snapshot().report == s.backend.report
        assert s.backend.tell(ReleasePool())
        await until(lambda: s.backend.report is not None and s.backend.report.active == len(encoded(ReleasePool())))
        channel = s.backend._instance.channel if s.backend._instance else None
        os.kill(s.pid, SIGKILL)
        await s.state(State.READY, generation=2)
        assert channel is not None
        assert not channel.tell(ReleasePool()), "it is closed"
    assert s.backend.report is None


async def test_no_descriptor_is_left_for_a_channel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The start is tried again, and nothing of the first try is left (``scene`` looks for ports and records)."""
    python, *program = fake()
    pair, tries = socket.socketpair, iter([OSError(errno.EMFILE, "Too many open files"), None])

    def scarce() -> tuple[socket.socket, socket.socket]:
        if (error := next(tries, None)) is not None:
            raise error
        return pair()

    monkeypatch.setattr("backends.process.channel.socket.socketpair", scarce)
    async with scene(Launch((python, "-c", TELLING, *program), instrumented=True)) as s:
        s.backend.command(Start())
        await until(lambda: s.backend.snapshot().last_failure)
        assert "no file descriptors left" in s.failure.message
        assert s.register.now == {}
        await s.state(State.READY, generation=2)


async def test_a_process_without_an_instrument_gets_no_channel() -> None:
    code = "import os, sys; assert 'MLX_GATEWAY_CHANNEL' not in os.environ; os.execv(sys.argv[1], sys.argv[1:])"
    async with scene(Launch((sys.executable, "-c", code, *fake()))) as s:
        await s.ready()
        assert (s.backend.report, s.backend.tell(ReleasePool())) == (None, False)


async def test_who_dies_again_and_again_is_crash_looping_and_comes_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each load is killed until the marker is there."""
    marker = tmp_path / "marker"
    killed = f"os.path.exists({str(marker)!r}) or os.kill(os.getpid(), 9)"
    code = f"import os, sys; {killed}; os.execv(sys.argv[1], sys.argv[1:])"
    restart = replace(QUICK, max_backoff=0.3, max_failures=2)
    async with scene(Launch((sys.executable, "-c", code, *fake())), restart=restart) as s:
        s.backend.command(Start())
        await until(lambda: s.backend.snapshot().crash_looping)
        await s.state(State.BACKOFF, generation=4)
        now = s.backend.snapshot()
        assert (now.crash_looping, now.restarts, now.note, s.backend.failing) == (True, 3, "", True)
        assert now.eta is not None
        assert s.failure.cause is Cause.KILLED
        assert ["crash_looping" in record.__dict__ for record in caplog.records] == [False, True, True, True]
        marker.touch()
        await s.state(State.READY)
        after = s.backend.snapshot()
        assert (after.crash_looping, s.backend.failing) == (False, False)
        assert State.FAILED not in s.states


async def test_what_counts_as_an_answer_of_a_life() -> None:
    """Neither a part of an answer nor a test of the gateway itself."""
    async with scene(restart=replace(QUICK, min_backoff=0.05, max_backoff=600.0, max_failures=100)) as s:
        await s.ready()

        async def dies(generation: int, *, completed: bool, internal: bool = False) -> int:
            lease, exchange = s.ask()
            lease.internal = internal
            assert (await exchange.start()).status == 200
            await rest(exchange)
            lease.completed = completed
            exchange.close()
            lease.release()
            os.kill(s.pid, SIGKILL)
            await s.state(State.READY, generation)
            return s.backend.snapshot().failed_lives

        assert await dies(2, completed=False) == 1
        assert await dies(3, completed=True, internal=True) == 2
        assert await dies(4, completed=True) == 0


async def test_what_is_left_of_its_group_goes_with_it() -> None:
    helper = "import signal; signal.signal(15, signal.SIG_IGN); print('up', flush=True); signal.pause()"
    code = (
        "import os, subprocess, sys; "
        f"p = subprocess.Popen([sys.executable, '-c', {helper!r}], stdout=subprocess.PIPE); "
        "p.stdout.readline(); print('child', p.pid, flush=True); os._exit(3)"
    )
    brief, once = replace(LONG, stop=0.1), replace(QUICK, min_backoff=600.0, max_backoff=600.0)
    async with scene(Launch((sys.executable, "-c", code)), restart=once, timeouts=brief) as s:
        s.backend.command(Start())
        await s.state(State.BACKOFF)
        (line,) = s.backend.output.tail(10)
        assert not alive(int(line.split()[1]))
        assert s.failure.exit == 3


# -- commands ----------------------------------------------------------------------------------------------------------


async def test_stop_and_start_again() -> None:
    async with scene() as s:
        await s.ready()
        pid = s.pid
        assert s.backend.command(Stop()) is None
        assert not s.backend.is_up_or_starting
        await s.state(State.STOPPED)
        assert not psutil.pid_exists(pid)
        assert s.backend.snapshot().last_failure is None
        await s.ready(generation=2)


async def test_restart_is_a_new_process_and_no_failure() -> None:
    async with scene() as s:
        await s.ready()
        pid = s.pid
        assert s.backend.command(Restart()) is None
        assert s.backend.is_up_or_starting, "it is on its way back"
        await s.state(State.READY, generation=2)
        assert s.pid != pid
        assert s.backend.snapshot().last_failure is None


async def test_drain_lets_requests_end_and_takes_no_more() -> None:
    async with scene() as s:
        assert "only a ready backend" in str(s.backend.command(Drain()))
        await s.ready()
        lease, exchange = s.ask()
        assert s.backend.command(Drain()) is None
        assert (s.backend.state, s.backend.has_slot()) == (State.DRAINING, False)
        await exchange.start()
        assert b"[DONE]" in await rest(exchange)
        exchange.close()
        assert s.backend.state is State.DRAINING
        lease.release()
        await s.state(State.STOPPED)
        await s.ready(generation=2)
        lease = s.backend.admit()
        s.backend.command(Drain())
        assert s.backend.command(Start()) is None, "a drain can be taken back"
        lease.release()
        assert s.backend.has_slot()
        s.backend.command(Drain())
        assert s.states[-1] is State.STOPPING, "nobody is in flight"


async def test_stop_while_it_loads() -> None:
    async with scene("load-time=60") as s:
        s.backend.command(Start())
        await until(lambda: any("Starting httpd" in line for line in s.backend.output.tail(10)))
        s.backend.command(Stop())
        await s.state(State.STOPPED)
        assert s.backend.snapshot().last_failure is None


async def test_stop_before_there_is_a_process() -> None:
    async with scene() as s:
        s.backend.command(Start())
        s.backend.command(Stop())
        assert (s.backend.state, s.backend.snapshot().pid) == (State.STOPPING, None)
        await s.state(State.STOPPED)
        assert s.register.ever == [], "no process was launched"


async def test_stop_while_it_backs_off() -> None:
    async with scene("load=exit exit=-9", restart=RestartPolicy(min_backoff=60.0)) as s:
        s.backend.command(Start())
        await s.state(State.BACKOFF)
        assert s.backend.snapshot().eta == pytest.approx(65.0, abs=5.0)
        s.backend.command(Stop())
        assert s.backend.state is State.STOPPED


# -- the end -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["never started", "spawning", "backing off", "stopping"])
async def test_close_at_any_moment_leaves_nothing(moment: str) -> None:
    mode = "load=exit exit=-9" if moment == "backing off" else "load-time=60"
    async with scene(mode, restart=RestartPolicy(min_backoff=60.0)) as s:
        if moment != "never started":
            s.backend.command(Start())
        if moment == "backing off":
            await s.state(State.BACKOFF)
        if moment == "stopping":
            await until(lambda: s.backend.snapshot().pid)
            s.backend.command(Stop())


async def test_close_ends_also_who_ignores_sigterm() -> None:
    async with scene("ignore-sigterm", timeouts=replace(LONG, stop=0.1)) as s:
        await s.ready()


async def test_one_that_has_failed_is_not_waited_for_as_long_as_one_that_is_stopped() -> None:
    cadence = replace(HURRIED, failed_stop=0.1)
    mode, timeouts = "load=slow load-time=60 ignore-sigterm", replace(LONG, start=0.3)
    async with scene(mode, timeouts=timeouts, restart=RestartPolicy(min_backoff=60.0), cadence=cadence) as s:
        s.backend.command(Start())
        await until(lambda: s.backend.state is State.BACKOFF, within=LONG.stop / 2)
        assert s.failure.cause is Cause.START_TIMEOUT


async def test_close_with_requests_in_flight_tells_them() -> None:
    async with scene() as s:
        await s.ready()
        lease, exchange = s.ask("FAKE stall")
        await exchange.start()
        failing = asyncio.ensure_future(broken(lease, exchange))
        await s.backend.close()
        failure = await failing
        assert (failure.verdict.blame, failure.verdict.aftermath) == (Blame.GATEWAY, Aftermath.EXITED)
        assert "stopped by the gateway" in failure.verdict.message


async def test_kill_asks_nobody() -> None:
    async with scene("ignore-sigterm", restart=RestartPolicy(min_backoff=60.0)) as s:
        s.backend.kill()
        await s.ready()
        pid = s.pid
        s.backend.kill()
        await until(lambda: not psutil.pid_exists(pid))


async def test_a_process_that_nothing_ends_does_not_hold_up_the_rest(caplog: pytest.LogCaptureFixture) -> None:
    cadence = replace(HURRIED, unkillable=0.0)
    one = Scene(Launch(fake("ignore-sigterm")), replace(LONG, stop=0.0), QUICK, cadence=cadence)
    await one.ready()
    pid = one.pid
    await one.backend.close()
    (record,) = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert (record.getMessage(), record.__dict__["pid"]) == ("process cannot be ended", pid)
    assert one.register.now == {pid: "m:0"}, "it stays on record as long as it lives"
    assert one.runtime.ports == set()
    os.kill(pid, SIGKILL)
    await until(lambda: not psutil.pid_exists(pid))


# -- starts that fail --------------------------------------------------------------------------------------------------


async def test_a_program_that_is_not_there() -> None:
    async with scene(Launch(("/no/such/program",))) as s:
        s.backend.command(Start())
        await s.state(State.FAILED)
        assert (s.failure.cause, s.failure.blame, s.failure.backend) == (Cause.DEPENDENCY, Blame.OPERATOR, "m:0")
        assert "/no/such/program" in s.failure.message
        assert s.register.ever == []


@pytest.mark.parametrize("port", [0, 9123])
async def test_a_host_that_is_not_ours(port: int) -> None:
    async with scene(Launch(fake(), host="203.0.113.7", port=port)) as s:
        s.backend.command(Start())
        await s.state(State.FAILED)
        assert s.failure.cause is Cause.DEPENDENCY
        assert "203.0.113.7" in s.failure.message


async def test_a_model_folder_that_is_not_there(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    async with scene(Launch(fake(), model_folder=str(folder))) as s:
        s.backend.command(Start())
        await s.state(State.FAILED)
        assert s.states == [State.STARTING, State.BACKOFF, State.STARTING, State.BACKOFF, State.STARTING, State.FAILED]
        now = s.backend.snapshot()
        assert (s.failure.cause, now.generation, now.eta) == (Cause.MODEL_NOT_FOUND, 3, None)
        assert now.note == "gave up: it has never been ready, and has failed 3 times in a row in the same way"
        assert str(folder) in s.failure.message
        assert s.register.ever == []
        put_there(folder)
        await s.ready(generation=4)


def put_there(folder: Path) -> None:
    folder.mkdir()
    (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")


@pytest.mark.parametrize(
    "restart", [QUICK, replace(QUICK, min_backoff=600.0, max_backoff=600.0)], ids=["failed", "backoff"]
)
@pytest.mark.parametrize("mend_retry", [0.05, 3600.0], ids=["in intervals", "at requests"])
async def test_a_model_folder_that_is_mounted_later(mend_retry: float, restart: RestartPolicy, tmp_path: Path) -> None:
    """It starts by itself, from back-off too: looked at in intervals, and at each request."""
    folder = tmp_path / "model"
    launch, cadence = Launch(fake(), model_folder=str(folder)), replace(HURRIED, mend_retry=mend_retry)
    async with scene(launch, cadence=cadence, restart=restart) as s:
        s.backend.command(Start())
        await s.state(State.FAILED if restart is QUICK else State.BACKOFF)
        before = s.backend.snapshot()
        for _ in range(100):  # it is looked at, and nothing has changed
            s.backend.look_again()
            await asyncio.sleep(0.002)
        assert (s.backend.state, s.backend.generation) == (before.state, before.generation)
        put_there(folder)
        s.backend.look_again()
        await s.state(State.READY, generation=before.generation + 1)


async def test_files_that_are_still_being_copied_are_waited_for(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    cadence = replace(HURRIED, mend_retry=0.01, mend_settle=0.1)
    async with scene(Launch(fake(), model_folder=str(folder)), cadence=cadence) as s:
        s.backend.command(Start())
        await s.state(State.FAILED)
        put_there(folder)
        with (folder / "copy").open("ab", buffering=0) as copy:
            for _ in range(40):
                copy.write(b"part")
                await asyncio.sleep(0.01)
                assert s.backend.state is State.FAILED
        await s.state(State.READY)


async def test_one_that_was_stopped_is_not_started_by_a_change(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    async with scene(Launch(fake(), model_folder=str(folder)), cadence=replace(HURRIED, mend_retry=0.01)) as s:
        s.backend.command(Start())
        await s.state(State.FAILED)
        s.backend.command(Stop())
        folder.mkdir()
        await asyncio.sleep(0.2)  # nothing else can show that nothing happens
        assert s.backend.state is State.STOPPED


async def test_a_port_that_is_taken_is_waited_for() -> None:
    port = ports.free_port("127.0.0.1")
    holder = await asyncio.start_server(lambda *_: None, "127.0.0.1", port)
    async with scene(Launch(fake(), port=port), restart=replace(QUICK, max_failures=1000)) as s:
        s.backend.command(Start())
        await s.state(State.BACKOFF)
        assert (s.failure.cause, s.failure.blame) == (Cause.PORT_IN_USE, Blame.MACHINE)
        assert f"port {port} is taken by" in s.failure.message
        assert f"(pid {os.getpid()})" in s.failure.message
        holder.close()
        await holder.wait_closed()
        await s.state(State.READY)
        assert s.backend.snapshot().url == f"http://127.0.0.1:{port}"


async def test_a_load_that_fails_is_given_up_with_its_reason() -> None:
    async with scene("load-failure") as s:
        s.backend.command(Start())
        await s.state(State.FAILED)
        assert (s.failure.cause, s.failure.backend, s.failure.generation) == (Cause.LOAD_FAILURE, "m:0", 3)
        assert s.failure.message.startswith("m:0 did not start: ")
        assert not psutil.pid_exists(s.register.ever[0])


async def test_one_that_exits_at_its_start() -> None:
    async with scene("exit-at-start") as s:
        s.backend.command(Start())
        await s.state(State.FAILED)
        assert (s.failure.cause, s.failure.exit) == (Cause.DEPENDENCY, 1)
        assert any("No module named" in line for line in s.failure.evidence)


# -- the watch ---------------------------------------------------------------------------------------------------------


async def test_a_fault_of_ours_leaves_nobody_unwatched(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    look, faults = liveness.assess, ["bug", "bug"]

    def faulty(*args: Any, **kwargs: Any) -> liveness.Finding:
        if faults:
            raise KeyError(faults.pop())
        return look(*args, **kwargs)

    monkeypatch.setattr(liveness, "assess", faulty)
    async with scene() as s:
        await s.ready()
        await until(lambda: not faults and s.backend.responsive)
        os.kill(s.pid, SIGKILL)
        await s.state(State.READY, generation=2)
    assert [r.getMessage() for r in caplog.records if r.exc_info] == ["liveness monitor failed, restarted"] * 2


async def test_a_fault_of_ours_after_an_exit_leaves_no_port_and_no_record(monkeypatch: pytest.MonkeyPatch) -> None:
    faults = ["bug"]
    of_exit = Instance.of_exit

    def faulty(instance: Instance, returncode: int) -> Failure:
        if faults:
            raise KeyError(faults.pop())
        return of_exit(instance, returncode)

    monkeypatch.setattr(Instance, "of_exit", faulty)
    async with scene() as s:
        await s.ready()
        before = set(s.runtime.ports)
        os.kill(s.pid, SIGKILL)
        await s.state(State.READY, generation=2)
        assert s.register.now == {s.pid: "m:0"}
        assert len(s.runtime.ports) == len(before)


async def test_a_fault_of_ours_while_it_runs_leaves_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    waits, faults = ChildProcess.wait, ["bug"]

    async def faulty(child: ChildProcess) -> int:
        if faults:
            raise KeyError(faults.pop())
        return await waits(child)

    monkeypatch.setattr(ChildProcess, "wait", faulty)
    async with scene("ignore-sigterm") as s:
        s.backend.command(Start())
        await s.state(State.READY, generation=2)
        assert s.register.now == {s.pid: "m:0"}
        assert len(s.runtime.ports) == 1
        assert not alive(s.register.ever[0])
        s.backend.kill()


async def test_its_size_is_measured_beside_the_event_loop_before_the_scheduler_is_asked() -> None:
    async with scene() as s:
        told: list[tuple[str, threading.Thread]] = []
        enter = s.runtime.scheduler.enter

        async def entering(resident: Resident, waits: Callable[[str], None]) -> Failure | None:
            told.append(("enter", threading.current_thread()))
            return await enter(resident, waits)

        object.__setattr__(s.runtime, "measure", lambda name: told.append((name, threading.current_thread())))
        s.runtime.scheduler.enter = entering  # type: ignore[method-assign]
        await s.ready()
    assert [name for name, _ in told] == ["m", "enter"]
    assert told[0][1] is not told[1][1]


async def test_what_the_files_tell_of_the_reading_of_prompts_is_assumed() -> None:
    """Before any prompt of another size has shown it."""
    reading = []
    for doubled in (1000.0, 30_000.0):
        async with scene() as s:
            object.__setattr__(s.runtime, "doubled", {"m": doubled}.get)
            await s.ready()
            s.backend.flight.reading.note(1000, 0, 1.0)
            reading.append(s.backend.flight.reading.seconds(20_000))
    assert reading[0] > 4 * reading[1]


async def test_two_that_launch_in_one_moment_get_two_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = [9001, 9001, 9001, 9002]
    monkeypatch.setattr(ports, "free_port", lambda *_: chosen.pop(0))
    world = runtime()
    specs = [BackendSpec(name, name, 0, MODEL, Launch(())) for name in "ab"]
    launchers = [
        Launcher(spec, Launch(()), world, ring=Ring(), inflight=InFlight(), past=PastLives(), sizes=dict)
        for spec in specs
    ]
    assert sorted(await asyncio.gather(*(one._reserved_port() for one in launchers))) == [9001, 9002]
    assert world.ports == {9001, 9002}
    monkeypatch.setattr(ports, "free_port", lambda *_: 9001)
    with pytest.raises(OSError, match="other launches"):
        await launchers[0]._reserved_port()


async def test_it_waits_until_the_memory_of_the_last_life_is_back() -> None:
    available = 8 << 30
    async with scene() as s:
        object.__setattr__(s.runtime.host, "available", lambda: available)
        await s.ready()
        assert s.backend._instance is not None
        s.backend._instance.memory.peak = 2 << 30
        available = 1 << 30
        os.kill(s.pid, SIGKILL)
        await until(lambda: s.backend.snapshot().note, "it says what it waits for")
        waiting = s.backend.snapshot()
        assert (waiting.state, waiting.pid) == (State.WAITING_FOR_MEMORY, None)
        assert waiting.note == "waits for memory: 1.0 GiB available, needs 2.2 GiB"
        available = 8 << 30
        await s.state(State.READY, generation=2)
        assert s.backend.snapshot().note == ""


async def test_it_says_who_holds_the_memory_and_waits_no_longer_than_since_the_end_of_the_last_life(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hog = Occupancy(Place.MACHINE, 16 << 30, 1 << 30, 9 << 30, Holder(4711, "hog", 9 << 30))
    async with scene() as s:
        monkeypatch.setattr(s.runtime.scheduler, "_occupancies", lambda place, _: hog if place is hog.place else None)
        object.__setattr__(s.runtime.host, "available", lambda: 8 << 30)
        await s.ready()
        assert s.backend._instance is not None
        s.backend._instance.memory.peak = 2 << 30
        object.__setattr__(s.runtime.host, "available", lambda: 1 << 30)
        os.kill(s.pid, SIGKILL)
        await until(lambda: s.backend.snapshot().note, "it waits")
        told = "waits for memory: 1.0 GiB available, needs 2.2 GiB; PID 4711 (hog) holds 9.0 GiB"
        assert s.backend.snapshot().note == told
        s.backend._launcher._ended_at -= PATIENCE
        await s.state(State.READY, generation=2)


async def test_it_can_be_stopped_while_it_waits_for_memory() -> None:
    async with scene() as s:
        object.__setattr__(s.runtime.host, "available", lambda: 8 << 30)
        await s.ready()
        assert s.backend._instance is not None
        s.backend._instance.memory.peak = 2 << 30
        object.__setattr__(s.runtime.host, "available", lambda: 0)
        os.kill(s.pid, SIGKILL)
        await until(lambda: s.backend.snapshot().note, "it waits")
        s.backend.command(Stop())
        await s.state(State.STOPPED)


async def test_a_secret_that_a_process_prints_is_kept_out_of_its_output_and_its_verdict() -> None:
    line = "ModuleNotFoundError: No module named 'mlx' (sk-secret)"
    launch = Launch(("sh", "-c", f'echo "{line}" >&2; exit 1'))
    spec = BackendSpec("m:0", "m", 0, MODEL, launch, secrets=Secrets(["sk-secret"]))
    backend = SupervisedReplica(spec, launch, runtime())
    backend.command(Start())
    await until(lambda: backend.snapshot().last_failure)
    await backend.close()
    failure = backend.snapshot().last_failure
    assert failure is not None
    assert failure.evidence == (line.replace("sk-secret", "***"),)
    assert "sk-secret" not in str(backend.output.tail(10))

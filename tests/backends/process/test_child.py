"""Real children, on asyncio's loop and on uvloop: what they say, how they end, and that nothing is left of them."""

import asyncio
import errno
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import uvloop

from backends.process import groups
from backends.process.child import ChildProcess, SpawnError, spawn
from backends.process.output import CUT_MARK, LineSplitter
from backends.process.pump import Splitter

PATIENCE = 30.0
LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}
PRELUDE = "import os, signal, sys, time\ndef say(text): os.write(1, f'{text}\\n'.encode())\n"
IGNORE_TERM = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"


def python(code: str) -> list[str]:
    return [sys.executable, "-I", "-S", "-c", PRELUDE + code]


def runs(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def await_status(pid: int, status: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while psutil.Process(pid).status() != status:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def await_end(pid: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while runs(pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def group(pid: int) -> int | None:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return None


class Bench:
    """Starts children and keeps what they say."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.children: list[ChildProcess] = []
        self.recorded: list[tuple[int, float]] = []
        self.record: Callable[[int, float], object] = lambda *told: self.recorded.append(told)
        self._spoke = asyncio.Event()

    def hear(self, line: str) -> None:
        self.lines.append(line)
        self._spoke.set()

    async def spawn(
        self, code: str, splitter: Callable[[], Splitter] = LineSplitter, *, mark: str = ""
    ) -> ChildProcess:
        child = await spawn(
            python(code), dict(os.environ), record=self.record, on_line=self.hear, splitter=splitter, mark=mark
        )
        self.children.append(child)
        return child

    async def last_byte_at(self, start: str) -> str:
        """The first line that begins so, as soon as it is there."""
        async with asyncio.timeout(PATIENCE):
            while True:
                for line in self.lines:
                    if line.startswith(start):
                        return line
                self._spoke.clear()
                await self._spoke.wait()

    async def pid(self, name: str) -> int:
        return int((await self.last_byte_at(f"{name} ")).split()[1])

    async def close(self) -> None:
        for child in self.children:
            await child.stop(0.0)


Run = Callable[[Callable[[Bench], Coroutine[Any, Any, None]]], None]


@pytest.fixture(params=list(LOOPS))
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    pids: list[int] = []
    faults: list[object] = []

    async def guarded(story: Callable[[Bench], Coroutine[Any, Any, None]]) -> None:
        bench = Bench()
        asyncio.get_running_loop().set_exception_handler(lambda _, context: faults.append(context))
        try:
            async with asyncio.timeout(PATIENCE * 2):
                await story(bench)
        finally:
            await bench.close()
            pids.extend(child.pid for child in bench.children)

    def runner(story: Callable[[Bench], Coroutine[Any, Any, None]]) -> None:
        with asyncio.Runner(loop_factory=LOOPS[request.param]) as one:
            one.run(guarded(story))

    yield runner
    assert faults == []
    assert not [pid for leader in pids for pid in psutil.pids() if group(pid) == leader and runs(pid)]


# -- how it ended -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [0, 1, 2, 127, 139, 255])
def test_an_exit_status_is_given_as_it_is(run: Run, status: int) -> None:
    async def story(bench: Bench) -> None:
        child = await bench.spawn(f"os._exit({status})")
        assert await child.wait() == status
        assert child.returncode == status
        assert not child.alive

    run(story)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGABRT, signal.SIGSEGV, signal.SIGTERM, signal.SIGINT])
def test_a_death_by_signal_is_given_as_its_negative(run: Run, number: signal.Signals) -> None:
    async def story(bench: Bench) -> None:
        child = await bench.spawn(
            f"signal.signal({number:d}, signal.SIG_DFL) if {number:d} != 9 else 0; os.kill(os.getpid(), {number:d})"
        )
        assert await child.wait() == -number

    run(story)


def test_while_it_runs_there_is_no_returncode_and_many_may_wait(run: Run) -> None:
    async def story(bench: Bench) -> None:
        child = await bench.spawn("say('up'); signal.pause()")
        await bench.last_byte_at("up")
        assert child.alive
        assert child.returncode is None
        first, second = asyncio.ensure_future(child.wait()), asyncio.ensure_future(child.wait())
        await asyncio.sleep(0)
        first.cancel()  # one that gives up waiting takes nothing from the other
        assert child.signal_session(signal.SIGKILL)
        assert await second == -9
        assert not child.signal_session(signal.SIGKILL)

    run(story)


# -- what it said -----------------------------------------------------------------------------------------------------


def test_last_words_of_both_streams_are_there_when_wait_returns(run: Run) -> None:
    async def story(bench: Bench) -> None:
        code = "os.write(1, b'one\\ntwo\\nout unfinished'); os.write(2, b'libc++abi: terminating'); os.abort()"
        child = await bench.spawn(code)
        assert await child.wait() == -signal.SIGABRT
        assert sorted(bench.lines) == ["libc++abi: terminating", "one", "out unfinished", "two"]

    run(story)


def test_a_progress_bar_is_heard_while_it_moves(run: Run) -> None:
    async def story(bench: Bench) -> None:
        await bench.spawn("os.write(2, b'\\rFetching:  0%|\\rFetching: 50%|\\rFetching:'); signal.pause()")
        await bench.last_byte_at("Fetching: 50%|")

    run(story)


def test_a_megabyte_without_a_newline_goes_through_whole(run: Run) -> None:
    sizes: list[int] = []

    class Counter:
        def feed(self, chunk: bytes, /) -> list[str]:
            sizes.append(len(chunk))
            return []

        def flush(self) -> list[str]:
            return []

    async def story(bench: Bench) -> None:
        child = await bench.spawn("sys.stdout.write('x' * 1_000_000)", splitter=Counter)
        assert await child.wait() == 0

    run(story)
    assert sum(sizes) == 1_000_000
    assert max(sizes) <= 65536


def test_it_may_close_a_stream_and_live_on(run: Run) -> None:
    async def story(bench: Bench) -> None:
        child = await bench.spawn("os.close(1); os.write(2, b'still here\\n'); signal.pause()")
        await bench.last_byte_at("still here")
        assert child.alive

    run(story)


def test_lines_arrive_in_the_order_they_were_written(run: Run) -> None:
    async def story(bench: Bench) -> None:
        child = await bench.spawn("for n in range(20000): print(n)")
        await child.wait()
        told = [line for line in bench.lines if line.endswith("they came too fast to be read]")]
        numbers = [int(line) for line in bench.lines if line not in told and not line.endswith(CUT_MARK)]
        assert numbers == sorted(numbers)
        assert numbers[-1000:] == list(range(19000, 20000)), "the last ones are there in any case"
        assert len(numbers) + sum(int(line[1:].split()[0]) for line in told) == 20000

    run(story)


def test_a_listener_that_raises_does_not_hide_the_death(run: Run) -> None:
    async def story(bench: Bench) -> None:
        faults: list[str] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: faults.append(str(context["exception"])))

        def broken(line: str) -> None:
            raise LookupError(line)

        child = await spawn(
            python("say('boo')"), dict(os.environ), record=bench.record, on_line=broken, splitter=LineSplitter
        )
        bench.children.append(child)
        assert await child.wait() == 0
        assert faults == ["boo"]

    run(story)


# -- what it is given -------------------------------------------------------------------------------------------------


def test_it_has_its_own_session_no_input_and_no_descriptor_of_ours(run: Run) -> None:
    async def story(bench: Bench) -> None:
        reader, writer = os.pipe()
        os.set_inheritable(writer, True)  # as a careless C library would have it
        try:
            child = await bench.spawn(
                "say(f'ids {os.getpgid(0)} {os.getsid(0)}')\n"
                "say(f'input {sys.stdin.read()!r}')\n"
                f"try: os.fstat({writer}); say('leaked')\n"
                "except OSError: say('sealed')\n"
            )
            assert await child.wait() == 0
        finally:
            os.close(reader)
            os.close(writer)
        assert bench.lines == [f"ids {child.pid} {child.pid}", "input ''", "sealed"]

    run(story)


def test_its_environment_is_exactly_the_one_given(run: Run) -> None:
    async def story(bench: Bench) -> None:
        argv = ["/bin/sh", "-c", 'echo "$ONLY $HOME|"']
        child = await spawn(argv, {"ONLY": "this"}, record=bench.record, on_line=bench.hear, splitter=LineSplitter)
        bench.children.append(child)
        assert await child.wait() == 0
        assert bench.lines == ["this |"]

    run(story)


# -- on record --------------------------------------------------------------------------------------------------------


def test_it_is_on_record_before_its_owner_has_it_and_not_by_the_event_loop(run: Run) -> None:
    async def story(bench: Bench) -> None:
        threads: list[int] = []

        def record(pid: int, create_time: float) -> None:
            threads.append(threading.get_ident())
            bench.recorded.append((pid, create_time))

        bench.record = record
        child = await bench.spawn("signal.pause()")
        assert bench.recorded == [(child.pid, child.create_time)]
        assert threads != [threading.get_ident()]

    run(story)


def test_a_slow_exec_or_record_does_not_hold_up_the_event_loop(run: Run) -> None:
    async def story(bench: Bench) -> None:
        done = threading.Event()

        def record(*_: object) -> None:
            done.wait(PATIENCE)

        bench.record = record
        starting = asyncio.ensure_future(bench.spawn("say('up'); signal.pause()"))
        await asyncio.sleep(0.05)
        assert not starting.done()
        done.set()
        assert (await starting).alive

    run(story)


@pytest.mark.parametrize("moment", ["while it is recorded", "as it is there"])
def test_one_whose_start_is_cancelled_is_on_record_and_ended(run: Run, moment: str) -> None:
    async def story(bench: Bench) -> None:
        recorded, go_on = threading.Event(), threading.Event()
        pids: list[int] = []

        def record(pid: int, _: float) -> None:
            pids.append(pid)
            recorded.set()
            go_on.wait(PATIENCE)

        bench.record = record
        starting = asyncio.ensure_future(bench.spawn("signal.pause()"))
        await asyncio.to_thread(recorded.wait, PATIENCE)
        if moment == "as it is there":
            await go_on_until_there(starting, go_on)
        starting.cancel()
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await starting
        await asyncio.to_thread(await_end, pids[0])

    async def go_on_until_there(starting: "asyncio.Future[ChildProcess]", go_on: threading.Event) -> None:
        """As far as the future that the start awaits; the task itself has not run yet."""
        go_on.set()
        waited_for = starting._fut_waiter  # type: ignore[attr-defined]
        while not waited_for.done():  # noqa: ASYNC110 - an event would come after it
            await asyncio.sleep(0)

    run(story)


@pytest.mark.parametrize("step", ["create time", "record"])
def test_one_that_cannot_be_recorded_is_ended(run: Run, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story(bench: Bench) -> None:
        pids: list[int] = []

        def fail(pid: int, *_: float) -> float:
            pids.append(pid)
            raise ValueError("no")

        if step == "record":
            bench.record = fail
        else:
            monkeypatch.setattr(groups, "create_time", fail)
        with pytest.raises(ValueError, match="no"):
            await bench.spawn("signal.pause()")
        monkeypatch.undo()
        assert not runs(pids[0])

    run(story)


# -- stopping it ------------------------------------------------------------------------------------------------------


def test_stop_asks_first(run: Run) -> None:
    async def story(bench: Bench) -> None:
        child = await bench.spawn(
            "def bye(*_): say('bye'); sys.exit(7)\nsignal.signal(signal.SIGTERM, bye)\nsay('up')\nsignal.pause()"
        )
        await bench.last_byte_at("up")
        assert await child.stop(PATIENCE, lambda: bench.hear("escalated")) == 7
        assert bench.lines == ["up", "bye"]

    run(story)


def test_stop_kills_what_will_not_listen(run: Run) -> None:
    async def story(bench: Bench) -> None:
        child = await bench.spawn(IGNORE_TERM + "say('up')\nwhile True: signal.pause()")
        await bench.last_byte_at("up")
        assert await child.stop(0.1, lambda: bench.hear("escalated")) == -9
        assert bench.lines == ["up", "escalated"]

    run(story)


LEAVES = {
    "group": "os.setpgid(0, 0)",
    "session": "os.setsid()",
    "daemon": "os.setsid()\n    if os.fork(): os._exit(0)",
}


@pytest.mark.slow
@pytest.mark.parametrize("leave", LEAVES.values(), ids=LEAVES)
@pytest.mark.parametrize("deaf", [False, True])
def test_stop_ends_what_has_left_the_group_or_the_session(run: Run, leave: str, deaf: bool) -> None:
    async def story(bench: Bench) -> None:
        code = f"if os.fork() == 0:\n    {leave}\n    say('left ' + str(os.getpid()))\n    while True: signal.pause()\n"
        code = (IGNORE_TERM if deaf else "") + code + "signal.signal(signal.SIGTERM, signal.SIG_DFL)\nsignal.pause()"
        child = await bench.spawn(code, mark=f"{os.getpid()}-{time.time_ns()}.1")
        left = await bench.pid("left")
        await child.stop(0.2 if deaf else PATIENCE, lambda: bench.hear("escalated"))
        assert not runs(left)
        assert ("escalated" in bench.lines) is deaf

    run(story)


def test_stop_wakes_a_stopped_process_so_that_it_can_obey(run: Run) -> None:
    async def story(bench: Bench) -> None:
        child = await bench.spawn("say('up'); signal.pause()")
        await bench.last_byte_at("up")
        child.signal_session(signal.SIGSTOP)
        await asyncio.to_thread(await_status, child.pid, psutil.STATUS_STOPPED)
        assert await child.stop(PATIENCE, lambda: bench.hear("escalated")) == -15
        assert "escalated" not in bench.lines

    run(story)


def test_a_second_stop_in_a_hurry_shortens_the_first(run: Run) -> None:
    async def story(bench: Bench) -> None:
        child = await bench.spawn(IGNORE_TERM + "say('up')\nwhile True: signal.pause()")
        await bench.last_byte_at("up")
        patient = asyncio.ensure_future(child.stop(PATIENCE * 10))
        await asyncio.sleep(0)
        assert await child.stop(0.0) == -9
        assert await patient == -9

    run(story)


def test_stop_of_a_dead_child_is_fine(run: Run) -> None:
    async def story(bench: Bench) -> None:
        child = await bench.spawn("sys.exit(3)")
        await child.wait()
        assert await child.stop(PATIENCE) == 3
        assert await child.stop(0.0) == 3

    run(story)


# -- grandchildren ----------------------------------------------------------------------------------------------------

FORK = "if os.fork() == 0:\n{grandchild}\n    os._exit(0)\n{parent}\n"


def forking(grandchild: str, parent: str) -> str:
    indented = "\n".join(f"    {line}" for line in grandchild.splitlines())
    return FORK.format(grandchild=indented, parent=parent)


def test_stop_takes_a_deaf_grandchild_along(run: Run) -> None:
    async def story(bench: Bench) -> None:
        deaf = IGNORE_TERM + "say(f'grandchild {os.getpid()}')\nwhile True: signal.pause()"
        child = await bench.spawn(forking(deaf, "signal.pause()"))
        grandchild = await bench.pid("grandchild")
        assert await child.stop(0.3, lambda: bench.hear("escalated")) == -15
        assert not runs(grandchild)
        assert bench.lines[-1] == "escalated"

    run(story)


def test_a_grandchild_has_the_whole_grace_though_its_parent_went_at_once(run: Run) -> None:
    async def story(bench: Bench) -> None:
        slow = (
            "def bye(*_): time.sleep(0.3); say('written out'); os._exit(0)\n"
            "signal.signal(signal.SIGTERM, bye)\nsay('up')\nwhile True: signal.pause()"
        )
        child = await bench.spawn(forking(slow, "signal.pause()"))
        await bench.last_byte_at("up")
        assert await child.stop(PATIENCE, lambda: bench.hear("escalated")) == -15
        assert bench.lines == ["up", "written out"]

    run(story)


def test_a_grandchild_that_holds_the_pipes_does_not_hold_up_wait(run: Run) -> None:
    async def story(bench: Bench) -> None:
        holder = "os.write(2, f'grandchild {os.getpid()}\\n'.encode())\nsignal.pause()"
        child = await bench.spawn(forking(holder, "os.write(1, b'last words'); os._exit(4)"))
        grandchild = await bench.pid("grandchild")
        assert await child.wait() == 4
        assert "last words" in bench.lines
        assert runs(grandchild)
        assert await child.stop(PATIENCE) == 4
        assert not runs(grandchild)

    run(story)


def test_a_grandchild_that_never_stops_writing_does_not_hold_up_wait(run: Run) -> None:
    pipes: list[int] = []

    class Slow:
        """Slower than the writer: there is always more to read."""

        def feed(self, chunk: bytes, /) -> list[str]:
            select.select(pipes, [], [], PATIENCE)
            return []

        def flush(self) -> list[str]:
            return []

    async def story(bench: Bench) -> None:
        flood = "while True: os.write(1, b'y' * 4096)"
        child = await bench.spawn(forking(flood, "time.sleep(0.2); os._exit(4)"), splitter=Slow)
        assert child._popen.stdout is not None
        pipes.append(child._popen.stdout.fileno())
        assert await child.wait() == 4
        assert await child.stop(PATIENCE) == 4

    run(story)


def test_after_stop_no_descriptor_is_left_though_a_daemon_holds_the_other_end(run: Run) -> None:
    async def story(bench: Bench) -> None:
        open_before = psutil.Process().num_fds()
        child = await bench.spawn(
            forking("os.setsid(); say(f'daemon {os.getpid()}')\nsignal.pause()", "signal.pause()")
        )
        daemon = await bench.pid("daemon")
        try:
            assert await child.stop(PATIENCE) == -15
            assert psutil.Process().num_fds() == open_before
        finally:
            os.kill(daemon, signal.SIGKILL)

    run(story)


# -- it does not start ------------------------------------------------------------------------------------------------


def unexpected(pid: int, _: float) -> None:
    raise AssertionError(f"a process, {pid}")


def refusal(argv: list[str], env: dict[str, str] | None = None) -> SpawnError:
    async def story() -> None:
        await spawn(argv, env or {}, record=unexpected, on_line=lambda _: None, splitter=LineSplitter)

    with pytest.raises(SpawnError) as caught:
        asyncio.run(story())
    return caught.value


def test_no_such_program() -> None:
    error = refusal(["/no/such/program", "--flag"])
    assert "/no/such/program" in str(error)
    assert "install it or give its full path" in str(error)
    assert isinstance(error.__cause__, FileNotFoundError)


def test_not_executable(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("#!/bin/sh\n")
    assert "chmod +x" in str(refusal([str(plain)]))


def test_not_a_program(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("hello\n")
    text.chmod(0o755)
    assert "#! line" in str(refusal([str(text)]))


def test_interpreter_missing(tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("#!/no/such/interpreter\n")
    script.chmod(0o755)
    assert "#! line names one that does not exist" in str(refusal([str(script)]))


def test_arguments_too_long() -> None:
    error = refusal(["/bin/sh", *["x" * 100_000] * 100])
    assert "shorten server_args" in str(error)


def test_nul_byte_and_bad_variable_name() -> None:
    assert "null byte" in str(refusal(["/bin/sh", "a\0b"]))
    assert "correct its arguments or env" in str(refusal(["/bin/sh"], env={"A=B": "c"}))


def test_empty_command() -> None:
    assert "command is empty" in str(refusal([]))


def test_no_descriptors_left() -> None:
    async def story() -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (1, hard))
        try:
            await spawn(["/bin/sh"], {}, record=unexpected, on_line=lambda _: None, splitter=LineSplitter)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    with pytest.raises(SpawnError, match="ulimit -n") as caught:
        asyncio.run(story())
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.EMFILE


def test_no_thread_to_be_had_leaves_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(thread: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("threading.Thread.start", exhausted)
    before = psutil.Process().children()
    error = refusal(python("signal.pause()"))
    assert "can't start new thread" in str(error)
    assert psutil.Process().children() == before


def test_an_ignored_sigchld_that_was_inherited_hides_no_exit_status() -> None:
    """As from ``trap '' CHLD``. Without ``reap_here`` the status is 0."""
    script = """
import asyncio, os, sys
from backends.process.child import reap_here, spawn
from backends.process.output import LineSplitter
async def main():
    child = await spawn([sys.executable, "-c", "raise SystemExit(7)"], dict(os.environ), record=lambda *_: None,
                        on_line=print, splitter=LineSplitter)
    print(await child.wait())
reap_here()
asyncio.run(main())
"""
    trap = ["/bin/sh", "-c", "trap '' CHLD; exec \"$@\"", "sh", sys.executable, "-c", script]
    assert subprocess.run(trap, check=True, capture_output=True, text=True).stdout == "7\n"

"""One child process: spawn it in its own session, forward its output, signal its session, reap it.

Decides nothing: when to start, stop and give up is up to the lifecycle.

    child = await spawn(argv, env, record=..., on_line=..., splitter=LineSplitter)
    await child.wait()       the leader is reaped and all its output has gone to ``on_line``
    await child.stop(20.0)   the whole session, and what has left it, have ended; must also be called after a leader
                             that exited by itself

Each child has one thread in the gateway: it forks, writes the record, and then waits for the exit. So neither a slow
exec (a cold disk, a signature check by macOS) nor a slow disk under the record blocks the event loop, and no
cancellation comes between the fork and the record: the thread does both, even if the calling task is cancelled.

Caveats:

* ``subprocess.Popen`` and a thread in waitpid, not asyncio's subprocesses: one path for Linux and macOS, for asyncio's
  child watchers and uvloop.
* When the leader has been reaped, all its output is in the pipes. So they are drained at that moment; waiting for end
  of file instead would wait for every grandchild that holds a copy of the pipe.
"""

import asyncio
import errno
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from signal import Signals
from typing import Any

from backends.domain.cadence import Cadence
from backends.process import groups, marks
from backends.process.marks import Marked
from backends.process.pump import OutputPump, Splitter

STRAY_SEARCH = 1.0  # seconds that a search may take; it takes some milliseconds, unless the system blocks it


# Transient errors: a later try may succeed.
PASSING = frozenset({errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EINTR, errno.ETXTBSY})


class SpawnError(Exception):
    """No process was started. The message has cause and remedy; ``passing``: transient, a later try may succeed."""

    def __init__(self, message: str, *, passing: bool = False) -> None:
        super().__init__(message)
        self.passing = passing


REMEDIES = {
    errno.ENOENT: "program not found, or its #! line names one that does not exist; install it or give its full path",
    errno.ENOTDIR: "a part of its path is not a directory; correct the path",
    errno.EACCES: "it is not an executable file, or not for this user; check the path, or chmod +x it",
    errno.EPERM: "the system forbids it; check the file's permissions, quarantine flag and mount options",
    errno.ENOEXEC: "it is not a program for this machine, or a script without a #! line; start its interpreter instead",
    errno.E2BIG: "its arguments and environment are too long; shorten server_args, command or env",
    errno.EMFILE: "the gateway has no file descriptors left; raise `ulimit -n` (launchd: NumberOfFiles)",
    errno.ENFILE: "the system has no file descriptors left; close programs or raise its limit",
    errno.EAGAIN: "the limit on processes is reached; end some or raise `ulimit -u`",
    errno.ENOMEM: "not enough memory for another process; free some",
    errno.EINTR: "it was interrupted; it is tried again",
    errno.ETXTBSY: "its program file is being written; it is tried again",
}


async def spawn(  # noqa: PLR0913 - a process has so many sides
    argv: Sequence[str],
    env: Mapping[str, str],
    *,
    record: Callable[[int, float], object],
    on_line: Callable[[str], None],
    splitter: Callable[[], Splitter],
    ended: Callable[[], None] = lambda: None,
    mark: str = "",
    inherits: socket.socket | None = None,
    cadence: Cadence | None = None,
) -> "ChildProcess":
    """Start ``argv`` with exactly ``env`` and ``mark``, no input, and no inherited descriptor but that of ``inherits``.
    Raises SpawnError.

    ``inherits``: has the same number in the child, and is closed here, whether the start succeeds or not.

    ``mark``: see ``marks``; "" = processes that leave the session are not ended.

    ``record``: called with pid and create time, in a thread, directly after the fork; may block. ``ended``: called in
    the same thread directly after the leader was reaped, before anything else is told of its end. If the start is
    cancelled, the child is killed as soon as it exists, and its entry is kept until the run record is closed.
    """

    def adopt(popen: subprocess.Popen[bytes], create_time: float) -> ChildProcess:
        child = ChildProcess(popen, create_time, on_line=on_line, poll=(cadence or Cadence()).group_poll, mark=mark)
        child.listen(splitter)
        return child

    marked = {**env, marks.VARIABLE: mark} if mark else env

    def fork() -> subprocess.Popen[bytes]:
        try:
            return _popen(argv, marked, () if inherits is None else (inherits.fileno(),))
        finally:
            if inherits is not None:
                inherits.close()

    start = _Start(fork, record, adopt, ended)
    try:
        threading.Thread(target=start.run, name=f"child-{next(iter(argv), '')}", daemon=True).start()
    except RuntimeError as error:  # can't start new thread
        if inherits is not None:
            inherits.close()
        raise SpawnError(f"cannot supervise {argv[0]}: {error}; {REMEDIES[errno.EAGAIN]}", passing=True) from error
    try:
        return await start.started
    except asyncio.CancelledError:
        start.abandon()
        raise


class _Start:
    """The thread of one child. It reports the start and the exit of the child to the event loop."""

    def __init__(
        self,
        fork: Callable[[], subprocess.Popen[bytes]],
        record: Callable[[int, float], object],
        adopt: Callable[[subprocess.Popen[bytes], float], "ChildProcess"],
        ended: Callable[[], None],
    ) -> None:
        self._fork = fork
        self._record = record
        self._adopt = adopt
        self._ended = ended
        self._loop = asyncio.get_running_loop()
        self._child: ChildProcess | None = None
        self.started: asyncio.Future[ChildProcess] = self._loop.create_future()

    def abandon(self) -> None:
        """The start was cancelled, possibly just after it was done."""
        self.started.cancel()
        if self._child is not None:
            self._child.signal_session(Signals.SIGKILL)
            self._child.close_output()

    def run(self) -> None:
        """Body of the thread; returns when the leader has exited."""
        try:
            popen = self._fork()
        except Exception as error:  # noqa: BLE001 - raised where the start is awaited
            self._tell(self._failed, error)
            return
        try:
            create_time = groups.create_time(popen.pid) or 0.0  # before anything can reap it
            self._record(popen.pid, create_time)
        except Exception as error:  # noqa: BLE001 - likewise
            _end(popen)
            self._tell(self._failed, error)
            return
        if not self._tell(self._begun, popen, create_time):
            _end(popen)
            return
        status = popen.wait()
        try:
            self._ended()
        finally:
            self._tell(self._exited, status)

    def _tell(self, what: Callable[..., None], *args: Any) -> bool:
        try:
            self._loop.call_soon_threadsafe(what, *args)
        except RuntimeError:  # the event loop is closed: the gateway has ended
            return False
        return True

    def _failed(self, error: Exception) -> None:
        if not self.started.cancelled():
            self.started.set_exception(error)

    def _begun(self, popen: subprocess.Popen[bytes], create_time: float) -> None:
        try:
            if self.started.cancelled():
                _end(popen, wait=False)  # the thread waits
                return
            self._child = self._adopt(popen, create_time)
        except Exception as error:  # noqa: BLE001 - raised where the start is awaited
            _end(popen, wait=False)
            self._failed(error)
        else:
            self.started.set_result(self._child)

    def _exited(self, status: int) -> None:
        if self._child is not None:
            self._child.exited(status)


def _end(popen: subprocess.Popen[bytes], *, wait: bool = True) -> None:
    """Kill a child that has no owner."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(popen.pid, Signals.SIGKILL)
    for pipe in (popen.stdout, popen.stderr):
        if pipe is not None:
            pipe.close()
    if wait:
        popen.wait()


def _popen(argv: Sequence[str], env: Mapping[str, str], inherited: Sequence[int]) -> subprocess.Popen[bytes]:
    if not argv:
        raise SpawnError("cannot start a backend: its command is empty; set `command` or `model`")
    try:
        return subprocess.Popen(
            list(argv),
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
            pass_fds=inherited,
        )
    except OSError as error:
        raise SpawnError(_explain(error, argv[0]), passing=error.errno in PASSING) from error
    except ValueError as error:  # a NUL byte, or "=" in the name of a variable
        raise SpawnError(f"cannot start {argv[0]}: {error}; correct its arguments or env") from error


def _explain(error: OSError, program: str) -> str:
    remedy = REMEDIES.get(error.errno or 0, "see the system's documentation of that error")
    return f"cannot start {program}: {error.strerror}: {remedy}"


def reap_here() -> None:
    """Children are reaped by this process, and by nobody else. An ignored SIGCHLD is inherited (from ``trap '' CHLD``,
    some supervisors and container runtimes): the kernel then discards every exit status, and each would read as 0.
    Called from the main thread before the first child."""
    if signal.getsignal(signal.SIGCHLD) is not signal.SIG_DFL:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


class ChildProcess:
    """A child, running or exited. ``create_time``: as in ``groups``, for comparison only."""

    def __init__(
        self,
        popen: subprocess.Popen[bytes],
        create_time: float,
        *,
        on_line: Callable[[str], None],
        poll: float,
        mark: str = "",
    ) -> None:
        """``poll``: seconds between two checks whether the session is empty: no system notifies of that."""
        self._popen = popen
        self._on_line = on_line
        self._poll = poll
        self.mark = mark
        self._strays: list[Marked] = []  # descendants that have left the session
        self._pumps: list[OutputPump] = []
        self._loop = asyncio.get_running_loop()
        self._exit: asyncio.Future[int] = self._loop.create_future()
        self.pid = popen.pid
        self.create_time = create_time

    def __repr__(self) -> str:
        state = "running" if self.alive else f"exited {self.returncode}"
        return f"<ChildProcess pid={self.pid} {state}>"

    @property
    def returncode(self) -> int | None:
        """As in ``subprocess``: negative for a signal. None until reaped."""
        return self._exit.result() if self._exit.done() else None

    @property
    def alive(self) -> bool:
        return not self._exit.done()

    async def wait(self) -> int:
        return await asyncio.shield(self._exit)

    def signal_session(self, number: Signals) -> bool:
        """True: the session had a live process, and the signal was sent."""
        return groups.signal_session(self.pid, self.create_time, number)

    async def stop(self, grace: float, on_escalate: Callable[[], None] | None = None) -> int:
        """SIGTERM to the session and to what has left it, ``grace`` seconds, SIGKILL to the rest; returns the leader's
        returncode.

        A concurrent second call with a shorter grace shortens it. Waits until the kernel has ended the leader, which
        may never happen for a process stuck in a driver: a caller that needs a limit sets its own.
        """
        deadline = self._loop.time() + grace
        groups.terminate_session(self.pid, self.create_time)
        await self._find_strays()
        for stray in self._strays:
            groups.signal_process(stray.pid, stray.create_time, Signals.SIGTERM)
            groups.signal_process(stray.pid, stray.create_time, Signals.SIGCONT)
        if not await self._ended_within(deadline - self._loop.time()):
            if on_escalate is not None:
                on_escalate()
            await self._kill()
        await self._find_strays()  # they may have forked meanwhile
        if self._stray_runs():
            await self._kill()
        status = await self.wait()
        self.close_output()
        return status

    async def _kill(self) -> None:
        """Repeated SIGKILL: a member may fork while the signals go out."""
        give_up = self._loop.time() + groups.KILL_WAIT
        while self._loop.time() < give_up:
            self.signal_session(Signals.SIGKILL)
            for stray in self._strays:
                groups.signal_process(stray.pid, stray.create_time, Signals.SIGKILL)
            if await self._ended_within(self._poll):
                return

    async def _ended_within(self, seconds: float) -> bool:
        deadline = self._loop.time() + seconds
        await asyncio.wait({self._exit}, timeout=max(0.0, seconds))
        while self._stray_runs() or groups.members(self.pid, self.create_time):
            if self._loop.time() >= deadline:
                return False
            await asyncio.sleep(self._poll)
        return self._exit.done()

    def _stray_runs(self) -> bool:
        return any(stray.running for stray in self._strays)

    async def _find_strays(self) -> None:
        if not self.mark:
            return
        found = await asyncio.to_thread(marks.find, self.mark.__eq__, since=self.create_time, within=STRAY_SEARCH)
        self._strays = [one for one in found if groups.session(one.pid) != self.pid]

    def listen(self, splitter: Callable[[], Splitter]) -> None:
        """Begin to forward output. Called once."""
        pipes = [pipe for pipe in (self._popen.stdout, self._popen.stderr) if pipe is not None]
        self._pumps = [OutputPump(pipe, splitter(), self._on_line) for pipe in pipes]

    def close_output(self) -> None:
        """Forward the output that is in the pipes, then stop reading."""
        for pump in self._pumps:
            pump.drain()
            pump.close()

    def exited(self, status: int) -> None:
        """The leader has exited and is reaped. Called once."""
        try:
            for pump in self._pumps:
                pump.drain()
        finally:  # an error in on_line must not hide the exit
            self._exit.set_result(status)

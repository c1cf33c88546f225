"""One child process: spawn it in a session of its own, hand on its output, signal all of its group, see it reaped.

No decision is made here; when to start, stop and give up is the lifecycle's.

    child = await spawn(argv, env, on_line=..., splitter=LineSplitter)
    await child.wait()       the leader is reaped and all that it wrote has gone to ``on_line``
    await child.stop(20.0)   the whole group is gone; also to be called after a leader that died by itself

Awkward bits:

* ``subprocess.Popen`` and a thread in waitpid, not asyncio's subprocesses: one path for Linux and macOS, for asyncio's
  child watchers and uvloop; and nothing is awaited between the fork and the return of ``spawn``, so neither a
  cancellation nor a death of ours can come between the child and its entry in the run file except in the few
  milliseconds of fork and exec themselves.
* When the leader has been reaped, everything it wrote lies in the pipes. So they are emptied at that moment; waiting
  for end of file instead would wait for every grandchild that holds a copy.
* Chunks, never readline(): a tqdm bar writes megabytes without a newline.
"""

import asyncio
import errno
import os
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from signal import Signals
from typing import IO, Protocol

from backends.process import groups

CHUNK = 65536
DRAIN_CHUNKS = 32  # more than any pipe holds; a grandchild may go on writing
POLL = 0.05  # no system tells when a group is empty
KILL_WAIT = 2.0


class Splitter(Protocol):
    """Bytes to lines. ``flush`` gives what came without a line end; feeding may go on afterwards."""

    def feed(self, chunk: bytes, /) -> list[str]: ...

    def flush(self) -> list[str]: ...


# What may be over in a moment: no reason to give up.
PASSING = frozenset({errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EINTR, errno.ETXTBSY})


class SpawnError(Exception):
    """There is no process. The message says why and what to do; ``passing``: trying again may help."""

    def __init__(self, message: str, *, passing: bool = False) -> None:
        super().__init__(message)
        self.passing = passing


_REMEDIES = {
    errno.ENOENT: "no such program, or its #! line names one that does not exist; install it or give its full path",
    errno.ENOTDIR: "a part of its path is not a directory; correct the path",
    errno.EACCES: "it is not an executable file, or not for this user; check the path, or chmod +x it",
    errno.EPERM: "the system forbids it; check the file's permissions, quarantine flag and mount options",
    errno.ENOEXEC: "it is not a program for this machine, or a script without a #! line; start its interpreter instead",
    errno.E2BIG: "its arguments and environment are too long; shorten server_args, command or env",
    errno.EMFILE: "the gateway has no file descriptors left; raise `ulimit -n` (launchd: NumberOfFiles)",
    errno.ENFILE: "the system has no file descriptors left; close programs or raise its limit",
    errno.EAGAIN: "the limit of processes is reached; end some or raise `ulimit -u`",
    errno.ENOMEM: "there is no memory for another process; free some",
}


async def spawn(
    argv: Sequence[str],
    env: Mapping[str, str],
    *,
    cwd: Path | None = None,
    on_line: Callable[[str], None],
    splitter: Callable[[], Splitter],
) -> "ChildProcess":
    """Start ``argv`` with exactly ``env``, no input, and no descriptor of ours. Raises SpawnError.

    Does not suspend. Record the child in the run file straight after: one that a SIGKILL of the gateway cuts off from
    its record is not reaped.
    """
    popen = _popen(argv, env, cwd)
    child = ChildProcess(popen, str(argv[0]), on_line)
    try:
        threading.Thread(target=child.reap, name=f"reap-{popen.pid}", daemon=True).start()
    except RuntimeError as error:  # can't start new thread
        with popen:  # waits, and closes the pipes
            os.killpg(popen.pid, Signals.SIGKILL)
        raise SpawnError(f"cannot supervise {argv[0]}: {error}; {_REMEDIES[errno.EAGAIN]}", passing=True) from error
    child.listen(splitter)
    return child


def _popen(argv: Sequence[str], env: Mapping[str, str], cwd: Path | None) -> subprocess.Popen[bytes]:
    if not argv:
        raise SpawnError("cannot start a backend: its command is empty; set `command` or `model`")
    try:
        return subprocess.Popen(
            list(argv),
            env=dict(env),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
        )
    except OSError as error:
        raise SpawnError(_explain(error, argv[0], cwd), passing=error.errno in PASSING) from error
    except ValueError as error:  # a NUL byte, or "=" in the name of a variable
        raise SpawnError(f"cannot start {argv[0]}: {error}; correct its arguments or env") from error


def _explain(error: OSError, program: str, cwd: Path | None) -> str:
    if cwd is not None and not cwd.is_dir():
        return f"cannot start {program}: its working directory {cwd} does not exist; create it"
    remedy = _REMEDIES.get(error.errno or 0, "see the system's documentation of that error")
    return f"cannot start {program}: {error.strerror}: {remedy}"


class ChildProcess:
    """A running, or ended, child. ``create_time`` is the one of ``groups``: to compare, not to show."""

    def __init__(
        self,
        popen: subprocess.Popen[bytes],
        argv0: str,
        on_line: Callable[[str], None],
    ) -> None:
        self._popen = popen
        self._on_line = on_line
        self._pumps: list[_Pump] = []
        self._loop = asyncio.get_running_loop()
        self._exit: asyncio.Future[int] = self._loop.create_future()
        self.pid = popen.pid
        self.argv0 = argv0
        self.create_time = groups.create_time(popen.pid) or 0.0  # before anything can reap it

    def __repr__(self) -> str:
        state = "running" if self.alive else f"exited {self.returncode}"
        return f"<ChildProcess {self.argv0} pid={self.pid} {state}>"

    @property
    def returncode(self) -> int | None:
        """As Python gives it: negative for a signal. None until reaped."""
        return self._exit.result() if self._exit.done() else None

    @property
    def alive(self) -> bool:
        return not self._exit.done()

    async def wait(self) -> int:
        return await asyncio.shield(self._exit)

    def signal_group(self, number: Signals) -> bool:
        """Whether anybody was left to get it."""
        return groups.signal_group(self.pid, self.create_time, number)

    async def stop(self, grace: float, on_escalate: Callable[[], None] | None = None) -> int:
        """SIGTERM to the group, ``grace`` seconds, SIGKILL to what is left of it; the leader's returncode.

        A second call at the same time with a shorter grace shortens it. Waits as long as the kernel takes to let the
        leader go, which for a process stuck in a driver may be for ever: a caller in a hurry sets its own limit.
        """
        groups.terminate_group(self.pid, self.create_time)
        if not await self._gone_within(grace):
            if on_escalate is not None:
                on_escalate()
            await self._kill()
        status = await self.wait()
        self.close_output()
        return status

    async def _kill(self) -> None:
        """Again and again: a member may fork while the signals go out."""
        give_up = self._loop.time() + KILL_WAIT
        while self._loop.time() < give_up:
            self.signal_group(Signals.SIGKILL)
            if await self._gone_within(POLL):
                return

    async def _gone_within(self, seconds: float) -> bool:
        deadline = self._loop.time() + seconds
        await asyncio.wait({self._exit}, timeout=seconds)
        while groups.members(self.pid, self.create_time):
            if self._loop.time() >= deadline:
                return False
            await asyncio.sleep(POLL)
        return self._exit.done()

    def listen(self, splitter: Callable[[], Splitter]) -> None:
        """Begin to hand on output. Called once."""
        pipes = [pipe for pipe in (self._popen.stdout, self._popen.stderr) if pipe is not None]
        self._pumps = [_Pump(pipe, splitter(), self._on_line) for pipe in pipes]

    def close_output(self) -> None:
        """Hand on what is there and read no more."""
        for pump in self._pumps:
            pump.drain()
            pump.close()

    def reap(self) -> None:
        """Runs in a thread of its own until the leader ends."""
        status = self._popen.wait()
        try:
            self._loop.call_soon_threadsafe(self._exited, status)
        except RuntimeError:  # the loop is closed: nobody is left to tell
            return

    def _exited(self, status: int) -> None:
        try:
            for pump in self._pumps:
                pump.drain()
        finally:  # a fault in on_line must not hide a death
            self._exit.set_result(status)


class _Pump:
    """One pipe of a child, read on the event loop as it fills."""

    def __init__(self, pipe: IO[bytes], splitter: Splitter, on_line: Callable[[str], None]) -> None:
        self._pipe = pipe
        self._splitter = splitter
        self._on_line = on_line
        self._loop = asyncio.get_running_loop()
        os.set_blocking(pipe.fileno(), False)  # our end only: the child's is another open file
        self._loop.add_reader(pipe.fileno(), self._read)

    def _read(self) -> bool:
        """One chunk. False if there was none."""
        try:
            chunk = os.read(self._pipe.fileno(), CHUNK)
        except BlockingIOError:
            return False
        except OSError:
            chunk = b""
        if not chunk:
            self.close()
            return False
        self._emit(self._splitter.feed(chunk))
        return True

    def drain(self) -> None:
        """All that lies in the pipe, and the unfinished line."""
        for _ in range(DRAIN_CHUNKS):
            if self._pipe.closed or not self._read():
                break
        self._emit(self._splitter.flush())

    def close(self) -> None:
        if self._pipe.closed:
            return
        self._loop.remove_reader(self._pipe.fileno())
        self._pipe.close()
        self._emit(self._splitter.flush())

    def _emit(self, lines: list[str]) -> None:
        for line in lines:
            self._on_line(line)

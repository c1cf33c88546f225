"""The gateway's side of the reaper process: start it, tell it of each child, restart it if it exits, end it.

The order at a clean end: children stopped, ``RunRecord.close()``, then ``await ReaperHandle.close()``.
"""

import asyncio
import logging
import os
import signal
import subprocess
import threading

from backends.process import groups, marks, own_module
from backends.process.reaping import SEARCHING
from backends.process.run_record import RunRecord

logger = logging.getLogger(__name__)

GATEWAY_SIGNALS = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP})


class ReaperHandle:
    """Holds the writing end of the pipe that the reaper process reads, and writes the run record to it.

    ``retry``: seconds between two starts of a reaper that exits. ``exit_margin``: seconds beyond the longest grace of
    the children that are left, until the reaper is killed.
    """

    def __init__(
        self, run_record: RunRecord, *, retry: float = 10.0, exit_margin: float = groups.KILL_WAIT + SEARCHING + 1.0
    ) -> None:
        self._run_record = run_record
        self._retry = retry
        self._exit_margin = exit_margin
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: _Pipe | None = None
        self._not_before = float("-inf")
        run_record.tell = self._tell

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    def start(self) -> None:
        """Raises OSError. No other child inherits the pipe: all are spawned with close_fds."""
        self._close_pipe()
        # -P, or a folder called "backends" in the working directory would be imported instead of ours
        argv = own_module.command("backends.process.reaper", str(self._run_record.path))
        # A child inherits the signal mask: so the reaper ignores these signals from its first instruction, not only
        # from main().
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, GATEWAY_SIGNALS)
        try:
            self._process = subprocess.Popen(
                argv,
                env=_environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                start_new_session=True,  # signals to the gateway's group must not reach the reaper
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if self._process.stdin is not None:
            self._pipe = _Pipe(self._process.stdin.fileno())
        self._run_record.publish()

    def check(self, now: float) -> bool:
        """Restart the reaper if it has exited. True: restarted. Cheap: to be called at every tick."""
        if self._process is not None and self._process.poll() is None:
            if self._pipe is not None:
                self._pipe.flush()
            return False
        if now < self._not_before:
            return False
        self._not_before = now + self._retry
        status = self._process.returncode if self._process is not None else None
        logger.warning("reaper exited, it is restarted", extra={"status": status})
        try:
            self.start()
        except OSError as error:
            logger.warning(
                "reaper not started, children may outlive a killed gateway", extra={"reason": error.strerror or error}
            )
            return False
        return True

    async def close(self) -> None:
        """Close the pipe and wait for the reaper to exit. It first ends all children still in the run record."""
        process = self._process
        if process is None:
            return
        self._close_pipe()
        try:
            await asyncio.to_thread(process.wait, self._run_record.longest_grace + self._exit_margin)
        except subprocess.TimeoutExpired:
            process.kill()
            await asyncio.to_thread(process.wait)
        self._process = None

    def _tell(self, line: bytes) -> None:
        """Called in any thread."""
        pipe = self._pipe
        if pipe is not None:
            pipe.send(line)

    def _close_pipe(self) -> None:
        pipe, self._pipe = self._pipe, None
        if pipe is not None:
            pipe.close()
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()


class _Pipe:
    """Lines to a process that may not read: never blocks, and keeps at most the rest of one line and the latest one.
    Thread-safe."""

    def __init__(self, descriptor: int) -> None:
        os.set_blocking(descriptor, False)
        self._descriptor = descriptor
        self._lock = threading.Lock()
        self._begun = b""  # the rest of a line that was written in part
        self._latest = b""
        self._closed = False

    def send(self, line: bytes) -> None:
        with self._lock:
            self._latest = line + b"\n"
        self.flush()

    def flush(self) -> None:
        with self._lock:
            while not self._closed and (self._begun or self._latest):
                if not self._begun:
                    self._begun, self._latest = self._latest, b""
                try:
                    self._begun = self._begun[os.write(self._descriptor, self._begun) :]
                except OSError:  # it is full, or the reaper has ended: the next one gets the record as it is then
                    return

    def close(self) -> None:
        """Writes no more: the descriptor is closed next, and its number used again."""
        self.flush()
        with self._lock:
            self._closed = True


def _environment() -> dict[str, str]:
    """Without the mark that a gateway within a gateway has: its reaper must outlive it."""
    return {name: value for name, value in own_module.environment().items() if name != marks.VARIABLE}

"""The gateway's side of the reaper process: start it, start it again should it die, let it go at the end.

The order at a clean end: children stopped, ``RunRecord.close()``, then ``await ReaperHandle.close()``.
"""

import asyncio
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

logger = logging.getLogger(__name__)

LET_GO = 3.0  # seconds beyond its grace
FOR_US = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP})


class ReaperHandle:
    """Holds the writing end of the pipe that the reaper process waits on.

    ``grace``: seconds between its SIGTERM and its SIGKILL; ``retry``: seconds between two starts of a reaper that dies.
    """

    def __init__(self, run_record: Path, *, grace: float = 3.0, retry: float = 10.0) -> None:
        self._run_record = run_record
        self._grace = grace
        self._retry = retry
        self._process: subprocess.Popen[bytes] | None = None
        self._not_before = float("-inf")

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    def start(self) -> None:
        """Raises OSError. The pipe reaches no other child: they are all spawned with close_fds."""
        self._release()
        home = str(Path(__file__).resolve().parents[2])
        inherited = os.environ.get("PYTHONPATH")
        # -P, or a folder called "backends" in the working directory would be imported instead of ours
        argv = [
            sys.executable,
            "-P",
            "-m",
            "backends.process.reaper",
            str(self._run_record),
            "--grace",
            str(self._grace),
        ]
        # A child begins with its parent's mask: so it is deaf from its first instruction on, not from its main() on.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, FOR_US)
        try:
            self._process = subprocess.Popen(
                argv,
                env=os.environ | {"PYTHONPATH": f"{home}{os.pathsep}{inherited}" if inherited else home},
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # a signal to the gateway's group is not meant for it
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def check(self, now: float) -> bool:
        """Start it again if it has died; whether that was done. Cheap: to be called at every tick."""
        if self._process is not None and self._process.poll() is None:
            return False
        if now < self._not_before:
            return False
        self._not_before = now + self._retry
        status = self._process.returncode if self._process is not None else None
        logger.warning("reaper gone (exit %s), started again", status)
        try:
            self.start()
        except OSError as error:
            logger.warning("reaper not started, children may outlive a killed gateway: %s", error)
            return False
        return True

    async def close(self) -> None:
        """Let it go and see it end. What the run record still names by now, it ends first."""
        process = self._process
        if process is None:
            return
        if process.stdin is not None:
            process.stdin.close()
        try:
            await asyncio.to_thread(process.wait, self._grace + LET_GO)
        except subprocess.TimeoutExpired:
            process.kill()
            await asyncio.to_thread(process.wait)
        self._process = None

    def _release(self) -> None:
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()

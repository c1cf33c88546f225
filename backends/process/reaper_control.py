"""The gateway's side of the reaper process: start it, restart it if it exits, end it at shutdown.

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

GATEWAY_SIGNALS = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP})


class ReaperHandle:
    """Holds the writing end of the pipe that the reaper process reads.

    ``grace``: seconds between the reaper's SIGTERM and SIGKILL to children; ``retry``: seconds between two starts of a
    reaper that exits.
    """

    def __init__(self, run_record: Path, *, grace: float = 3.0, retry: float = 10.0, exit_margin: float = 3.0) -> None:
        self._run_record = run_record
        self._grace = grace
        self._retry = retry
        self._exit_margin = exit_margin  # seconds beyond its grace until the reaper is killed
        self._process: subprocess.Popen[bytes] | None = None
        self._not_before = float("-inf")

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    def start(self) -> None:
        """Raises OSError. No other child inherits the pipe: all are spawned with close_fds."""
        self._close_pipe()
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
        # A child inherits the signal mask: so the reaper ignores these signals from its first instruction, not only
        # from main().
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, GATEWAY_SIGNALS)
        try:
            self._process = subprocess.Popen(
                argv,
                env=os.environ | {"PYTHONPATH": f"{home}{os.pathsep}{inherited}" if inherited else home},
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # signals to the gateway's group must not reach the reaper
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def check(self, now: float) -> bool:
        """Restart the reaper if it has exited. True: restarted. Cheap: to be called at every tick."""
        if self._process is not None and self._process.poll() is None:
            return False
        if now < self._not_before:
            return False
        self._not_before = now + self._retry
        status = self._process.returncode if self._process is not None else None
        logger.warning("reaper exited (status %s), restarting it", status)
        try:
            self.start()
        except OSError as error:
            logger.warning("reaper not started, children may outlive a killed gateway: %s", error)
            return False
        return True

    async def close(self) -> None:
        """Close the pipe and wait for the reaper to exit. It first ends all children still in the run record."""
        process = self._process
        if process is None:
            return
        if process.stdin is not None:
            process.stdin.close()
        try:
            await asyncio.to_thread(process.wait, self._grace + self._exit_margin)
        except subprocess.TimeoutExpired:
            process.kill()
            await asyncio.to_thread(process.wait)
        self._process = None

    def _close_pipe(self) -> None:
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()

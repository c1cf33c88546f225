"""The mark in the environment of children, and the processes that have it.

Each child gets a variable of its own value, ``RUN.NUMBER``, which its descendants inherit: so they are found also when
they have left its session (``setsid``, a daemon), and a child is found that no record names, because the gateway was
killed between the fork and the record.

Only processes of this user that are younger than the run are looked at. On macOS reading a process can block for
minutes, so a search runs in a thread of its own, and is given up after some seconds.

Caveats:

* Between fork and exec a child still has the environment of the gateway: whoever looks for a child that may be starting
  must look again.
* A process that was started with an empty environment, or that overwrites it (setproctitle), is not found; in the
  session of the child it is found by that.
* macOS hides the environment of the programs of the system (``/bin/sh``), not that of others. Not run on a Mac: psutil
  reads it there by ``sysctl(KERN_PROCARGS2)``.
"""

import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil

from backends.process import groups

VARIABLE = "MLX_GATEWAY_CHILD"
WITHIN = 5.0  # seconds of a search
# Seconds by which a clock that was set back may make a child look older than its gateway: on macOS create times are
# dates, on Linux they count from the boot.
CLOCK_SLACK = 3600.0 if sys.platform == "darwin" else 0.0


@dataclass(frozen=True, slots=True)
class Marked:
    """``create_time``: as in ``groups``."""

    pid: int
    create_time: float
    mark: str

    @property
    def running(self) -> bool:
        return groups.is_running(self.pid, self.create_time)


def of(run: str, number: int) -> str:
    """The mark of the child with that number in a run of the gateway."""
    return f"{run}.{number}"


def run_of(mark: str) -> str:
    return mark.rpartition(".")[0]


_one_search = threading.Lock()  # one that blocks must not be joined by a thread for each later one


def find(wanted: Callable[[str], bool], *, since: float, within: float = WITHIN) -> list[Marked]:
    """The running processes whose mark is ``wanted``: those that were found in ``within`` seconds. ``since``: create
    time of the gateway, or of the child. Blocks for at most ``within``; [] if an earlier search still blocks."""
    found: list[Marked] = []
    give_up = time.monotonic() + within

    def search() -> None:
        try:
            for pid in set(psutil.pids()) - {0, 1, os.getpid()}:
                if time.monotonic() > give_up:
                    return
                one = _marked(pid, since - CLOCK_SLACK)
                if one is not None and wanted(one.mark):
                    found.append(one)
        finally:
            _one_search.release()

    if not _one_search.acquire(timeout=within):
        return []
    searching = threading.Thread(target=search, name="marks", daemon=True)
    try:
        searching.start()
    except RuntimeError:  # can't start new thread
        _one_search.release()
        return []
    searching.join(max(0.0, give_up - time.monotonic()))
    return list(found)


def _marked(pid: int, since: float) -> Marked | None:
    try:
        process = psutil.Process(pid)
        if process.uids().real != os.getuid():
            return None
        created = groups.create_time(pid)
        if created is None or created < since:
            return None
        mark = process.environ().get(VARIABLE)
    except (psutil.Error, OSError, ValueError):  # it has ended, or may not be read
        return None
    return None if mark is None else Marked(pid, created, mark)

"""How long the event loop was held up while a test ran: by one callback, or by a thread that kept the interpreter.

    with measured() as lag: ...    then lag.callback, lag.held, and what the longest callback was

A callback is timed around ``asyncio.Handle._run``, so this is for asyncio's own loop. A thread in one long call of C
code shows in no callback: then a heartbeat on the loop comes late while this process takes processor time. (While the
system gives the processor to another process, no processor time passes, and it does not count.)
"""

import asyncio
import itertools
import resource
import sys
import time
from asyncio.events import Handle
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

BEAT = 0.005  # seconds
TRIES = 3
_UNIQUE = itertools.count()
TRACED = 4  # times as long, where each line of Python is traced for its coverage


@dataclass
class LoopLag:
    """Seconds, each the longest that was."""

    callback: float = 0.0
    held: float = 0.0  # from one heartbeat to the next, more than it should be
    culprit: str = ""

    @property
    def longest(self) -> float:
        return max(self.callback, self.held)

    def __str__(self) -> str:
        return f"{self.callback * 1000:.0f} ms in {self.culprit}; held up for {self.held * 1000:.0f} ms"


@contextmanager
def measured() -> Iterator[LoopLag]:
    """Of the running loop."""
    lag, run = LoopLag(), Handle._run

    def timed(handle: Handle) -> None:
        waits, began, began_thread = _voluntary_waits(), time.perf_counter(), time.thread_time()
        run(handle)
        took, took_thread = time.perf_counter() - began, time.thread_time() - began_thread
        if _voluntary_waits() == waits:
            took = took_thread  # what is more was the processor's time for other processes
        if took > lag.callback:
            lag.callback, lag.culprit = took, _named(handle)

    heartbeat = asyncio.ensure_future(_beat(lag))
    with patch.object(Handle, "_run", timed):
        try:
            yield lag
        finally:
            heartbeat.cancel()


def _voluntary_waits() -> int:
    """How often this thread has given up the processor: for a file, a lock, the interpreter. Linux only; elsewhere each
    callback counts with all of its time."""
    who = getattr(resource, "RUSAGE_THREAD", None)
    return next(_UNIQUE) if who is None else resource.getrusage(who).ru_nvcsw


async def _beat(lag: LoopLag) -> None:
    while True:
        wall, processor = time.perf_counter(), time.process_time()
        await asyncio.sleep(BEAT)
        late = min(time.perf_counter() - wall, time.process_time() - processor) - BEAT
        lag.held = max(lag.held, late)


def _named(handle: Any) -> str:
    """The task, where it was the step of one."""
    return repr(getattr(handle._callback, "__self__", handle))


async def assert_bounded(scenario: Callable[[], Awaitable[None]], bound: float) -> None:
    """``bound``: seconds. The best of three tries counts: a first one pays for imports, and any of them for what else
    the machine does."""
    bound *= TRACED if sys.gettrace() is not None else 1
    tries: list[str] = []
    for _ in range(TRIES):
        with measured() as lag:
            await scenario()
        if lag.longest <= bound:
            return
        tries.append(str(lag))
    raise AssertionError(f"the event loop was held up for more than {bound * 1000:.0f} ms: {'; '.join(tries)}")

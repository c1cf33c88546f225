"""The output of a child: each of its pipes is read on the event loop as it fills, so that the child never waits for us.

What was read is processed within a budget of time; of a flood beyond it the oldest part is dropped, and a line tells
how many lines that were. Chunks, never readline(): a tqdm bar writes megabytes without a newline.
"""

import asyncio
import os
from collections.abc import Callable
from typing import IO, Protocol

from backends.process.output import CUT_MARK, Backlog

CHUNK = 16384  # bytes per read callback
MAX_DRAIN_CHUNKS = 32  # more than any pipe holds; bounded because a grandchild may still write
MAX_DRAIN_LINES = 1000  # of the last output of a process that has ended: they are processed in one go
BUDGET = 0.01  # seconds of processing for one pipe within PERIOD: a line costs about 3 to 30 µs
PERIOD = 0.02  # seconds
MAX_LINES = 900  # in a period: fewer than the ring of a backend keeps, so that the line on dropped ones is in it


class Splitter(Protocol):
    """Bytes to lines. ``flush`` returns the unfinished line; ``feed`` may be called afterwards."""

    def feed(self, chunk: bytes, /) -> list[str]: ...

    def flush(self) -> list[str]: ...


class OutputPump:
    """Of one pipe. ``on_line`` gets each line."""

    def __init__(self, pipe: IO[bytes], splitter: Splitter, on_line: Callable[[str], None]) -> None:
        self._backlog = Backlog()
        self._spent = 0.0  # seconds of the budget
        self._lines = 0  # in this period
        self._period: asyncio.TimerHandle | None = None  # runs until the budget is renewed
        self._pipe = pipe
        self._splitter = splitter
        self._on_line = on_line
        self._loop = asyncio.get_running_loop()
        os.set_blocking(pipe.fileno(), False)  # our end only: the child's end is a separate open file
        self._loop.add_reader(pipe.fileno(), self._read)

    def _read(self) -> bool:
        """Read one chunk. False if there was none."""
        more = self._take_in()
        self._process()
        return more

    def _take_in(self) -> bool:
        try:
            chunk = os.read(self._pipe.fileno(), CHUNK)
        except BlockingIOError:
            return False
        except OSError:
            chunk = b""
        if not chunk:
            self.close()
            return False
        self._backlog.put(chunk)
        return True

    def _process(self) -> None:
        began = self._loop.time()
        while self._backlog and self._lines < MAX_LINES and self._spent + self._loop.time() - began < BUDGET:
            lines = self._splitter.feed(self._backlog.take())
            self._lines += len(lines)
            self._emit(lines)
        self._spent += self._loop.time() - began
        if self._period is None and not self._pipe.closed:
            self._period = self._loop.call_later(PERIOD, self._renew)

    def _renew(self) -> None:
        self._spent, self._lines, self._period = 0.0, 0, None
        if self._backlog:
            self._tell_dropped()
            self._process()

    def _tell_dropped(self) -> None:
        if dropped := self._backlog.dropped:
            self._backlog.dropped = 0
            half = [line + CUT_MARK for line in self._splitter.flush()]
            self._emit([*half, f"[{dropped} lines of output dropped: they came too fast to be read]"])

    def _finish(self) -> None:
        """Process what is left, and the unfinished line."""
        rest = self._backlog.take_last(MAX_DRAIN_LINES)
        self._tell_dropped()
        for at in range(0, len(rest), CHUNK):
            self._emit(self._splitter.feed(rest[at : at + CHUNK]))
        self._emit(self._splitter.flush())

    def drain(self) -> None:
        """Forward all that is in the pipe, and the unfinished line."""
        for _ in range(MAX_DRAIN_CHUNKS):
            if self._pipe.closed or not self._take_in():
                break
        self._finish()

    def close(self) -> None:
        if self._pipe.closed:
            return
        self._loop.remove_reader(self._pipe.fileno())
        if self._period is not None:
            self._period.cancel()
        try:
            self._finish()
        finally:
            self._pipe.close()

    def _emit(self, lines: list[str]) -> None:
        for line in lines:
            self._on_line(line)

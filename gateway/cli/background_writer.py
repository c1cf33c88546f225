"""Text streams for stdout and stderr whose writes never block: a thread of each does the writing.

A reader that stops reading (Ctrl-S, a stuck ``tee``, a supervisor that has lost interest) blocks whoever writes to a
full pipe or terminal. On the event loop that would be everybody: requests, probes, signals.

Lines that find the bounded queue full are dropped and counted, and the number is written in their place once writing
goes on. Non-blocking descriptors would need no thread, but that flag belongs to the open file, which is shared with the
shell and the other processes on the terminal.
"""

import contextlib
import io
import os
import select
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import TextIO

MAX_PENDING = 1 << 18  # bytes that wait for a reader: more than a thousand lines
MAX_BATCH = 1 << 16  # bytes handed to one write
RETRY_INTERVAL = 1.0  # seconds after a failed write
DRAIN_TIMEOUT = 2.0  # seconds at exit for what still waits

Note = Callable[[int], str]  # number of dropped lines -> the line that tells it


class BackgroundWriter(io.TextIOBase):
    """Writes to the descriptor ``fd``, which stays open. ``note``: formats the line about dropped lines."""

    def __init__(self, fd: int, note: Note, *, max_pending: int = MAX_PENDING) -> None:
        self._fd = fd
        self._note = note
        self._max_pending = max_pending
        self._pending: deque[tuple[bytes, int]] = deque()  # (data, lines that are lost if it cannot be written)
        self._size = 0  # bytes in _pending
        self._part = ""  # a line that is not complete yet: print() writes the line end by itself
        self._dropped = 0  # lines since the last note
        self._writing = False
        self._failing = False  # the last write failed
        self._changed = threading.Condition()
        # A daemon: at exit nothing waits for a reader that does not come. Not through sys.stderr, whose lock such a
        # thread would hold while the interpreter wants to flush it.
        threading.Thread(target=self._run, name=f"writer-{fd}", daemon=True).start()

    @property
    def encoding(self) -> str:  # type: ignore[override]  # read-only here
        return "utf-8"

    def fileno(self) -> int:
        return self._fd

    def isatty(self) -> bool:
        return os.isatty(self._fd)

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        """Never blocks."""
        with self._changed:
            whole, newline, self._part = (self._part + text).rpartition("\n")
            if newline:
                self._add(whole + newline)
            elif len(self._part) > self._max_pending:
                self._part, self._dropped = "", self._dropped + 1
        return len(text)

    def flush(self) -> None:
        """Does not wait; hands over an incomplete line."""
        with self._changed:
            if self._part:
                self._add(self._part)
                self._part = ""

    def drain(self, timeout: float) -> bool:
        """Wait until everything is written, at most ``timeout`` seconds. Returns whether nothing waits any more."""
        self.flush()
        with self._changed:
            return self._changed.wait_for(self._idle, timeout)

    def _idle(self) -> bool:
        return not self._pending and not self._writing and (self._failing or not self._dropped)

    def _add(self, text: str) -> None:
        data = text.encode("utf-8", errors="backslashreplace")
        if self._size + len(data) > self._max_pending:
            self._dropped += _lines(data)
        else:
            self._tell_dropped()
            self._append(data, _lines(data))
        self._changed.notify_all()

    def _append(self, data: bytes, lines: int) -> None:
        self._pending.append((data, lines))
        self._size += len(data)

    def _tell_dropped(self) -> None:
        """The note takes the place of the dropped lines."""
        if self._dropped:
            self._append(self._note(self._dropped).encode(), self._dropped)
            self._dropped = 0

    def _run(self) -> None:
        while True:
            batch, lines = self._next()
            written = _write(self._fd, batch)
            with self._changed:
                self._writing = False
                self._failing = not written
                self._dropped += 0 if written else lines
                self._changed.notify_all()
            if not written:  # a full disk may get room again; a reader that has exited stays away
                time.sleep(RETRY_INTERVAL)

    def _next(self) -> tuple[bytes, int]:
        with self._changed:
            self._changed.wait_for(lambda: self._pending or self._dropped)
            if not self._pending:
                self._tell_dropped()
            batch, lost = self._pending.popleft()
            while self._pending and len(batch) + len(self._pending[0][0]) <= MAX_BATCH:
                data, lines = self._pending.popleft()
                batch, lost = batch + data, lost + lines
            self._size -= len(batch)
            self._writing = True
            return batch, lost


def _lines(data: bytes) -> int:
    return max(1, data.count(b"\n"))


def _write(fd: int, data: bytes) -> bool:
    """False if the descriptor takes no data any more: its reader has exited, or the disk is full."""
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:  # another process has made the open file non-blocking
            select.select([], [fd], [])
        except OSError:
            return False
    return True


@contextlib.contextmanager
def background_output(note: Note) -> Iterator[None]:
    """Within the context, sys.stdout and sys.stderr never block. At its end, what waits gets DRAIN_TIMEOUT to be
    written; if that is not enough, both stay as they are: the flush at exit could still block."""
    _open_missing()
    before = sys.stdout, sys.stderr
    writers = BackgroundWriter(_descriptor(before[0], 1), note), BackgroundWriter(_descriptor(before[1], 2), note)
    sys.stdout, sys.stderr = writers
    try:
        yield
    finally:
        deadline = time.monotonic() + DRAIN_TIMEOUT
        drained = [writer.drain(max(0.0, deadline - time.monotonic())) for writer in writers]
        if all(drained):
            sys.stdout, sys.stderr = before


def _open_missing() -> None:
    """A standard descriptor that the parent has closed would become the number of the next socket, into which the log
    would then be written."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(fd)


def _descriptor(stream: TextIO | None, default: int) -> int:
    """Python sets a stream to None where its descriptor was closed."""
    if stream is None:
        return default
    stream.flush()
    return stream.fileno()

r"""A child's output: bytes in, bounded lines out, and a ring of the latest lines that can be read from a number on.

Caveat: progress bars end with ``\r`` and no newline, so a log record, or the last output before a crash, may share a
physical line with them. ``\r`` ends a line here; ``\r\n`` is one line end even when split over two chunks. An empty
segment is dropped only if a ``\r`` made it (tqdm writes ``\r`` first); a printed blank line is kept.

Pure: no I/O, no clock.
"""

import re
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

MAX_LINE = 8192  # bytes
MAX_BACKLOG = 1 << 20  # bytes of a pipe that are read and not processed yet
SLICE = 1024  # bytes processed at a time: at most a thousand lines, about 3 ms
CUT_MARK = " …[cut]"  # at the end of a truncated line

_END = re.compile(rb"\r\n|\r|\n")


class LineSplitter:
    """Splits the bytes of a pipe into complete lines. Undecodable bytes become U+FFFD."""

    __slots__ = ("_after_cr", "_max", "_over", "_part", "_started")

    def __init__(self, max_line: int = MAX_LINE) -> None:
        self._max = max_line
        self._part = bytearray()
        self._over = False  # the line is too long: the rest is dropped
        self._after_cr = False  # a \n that comes next belongs to the \r before it
        self._started = False  # a part of the current line has been seen

    def feed(self, data: bytes) -> list[str]:
        lines: list[str] = []
        if self._after_cr and data:
            self._after_cr = False
            if data[:1] == b"\n":
                data = data[1:]
        start = 0
        for match in _END.finditer(data):
            self._add(data[start : match.start()])
            start = match.end()
            ending = match.group()
            if self._started or ending == b"\n":
                lines.append(self._take())
            self._after_cr = ending == b"\r" and start == len(data)
        self._add(data[start:])
        return lines

    def flush(self) -> list[str]:
        """The unfinished line, if any: the pipe is closed."""
        return [self._take()] if self._started else []

    def _add(self, piece: bytes) -> None:
        if not piece:
            return
        self._started = True
        free = self._max - len(self._part)
        self._over = self._over or len(piece) > free
        self._part += piece[: max(free, 0)]

    def _take(self) -> str:
        text = self._part.decode("utf-8", errors="replace") + (CUT_MARK if self._over else "")
        self._part.clear()
        self._over = self._started = False
        return text


class Backlog:
    """Output that was read from a pipe and is not processed yet: bounded, so that a flood loses its oldest part.

    ``put`` adds what was read, ``take`` gives out a slice, ``take_last`` the end of it. ``dropped``: lines that were
    lost since it was last set to 0.
    """

    __slots__ = ("_chunks", "_max", "_size", "dropped")

    def __init__(self, max_bytes: int = MAX_BACKLOG) -> None:
        self._max = max_bytes
        self._chunks: deque[bytes] = deque()
        self._size = 0
        self.dropped = 0

    def __len__(self) -> int:
        """Bytes."""
        return self._size

    def put(self, data: bytes) -> None:
        if data:
            self._chunks.append(data)
            self._size += len(data)
        while self._size > self._max and len(self._chunks) > 1:
            self._drop(self._chunks.popleft())

    def take(self) -> bytes:
        """The oldest ``SLICE`` bytes or fewer; b"" = there is nothing."""
        if not self._chunks:
            return b""
        first = self._chunks.popleft()
        if len(first) > SLICE:
            self._chunks.appendleft(first[SLICE:])
        self._size -= min(len(first), SLICE)
        return first[:SLICE]

    def take_last(self, max_lines: int) -> bytes:
        """Everything, but no more than the last ``max_lines`` lines."""
        data = b"".join(self._chunks)
        self._chunks.clear()
        self._size = 0
        lines = data.rsplit(b"\n", max_lines + 1)
        if len(lines) <= max_lines + 1:
            return data
        self.dropped += lines[0].count(b"\n") + 1
        return b"\n".join(lines[1:])

    def _drop(self, data: bytes) -> None:
        """A chunk may begin and end within a line: what is left of such a line is joined to another."""
        self._size -= len(data)
        self.dropped += max(1, data.count(b"\n"))


class Entry(NamedTuple):
    seq: int  # from 1, never reused within one ring
    line: str


class Ring:
    """The latest lines, bounded by number and bytes. Appending is amortised O(1)."""

    __slots__ = ("_bytes", "_entries", "_max_bytes", "_max_lines", "_readers", "_seq")

    def __init__(self, max_lines: int = 2000, max_bytes: int = 1 << 20) -> None:
        self._entries: deque[tuple[int, Entry]] = deque()  # (size in bytes, entry)
        self._max_lines = max_lines
        self._max_bytes = max_bytes
        self._bytes = 0
        self._seq = 0
        self._readers: set[Callable[[], None]] = set()

    @property
    def last_seq(self) -> int:
        """Number of the newest line ever appended; 0 = none yet."""
        return self._seq

    def append(self, line: str) -> int:
        """Returns the line's number. A line larger than the whole ring is kept alone."""
        self._seq += 1
        size = len(line.encode("utf-8", errors="replace"))
        self._entries.append((size, Entry(self._seq, line)))
        self._bytes += size
        while len(self._entries) > self._max_lines or (self._bytes > self._max_bytes and len(self._entries) > 1):
            self._bytes -= self._entries.popleft()[0]
        for reader in self._readers:
            reader()
        return self._seq

    def subscribe(self, reader: Callable[[], None]) -> Callable[[], None]:
        """``reader`` is called at each new line, and must be fast. Returns the function that unsubscribes."""
        self._readers.add(reader)
        return lambda: self._readers.discard(reader)

    def tail(self, n: int) -> list[str]:
        """The last ``n`` lines, oldest first."""
        return [entry.line for entry in self._newest(n)]

    def since(self, seq: int) -> list[Entry]:
        """All lines after line ``seq`` that are still in the ring; a gap shows in the numbers."""
        return self._newest(self._seq - seq)

    def _newest(self, n: int) -> list[Entry]:
        taken: list[Entry] = []
        newest: Iterator[tuple[int, Entry]] = reversed(self._entries)
        for _, (_, entry) in zip(range(n), newest, strict=False):
            taken.append(entry)
        taken.reverse()
        return taken

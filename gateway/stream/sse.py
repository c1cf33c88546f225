r"""Bytes to server-sent events, framed on bytes.

    Framer.feed(bytes) -> [bytes, ...]   any split of the same bytes gives the same events, as they came
    read(bytes) -> Event                 one of them, read

An event ends at a blank line; a line ends with LF, CRLF or CR. Nothing is decoded here: text decoders and
``httpx.Response.aiter_lines`` also split at U+2028, which is legal inside JSON. Caveats: a CR at the end of a read
may be half a CRLF (the LF that follows is then an empty line of its own, which means nothing); and the last event of a
stream that ends without its blank line is no event (WHATWG, "dispatch the event").

Pure: no I/O, no clock.
"""

import re
from typing import NamedTuple

MAX_EVENT = 16 * 1024 * 1024
BOM = b"\xef\xbb\xbf"
END = b"\n\n"  # of an event, as nearly all write it

# Two line ends in a row. A CR counts alone only where no LF follows, or CRLF would be taken for two line ends.
_BLANK_LINE = re.compile(rb"(?:\r\n|\n|\r(?!\n))(?:\r\n?|\n)")


class Event(NamedTuple):
    """``data`` and ``comment`` are None where the event has none; several lines of one are joined with LF. ``bare``:
    lines that begin with no name of a field.

    A tuple, not a dataclass: one is made for each token, and a frozen dataclass takes twice the time.
    """

    data: bytes | None
    event: bytes
    comment: bytes | None
    bare: bytes | None = None


class EventTooLarge(Exception):  # named for what happened, as httpx names its own
    """``events`` were whole before the large one, in the same read."""

    def __init__(self, limit: int, events: list[bytes]) -> None:
        super().__init__(f"an event of more than {limit} bytes")
        self.events = events


class Framer:
    """One stream. Once it has raised EventTooLarge it does so at every call."""

    __slots__ = ("_at_start", "_buffer", "_has_cr", "_max_event", "_overflown", "_scanned")

    def __init__(self, max_event: int = MAX_EVENT) -> None:
        self._max_event = max_event
        self._buffer = bytearray()  # the event not ended yet
        self._scanned = 0  # of the buffer: holds no blank line up to here
        self._has_cr = False
        self._at_start = True
        self._overflown = False

    @property
    def between_events(self) -> bool:
        """What comes next begins an event."""
        return not (self._buffer or self._at_start or self._overflown)

    @property
    def rest(self) -> bytes:
        """Of an event that has not ended."""
        return bytes(self._buffer).strip(b"\r\n")

    def feed(self, data: bytes) -> list[bytes]:
        if self._overflown:
            raise EventTooLarge(self._max_event, [])
        if self._at_start:
            data = self._without_bom(data)
        if not self._has_cr and b"\r" in data:
            self._has_cr = True
        blocks, rest = self._blocks(data)
        events: list[bytes] = []
        for block in blocks:
            raw = block.lstrip(b"\r\n")
            if len(raw) > self._max_event:
                raise self._overflow(events)
            if raw:
                events.append(raw)
        # Two bytes may be the rest of an earlier blank line, two more the beginning of the next.
        if len(rest) > self._max_event + 4:
            raise self._overflow(events)
        return events

    def _overflow(self, events: list[bytes]) -> EventTooLarge:
        self._overflown = True
        self._buffer.clear()
        return EventTooLarge(self._max_event, events)

    def _without_bom(self, data: bytes) -> bytes:
        head = bytes(self._buffer) + data
        self._buffer.clear()
        if len(head) < len(BOM) and BOM.startswith(head):
            self._buffer += head
            return b""
        self._at_start = False
        return head.removeprefix(BOM)

    def _blocks(self, data: bytes) -> tuple[list[bytes], bytes | bytearray]:
        """What lies between blank lines, and the rest, which is also left in the buffer."""
        if self._buffer:
            self._buffer += data
            if not self._ends_within():
                return [], self._buffer
            data = bytes(self._buffer)
            self._buffer.clear()
        self._scanned = 0
        blocks = _BLANK_LINE.split(data) if self._has_cr else data.split(END)
        rest = blocks.pop()
        self._buffer += rest
        return blocks, rest

    def _ends_within(self) -> bool:
        """Look at new bytes only: a large event that comes in small reads would else be scanned again for each."""
        start = max(0, self._scanned - 1)  # the last of the old bytes may be the line end before the blank line
        self._scanned = len(self._buffer)
        if self._has_cr:
            return _BLANK_LINE.search(self._buffer, start) is not None
        return self._buffer.find(END, start) >= 0


def read(raw: bytes) -> Event:
    """``raw``: an event as it came, without the blank line that ends it."""
    if raw.startswith(b"data: ") and b"\n" not in raw and b"\r" not in raw:
        return Event(raw[6:], b"", None)
    data: list[bytes] = []
    comments: list[bytes] = []
    bare: list[bytes] = []
    event = b""
    for line in raw.splitlines():  # of bytes: at LF, CRLF and CR only
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if not name:
            comments.append(value)
        elif name == b"data":
            data.append(value)
        elif name == b"event":
            event = value
        elif name not in (b"id", b"retry"):
            bare.append(line)
    return Event(_joined(data), event, _joined(comments), _joined(bare))


def _joined(lines: list[bytes]) -> bytes | None:
    return b"\n".join(lines) if lines else None

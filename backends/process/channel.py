"""The gateway's end of the channel to a process that runs under the instrument (``instrument/instrument.py``).

    channel = Channel(id, clock)
    spawn(…, env | channel.environ, inherits=channel.theirs)     closes their end here once the process has it
    channel.listen(on_report)
    channel.report                                               the last one; None = there is none, or it is too old
    channel.tell(ReleasePool())
    channel.close()

Advice only: whatever comes, or does not, the process is supervised as one without an instrument. What is no report, or
comes too fast, ends the channel with one line in the log; the instrument then goes quiet.

Nothing here blocks: a read takes what is there, and a command for which there is no room is dropped.
"""

import asyncio
import logging
import os
import socket
from collections.abc import Callable, Mapping

from backends.domain.engine_command import EngineCommand, encoded
from backends.domain.report import EngineReport, parse_report
from backends.instrument.instrument import CHANNEL

log = logging.getLogger(__name__)

MAX_LINE = 1 << 16  # bytes
MAX_BYTES = 1 << 18  # that may come within a second: at most 20 reports of about 300 bytes do
STALE = 10.0  # seconds after which a report counts no longer: an idle process sends one every 4 s


class Channel:
    """``name``: of the replica, for the log. ``clock``: the event loop's time. Raises OSError: no descriptors left."""

    def __init__(self, name: str, clock: Callable[[], float]) -> None:
        self._name = name
        self._clock = clock
        self._ours, self.theirs = socket.socketpair()
        self._ours.setblocking(False)
        self._on_report: Callable[[EngineReport], None] = lambda _: None
        self._loop: asyncio.AbstractEventLoop | None = None  # that listens
        self._part = b""  # of a line
        self._report: EngineReport | None = None
        self._heard_at = 0.0
        self._second = 0.0  # when the present one began
        self._bytes = 0  # that came in it

    @property
    def environ(self) -> Mapping[str, str]:
        """For the process."""
        return {CHANNEL: str(self.theirs.fileno())}

    @property
    def report(self) -> EngineReport | None:
        fresh = self._clock() - self._heard_at <= STALE
        return self._report if fresh else None

    def listen(self, on_report: Callable[[EngineReport], None]) -> None:
        """Called once, on the event loop, after the process was started."""
        self._on_report = on_report
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._ours.fileno(), self._read)

    def tell(self, command: EngineCommand) -> bool:
        """False: it was not sent. The process does not confirm what it has carried out."""
        if self._loop is None or self._ours.fileno() < 0:
            return False
        line = encoded(command)
        try:
            sent = self._ours.send(line)
        except BlockingIOError:
            return False  # the instrument hangs
        except OSError:
            self.close()
            return False
        if sent < len(line):
            self._give_up("it does not read its commands")
        return sent == len(line)

    def close(self) -> None:
        self._report = None
        if self._ours.fileno() >= 0:
            if self._loop is not None:
                self._loop.remove_reader(self._ours.fileno())
            self._ours.close()

    def _read(self) -> None:
        try:
            data = os.read(self._ours.fileno(), MAX_LINE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:  # the process has ended, or its instrument
            self.close()
        elif self._too_fast(len(data)):
            self._give_up(f"more than {MAX_BYTES} bytes within a second")
        else:
            self._take(data)

    def _too_fast(self, size: int) -> bool:
        now = self._clock()
        if now - self._second >= 1.0:
            self._second, self._bytes = now, 0
        self._bytes += size
        return self._bytes > MAX_BYTES

    def _take(self, data: bytes) -> None:
        *lines, self._part = (self._part + data).split(b"\n")
        try:
            for line in lines:
                self._heard(parse_report(line))
        except ValueError as error:
            self._give_up(str(error))
        if len(self._part) > MAX_LINE:
            self._give_up(f"a line of more than {MAX_LINE} bytes")

    def _heard(self, report: EngineReport) -> None:
        self._report, self._heard_at = report, self._clock()
        self._on_report(report)

    def _give_up(self, reason: str) -> None:
        log.warning("reports of the process are not read any more", extra={"backend": self._name, "reason": reason})
        self.close()

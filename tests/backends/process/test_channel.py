"""The gateway's end of the channel, with the other end in the hands of the test."""

import asyncio
import fcntl
import json
import logging
import os
import socket
import sys
from collections.abc import Iterator

import pytest

from backends.domain.engine_command import ReleasePool, SetLimits
from backends.domain.report import PREFIX, EngineReport
from backends.instrument import instrument
from backends.process.channel import MAX_BYTES, MAX_LINE, STALE, Channel
from backends.process.child import SpawnError, spawn
from backends.process.output import LineSplitter
from tests.lives import until

REPORT = EngineReport(active=3, pooled=2, peak=5, generating=True)
LINE = b'{"active": 3, "pooled": 2, "peak": 5, "generating": true}\n'


class Ends:
    """``now``: the clock of the gateway's end. ``heard``: what it was told."""

    def __init__(self) -> None:
        self.now = 100.0
        self.heard: list[EngineReport] = []
        self.channel = Channel("m:0", lambda: self.now)
        self.theirs = self.channel.theirs.dup()
        self.theirs.settimeout(10.0)
        self.channel.theirs.close()

    def listen(self) -> None:
        self.channel.listen(self.heard.append)

    async def say(self, data: bytes) -> None:
        """Until all of it was read, or refused."""
        self.theirs.setblocking(False)
        while data:
            try:
                data = data[self.theirs.send(data) :]
            except BlockingIOError:
                await asyncio.sleep(0)
            except OSError:
                return

    def report(self) -> EngineReport | None:
        return self.channel.report

    @property
    def closed(self) -> bool:
        """As the process sees it."""
        try:
            return self.theirs.recv(1, socket.MSG_DONTWAIT | socket.MSG_PEEK) == b""
        except BlockingIOError:
            return False
        except ConnectionResetError:  # there was more to read
            return True


@pytest.fixture
def ends() -> Iterator[Ends]:
    both = Ends()
    yield both
    both.channel.close()
    both.theirs.close()


async def test_a_report_counts_until_it_is_too_old(ends: Ends) -> None:
    assert ends.report() is None
    ends.listen()
    await ends.say(LINE[:20])
    await ends.say(LINE[20:])
    await until(ends.report)
    assert (ends.report(), ends.heard) == (REPORT, [REPORT])
    ends.now += STALE
    assert ends.report() == REPORT
    ends.now += 0.1
    assert ends.report() is None, "the instrument hangs"
    await ends.say(LINE)
    await until(ends.report)


async def test_each_report_is_told(ends: Ends) -> None:
    ends.listen()
    await ends.say(LINE.replace(b"true", b"false") + LINE)
    await until(lambda: len(ends.heard) == 2)
    assert [each.generating for each in ends.heard] == [False, True]


@pytest.mark.parametrize(
    "garbage",
    [b"\xff\n", b"{}\n", b"\n", b"[" * MAX_LINE + b"\n", b"x" * (MAX_LINE + 1), LINE * (MAX_BYTES // len(LINE) + 1)],
    ids=["bytes", "object", "empty", "nested", "endless", "flood"],
)
async def test_garbage_ends_the_channel_with_one_line(
    ends: Ends, garbage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    ends.listen()
    await ends.say(LINE)
    with caplog.at_level(logging.INFO):
        await ends.say(garbage)
        await ends.say(LINE)
        await until(lambda: ends.closed)
    assert ends.report() is None
    assert [(record.levelname, record.message) for record in caplog.records] == [
        ("WARNING", "reports of the process are not read any more")
    ]
    assert not ends.channel.tell(ReleasePool())


async def test_a_flood_is_counted_for_each_second(ends: Ends) -> None:
    ends.listen()
    half = LINE * (MAX_BYTES // len(LINE) // 2 + 1)
    await ends.say(half)
    await until(lambda: len(ends.heard) == half.count(b"\n"))
    ends.now += 1.0
    await ends.say(half)
    await until(lambda: len(ends.heard) == 2 * half.count(b"\n"))
    assert not ends.closed


async def test_the_end_of_the_process_is_no_news(ends: Ends, caplog: pytest.LogCaptureFixture) -> None:
    ends.listen()
    await ends.say(LINE)
    await until(ends.report)
    ends.theirs.close()
    await until(lambda: not ends.channel.tell(ReleasePool()))
    assert ends.report() is None
    assert not caplog.records


async def test_a_command_is_one_line(ends: Ends) -> None:
    assert not ends.channel.tell(ReleasePool()), "nobody is there yet"
    ends.listen()
    assert ends.channel.tell(SetLimits(cache=7))
    assert json.loads(ends.theirs.recv(1000)) == {"do": "limits", "cache": 7, "memory": None}


async def test_commands_to_an_instrument_that_hangs_are_dropped(ends: Ends) -> None:
    ends.listen()
    sent = 0
    while ends.channel.tell(ReleasePool()):
        sent += 1
        assert sent < 1_000_000
    assert sent > 10


async def test_a_child_gets_the_other_end_and_nothing_else() -> None:
    code = (
        "import os, socket; n = int(os.environ['MLX_GATEWAY_CHANNEL'])\n"
        "fds = [fd for fd in range(3, 300) if os.path.exists(f'/dev/fd/{fd}')]\n"
        "others = [fd for fd in fds if fd != n and os.get_inheritable(fd)]\n"
        'socket.socket(fileno=n).sendall(b\'{"active": %d, "pooled": 0, "peak": 0}\\n\' % len(others))'
    )
    channel, heard = Channel("m:0", lambda: 0.0), list[EngineReport]()
    assert not os.get_inheritable(channel.theirs.fileno())
    child = await spawn(
        [sys.executable, "-I", "-S", "-c", code],
        {**os.environ, **channel.environ},
        record=lambda *_: None,
        on_line=lambda _: None,
        splitter=LineSplitter,
        inherits=channel.theirs,
    )
    channel.listen(heard.append)
    await until(lambda: heard)
    assert channel.theirs.fileno() < 0
    assert heard[0].active == 0
    await child.stop(0.0)
    await until(lambda: not channel.tell(ReleasePool()))


async def test_a_start_that_fails_closes_the_other_end() -> None:
    channel = Channel("m:0", lambda: 0.0)
    number = channel.theirs.fileno()
    with pytest.raises(SpawnError):
        await spawn(
            ["/nonexistent/program"],
            {},
            record=lambda *_: None,
            on_line=lambda _: None,
            splitter=LineSplitter,
            inherits=channel.theirs,
        )
    with pytest.raises(OSError, match="Bad file descriptor"):
        fcntl.fcntl(number, fcntl.F_GETFD)
    channel.close()


def test_both_sides_know_the_same_beginning_of_its_lines() -> None:
    assert instrument.PREFIX == PREFIX

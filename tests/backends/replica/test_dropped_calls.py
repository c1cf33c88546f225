"""Tool calls that a server drops: read from its log, and each told to one request."""

import asyncio

from backends.diagnosis.log_parser import LogParser
from backends.replica.dropped_calls import RAISED_WITHIN, DroppedCalls

DROPPED = (
    "2026-11-22 17:30:00,000 - WARNING - Failed to parse tool call (JSONDecodeError: Expecting value: line 1 column 1 "
    "(char 0)) — tool text was likely truncated mid-generation."
)
DASHES = "-" * 40


def raised(port: int, frame: str = "tool_calls=tool_formatter(tool_calls),") -> list[str]:
    """As socketserver and mlx_lm.server 0.32.2 write it."""
    return [
        DASHES,
        f"Exception occurred during processing of request from ('127.0.0.1', {port})",
        "Traceback (most recent call last):",
        '  File "/lib/python3.11/site-packages/mlx_lm/server.py", line 1654, in handle_completion',
        f"    {frame}",
        "AttributeError: 'int' object has no attribute 'pop'",
        DASHES,
    ]


class Scene:
    def __init__(self) -> None:
        self.now = 100.0
        self.log = LogParser()
        self.calls = DroppedCalls(lambda: self.now)

    def print(self, *lines: str) -> None:
        for line in lines:
            self.log.feed(line)
            self.calls.note(self.log)


async def test_each_line_counts_once() -> None:
    scene = Scene()
    scene.print(DROPPED)
    assert await scene.calls.claim(since=99.9, within=0.001)
    assert not await scene.calls.claim(since=99.9, within=0.001)


async def test_a_line_of_another_moment_does_not_count() -> None:
    scene = Scene()
    scene.print(DROPPED)
    assert not await scene.calls.claim(since=100.1, within=0.001)
    scene.now = 100.2
    scene.print(DROPPED)
    assert await scene.calls.claim(since=100.1, within=0.001)


async def test_the_log_may_come_a_little_later_than_the_answer() -> None:
    scene = Scene()
    claim = asyncio.ensure_future(scene.calls.claim(since=99.9, within=5))
    await asyncio.sleep(0)
    scene.print("2026-11-22 17:30:00,000 - INFO - Prompt processing progress: 1/2", DROPPED)
    assert await claim


async def test_a_traceback_names_the_request() -> None:
    scene = Scene()
    scene.print(*raised(5001), *raised(5002, "self.wfile.flush()"))
    assert not scene.calls.claim_raised(5002)
    assert scene.calls.claim_raised(5001)
    assert not scene.calls.claim_raised(5001)


async def test_a_port_is_not_remembered_for_long() -> None:
    scene = Scene()
    scene.print(*raised(5001))
    scene.now += RAISED_WITHIN + 1
    assert not scene.calls.claim_raised(5001)


async def test_text_of_clients_and_models_does_not_count() -> None:
    scene = Scene()
    scene.print(
        f"2026-11-22 17:30:00,000 - ERROR - JSONDecodeError: Expecting value - Raw body: {DROPPED}",
        DROPPED,
        '127.0.0.1 - - [22/Nov/2026 17:30:00] "POST /v1/completions HTTP/1.1" 400 -',
        "2026-11-22 17:30:00,000 - INFO - Failed to parse tool call (of the prompt)",
    )
    assert not await scene.calls.claim(since=0.0, within=0.001)

"""What the tests of a diagnosis read: the corpus in data/failures.jsonl, and lines of every kind that a log holds."""

import json
from pathlib import Path
from typing import NamedTuple

from hypothesis import strategies as st

from backends.diagnosis.verdict import parse_exit
from backends.domain.failure import Cause
from backends.process.output import LineSplitter


class Row(NamedTuple):
    text: str
    expected: Cause
    returncode: int | None
    silent: bool  # the text alone cannot tell
    trying: bool  # no failure yet: the process tries again by itself


def lines_of(text: str) -> list[str]:
    splitter = LineSplitter()
    return [*splitter.feed(text.encode()), *splitter.flush()]


def _corpus() -> list[Row]:
    path = Path(__file__).parents[2] / "data" / "failures.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [
        Row(
            row["text"],
            Cause(row["expected"]),
            None if row["exit"] is None else parse_exit(str(row["exit"])),
            row["by_exit_alone"],
            row.get("trying", False),
        )
        for row in rows
    ]


CORPUS = _corpus()
OOM = (
    "[METAL] Command buffer execution failed: Insufficient Memory "
    "(00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)"
)
ABORT = "libc++abi: terminating due to uncaught exception of type std::runtime_error: "
STAMP = "2026-10-03 09:14:07,311"
ACCESS = "127.0.0.1 - - [03/Oct/2026 09:14:07] "
POSTED = ACCESS + '"POST /v1/chat/completions HTTP/1.1" 200 -'
REFUSED = ACCESS + '"POST /v1/chat/completions HTTP/1.1" 400 -'
RAW = f"{STAMP} - ERROR - JSONDecodeError: Expecting value: line 1 column 1 (char 0) - Raw body: "
DIED = f"{STAMP} - ERROR - mlx_lm.server generation thread died: "


PARTS = st.sampled_from(
    [
        RAW + "x",
        REFUSED,
        POSTED,
        ABORT + OOM,
        DIED + "x",
        "-" * 40,
        "Exception occurred during processing of request from x",
        "ValueError: x",
        f"{STAMP} - DEBUG - x",
        f"{STAMP} - ERROR - Invalid Request Body: [",
        "\t1",
        "]",
        "KeyboardInterrupt",
        "",
        'HTTP body: {"error": 1}',
        f"{STAMP} - INFO - Starting httpd at 127.0.0.1 on port 1...",
        "BrokenPipeError: [Errno 32] x",
        f"RuntimeError: {OOM}",
        f"progress 40%|{STAMP} - INFO - Starting httpd at 127.0.0.1 on port 1...",
        f"{STAMP} - INFO - Prompt processing progress: 5/10",
        f"{STAMP} - WARNING - Error while downloading from x",
        "zsh: killed     python",
    ]
)

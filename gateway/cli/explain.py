"""``mlx-gateway explain``: the cause of a backend's failure, from its output in a file or on stdin.

``explain`` and ``render`` are pure; ``main`` reads the text and prints.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, TextIO, TypedDict

from backends.diagnosis.log_parser import read
from backends.diagnosis.verdict import Evidence, judge, parse_exit
from backends.process.output import LineSplitter
from gateway.api.error_mapping import CODE_OF_CAUSE
from gateway.cli.terminal import printable, printable_json

TAIL = 4 << 20  # bytes; only the end of longer output is read


class Explanation(TypedDict):
    cause: str
    code: str | None
    evidence: list[str]
    backend_failed: bool
    advice: str


def explain(lines: Sequence[str], returncode: int | None = None) -> Explanation:
    verdict = judge(Evidence(read(lines), returncode))
    return {
        "cause": verdict.cause.value,
        "code": CODE_OF_CAUSE.get(verdict.cause),
        "evidence": list(verdict.evidence),
        "backend_failed": verdict.backend_failed,
        "advice": f"{verdict.message[0].upper()}{verdict.message[1:]}. {verdict.advice}.",
    }


def render(explanation: Explanation) -> str:
    """Text for a terminal; ends with a newline."""
    rows = [
        f"cause:    {explanation['cause']}",
        f"code:     {explanation['code'] or '-'}",
        f"failed:   {'yes' if explanation['backend_failed'] else 'no, the backend is not at fault'}",
        *(f"{'evidence:' if i == 0 else '':9} {line}" for i, line in enumerate(explanation["evidence"])),
        f"advice:   {explanation['advice']}",
    ]
    return "".join(f"{printable(row)}\n" for row in rows)


def main(file: str | None, exit_status: str | None, as_json: bool, *, stdin: BinaryIO, stdout: TextIO) -> int:
    """``file``: None or ``-`` is stdin. Exit status: 0; 2 for an unreadable file or an invalid ``--exit``."""
    try:
        returncode = None if exit_status is None else parse_exit(exit_status)
    except ValueError as error:
        print(f"--exit: {error}", file=sys.stderr)
        return 2
    try:
        data = stdin.read()[-TAIL:] if file in (None, "-") else _tail(Path(file or ""))
    except OSError as error:
        print(f"{file}: {error.strerror or error}", file=sys.stderr)
        return 2
    explanation = explain(split(data), returncode)
    told = printable_json(json.dumps(explanation, ensure_ascii=False)) + "\n" if as_json else render(explanation)
    stdout.write(told)
    return 0


def split(data: bytes) -> list[str]:
    splitter = LineSplitter()
    return [*splitter.feed(data), *splitter.flush()]


def _tail(path: Path) -> bytes:
    with path.open("rb") as source:
        size = source.seek(0, 2)
        source.seek(max(0, size - TAIL))
        return source.read()

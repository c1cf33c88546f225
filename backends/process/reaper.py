"""The reaper: a small process that ends the gateway's children when the gateway has ended, for whatever reason.

    python -m backends.process.reaper RUN_RECORD       started by ``reaper_control.ReaperHandle``

The reaper reads from a pipe whose only writing end the gateway holds. A line is the run record as it is now; the last
complete one counts, so that a disk that is full or slow hides no child. End of file means that the gateway has exited,
crashed or been SIGKILLed; the kernel signals it at once, on every system. The reaper then ends all children that are
still on record, each with the grace that its model has. After a clean end of all children there are none.

The reaper ignores the signals that are meant for the gateway (Ctrl-C, a service manager's SIGTERM to all processes, a
closed terminal), because their outcome shows in the pipe.
"""

import argparse
import os
import signal
from collections.abc import Sequence
from pathlib import Path

from backends.process.reaping import reap_run
from backends.process.run_record import RunData, parse

CHUNK = 1 << 16  # bytes
MAX_LINE = 1 << 20  # bytes; a longer one is no run record


def main(argv: Sequence[str] | None = None) -> int:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    parser = argparse.ArgumentParser(prog="backends.process.reaper")
    parser.add_argument("run_record", type=Path)
    options = parser.parse_args(argv)
    told = _last_line()
    left = [child for child in reap_run(options.run_record, _parsed(told)) if not child.gone]
    return 1 if left else 0


def _last_line() -> bytes:
    """The last complete line, when the pipe has ended."""
    line = rest = b""
    try:
        while chunk := os.read(0, CHUNK):
            *lines, rest = (rest + chunk).split(b"\n")
            line = lines[-1] if lines else line
            rest = rest[-MAX_LINE:]
    except OSError:  # a broken descriptor counts as end of file
        pass
    return line


def _parsed(line: bytes) -> RunData | None:
    try:
        return parse(line) if line else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


if __name__ == "__main__":
    raise SystemExit(main())

"""The reaper: a small process that ends the gateway's children when the gateway has ended, for whatever reason.

    python -m backends.process.reaper RUN_RECORD --grace SECONDS       started by ``reaper_control.ReaperHandle``

The reaper reads from a pipe whose only writing end the gateway holds, and to which nothing is ever written. End of file
means that the gateway has exited, crashed or been SIGKILLed; the kernel signals it at once, on every system. The reaper
then ends all children that are still in the run record. After a clean end of all children there is no record, and
nothing to do.

The reaper ignores the signals that are meant for the gateway (Ctrl-C, a service manager's SIGTERM to all processes, a
closed terminal), because their outcome shows in the pipe.
"""

import argparse
import os
import signal
from collections.abc import Sequence
from pathlib import Path

from backends.process.run_record import reap_run


def main(argv: Sequence[str] | None = None) -> int:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    parser = argparse.ArgumentParser(prog="backends.process.reaper")
    parser.add_argument("run_record", type=Path)
    parser.add_argument("--grace", type=float, default=3.0)
    options = parser.parse_args(argv)
    _await_end_of_input()
    left = [child for child in reap_run(options.run_record, grace=options.grace) if not child.gone]
    return 1 if left else 0


def _await_end_of_input() -> None:
    try:
        while os.read(0, 4096):
            pass
    except OSError:  # a broken descriptor counts as end of file
        return


if __name__ == "__main__":
    raise SystemExit(main())

"""What a process has done so far. Pure: no I/O, no clock."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Activity:
    """Seconds since the processes began: ``computed``, and ``queued`` for a core, which each thread is for itself.
    ``stopped``: one of them is stopped (SIGSTOP), and does nothing until it is continued."""

    computed: float
    queued: float = 0.0
    stopped: bool = False

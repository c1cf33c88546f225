"""Intervals and waits of the supervision, as one value that is an argument, so that tests can shorten them.

Pure: no I/O, no clock.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Cadence:
    """Seconds. Timeouts that an operator may set are in ``spec.Timeouts``."""

    liveness_tick: float = 1.0  # between two liveness checks of a ready replica
    probe_interval: float = 2.0  # between an answer of /health and the next probe
    mend_retry: float = 30.0  # between two looks whether what a replica was given up for has changed
    mend_settle: float = 1.0  # without a change, until what was seen to change counts as changed
    memory_retry: float = 30.0  # until a replica that was refused memory asks again
    residency_tick: float = 0.5  # between two checks for idle and too large models
    reaper_tick: float = 2.0  # between two checks that the reaper process is running
    supervision_retry: float = 1.0  # after a bug in the gateway, until supervision of a replica restarts
    failed_stop: float = 5.0  # from SIGTERM to SIGKILL, at most, for a process that has failed: nothing to finish
    unkillable: float = 10.0  # after SIGKILL: a process stuck in a driver may never exit
    group_poll: float = 0.05  # between two checks whether a process group is empty: no system notifies of that
    occupancy_wait: float = 0.8  # for the look at who holds the memory, before the verdict on who ran out of it
    memory_poll: float = 0.5  # between two checks whether the memory of the last process is free: likewise
    health_timeout: float = 3.0  # for an answer of /health: a busy mlx_lm.server takes 0.2 s at most, in a prefill too
    abandoned_after: float = 10.0  # silence after which a client that leaves casts doubt on the replica
    exit_wait: float = 0.25  # for the exit: a killed process is reaped some milliseconds after its connections broke
    evidence_wait: float = 1.0  # for /health after a failed call, and again for the verdict on the process
    ending_wait: float = 10.0  # for that verdict where nobody listens: much memory takes seconds to be given back
    start_pause: float = 0.1  # between two checks of a process that starts, at first
    start_pause_max: float = 2.0  # between two first requests that were answered with an error
    start_hint_silence: float = 3.0  # without an answer, after output that names a cause: the start has failed
    remote_retry_max: float = 10.0  # between two attempts to reach an unreachable server

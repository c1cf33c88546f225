"""How often things are looked at, and how long is waited between: one value, handed in, so that tests can hurry.

Pure: no I/O, no clock.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Cadence:
    """Seconds. What an operator may set is in ``spec.Timeouts``, not here."""

    liveness_tick: float = 1.0  # between two looks at a ready replica
    probe_interval: float = 2.0  # between an answer of /health and the next question
    memory_retry: float = 30.0  # until a replica that was refused memory asks for it again
    residency_tick: float = 0.5  # between two looks at idle and too large models
    reaper_tick: float = 2.0  # between two looks whether the reaper process lives
    supervision_retry: float = 1.0  # after a fault of ours, until a replica is watched again
    unkillable: float = 10.0  # after SIGKILL: a process stuck in a driver may never go
    group_poll: float = 0.05  # between two looks at whether a process group is empty, of which no system tells
    memory_poll: float = 0.5  # between two looks at whether the memory of the last process is back, likewise
    health_timeout: float = 3.0  # for an answer of /health: a busy mlx_lm.server takes 0.2 s at most, in a prefill too
    abandoned_after: float = 10.0  # a client that leaves after so much silence casts doubt on the replica
    exit_wait: float = 0.25  # a killed process is reaped some milliseconds after its connections broke
    evidence_wait: float = 1.0  # for /health after a broken call, and again for a verdict on the process
    start_pause: float = 0.1  # between two looks at a process that starts
    start_pause_max: float = 2.0  # between two first requests that were answered with an error
    start_hint_silence: float = 3.0  # output that names a cause, and no answer for so long: the start has failed
    remote_retry_max: float = 10.0  # between two tries to reach a server that cannot be reached

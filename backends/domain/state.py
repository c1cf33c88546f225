"""The states of a replica, and what its ``/health`` answered. Values only.

Pure: no I/O, no clock.
"""

from enum import StrEnum


class State(StrEnum):
    """Public: health and status show the values."""

    STOPPED = "stopped"  # by a person, or not started yet
    UNLOADED = "unloaded"  # no process, because no request needs the model; the next request loads it
    WAITING_FOR_MEMORY = "waiting_for_memory"  # no process yet: the memory for it is held by others
    STARTING = "starting"  # being launched, or launched and not proven to generate
    READY = "ready"
    DRAINING = "draining"  # serves what is in flight, takes no more
    STOPPING = "stopping"  # the process was told to end
    BACKOFF = "backoff"  # failed, and starts again at a known time
    FAILED = "failed"  # given up: only a person starts it again
    UNREACHABLE = "unreachable"  # remote servers only


class StartReason(StrEnum):
    """Why a replica is loaded. A start that a person or the gateway's own start asked for needs no request that waits;
    one on demand is called off when the last request has left the line."""

    EAGER = "eager"  # the start of the gateway
    DEMAND = "demand"  # requests wait in line for it
    OPERATOR = "operator"  # a person said so
    RECOVERY = "recovery"  # its process failed while it was in use
    RECYCLE = "recycle"  # its process outgrew the model's memory limit


class Health(StrEnum):
    """What ``/health`` answered."""

    OK = "ok"
    UNAVAILABLE = "unavailable"  # 503
    SILENT = "silent"
    REFUSED = "refused"
    UNKNOWN = "unknown"

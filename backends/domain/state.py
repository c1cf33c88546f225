"""The states of a replica, and the answers of its ``/health``. Values only.

Pure: no I/O, no clock.
"""

from enum import StrEnum


class State(StrEnum):
    """Public: ``/health`` and ``/api/status`` show the values."""

    STOPPED = "stopped"  # by an operator, or not started yet
    UNLOADED = "unloaded"  # no process, because no request needs the model; the next request loads it
    WAITING_FOR_MEMORY = "waiting_for_memory"  # no process yet: others hold the memory
    STARTING = "starting"  # being launched, or launched and not yet ready
    READY = "ready"
    DRAINING = "draining"  # finishes the requests in flight, admits no more
    STOPPING = "stopping"  # the process is being ended
    BACKOFF = "backoff"  # failed, restarts at a known time
    FAILED = "failed"  # given up until what it failed on has changed
    UNREACHABLE = "unreachable"  # remote servers only


class StartReason(StrEnum):
    """Why a replica is loaded. A load by an operator or at the start of the gateway needs no queued request; a load on
    demand is cancelled when the last request has left the queue."""

    EAGER = "eager"  # the start of the gateway
    DEMAND = "demand"  # requests are queued for it
    OPERATOR = "operator"  # by command
    RECOVERY = "recovery"  # its process failed while in use
    RECYCLE = "recycle"  # its process outgrew the model's memory limit
    RESTORE = "restore"  # other replicas of its model are ready, and it is missing


class Health(StrEnum):
    """What ``/health`` answered."""

    OK = "ok"
    UNAVAILABLE = "unavailable"  # 503
    LOADING = "loading"  # of an mlx-gateway: its model loads or restarts there, and requests for it wait
    SILENT = "silent"
    REFUSED = "refused"
    UNKNOWN = "unknown"

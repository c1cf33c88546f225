"""The states of a replica, and what its ``/health`` answered. Values only.

Pure: no I/O, no clock.
"""

from enum import StrEnum


class State(StrEnum):
    """Public: health and status show the values."""

    STOPPED = "stopped"
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    STOPPING = "stopping"
    BACKOFF = "backoff"
    FAILED = "failed"
    UNREACHABLE = "unreachable"  # remote servers only; never entered here


class Health(StrEnum):
    """What ``/health`` answered."""

    OK = "ok"
    UNAVAILABLE = "unavailable"  # 503
    SILENT = "silent"
    REFUSED = "refused"
    UNKNOWN = "unknown"

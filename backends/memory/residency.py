"""Residency of one replica: memory of its process, and when it was last used.

Whether the replica is loaded, unloaded or evicted is decided by the state machine (``replica.lifecycle``).

Pure: event loop times are arguments.
"""

from dataclasses import dataclass


@dataclass(slots=True)
class Residency:
    """Times in seconds, sizes in bytes."""

    used_at: float = 0.0  # when a client request last began or ended
    ready_at: float = 0.0  # when the present process became ready
    size_when_ready: int = 0  # 0 = not measured yet

    def became_ready(self, now: float) -> None:
        self.used_at = self.ready_at = now
        self.size_when_ready = 0

    def over_limit(self, memory: int, limit: int | None) -> bool:
        """The process has grown beyond ``limit`` (bytes). False if it exceeded ``limit`` from the start: a new process
        would too."""
        self.size_when_ready = self.size_when_ready or memory
        return limit is not None and self.size_when_ready <= limit < memory

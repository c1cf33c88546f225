"""The wait before a launch until the memory of the last process is available again.

On macOS a process killed with wired memory can leave it allocated for a while, or until a reboot; a large model loaded
on top of that brings the machine down (mlx-lm and llama.cpp reports of kernel panics). On Linux it is free at once.

The wait asks for no more than was available before the last process, and lasts PATIENCE at most: another program may
hold the missing memory.

Pure: no I/O, no clock.
"""

from dataclasses import dataclass

PATIENCE = 60.0  # seconds since the end of the process: the longest wait
TOLERANCE = 0.1  # share of the footprint: other programs use memory too
SMALL = 256 << 20  # bytes, of a footprint; below it, there is no wait


@dataclass(slots=True)
class ReclaimWait:
    """Bytes. ``before``: available when the last process began; ``footprint``: its highest measured footprint."""

    before: int = 0
    footprint: int = 0

    def begin(self, available: int) -> None:
        self.before, self.footprint = available, 0

    def note(self, footprint: int | None) -> None:
        self.footprint = max(self.footprint, footprint or 0)

    @property
    def needed(self) -> int:
        """Bytes that must be available before the next launch: the last footprint, or ``before`` where that is less."""
        if self.footprint < SMALL:
            return 0
        return int(min(self.before - TOLERANCE * self.footprint, self.footprint * (1 + TOLERANCE)))

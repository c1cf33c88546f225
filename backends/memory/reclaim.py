"""The wait before a launch until the memory of the last process is available again.

On macOS a process killed with wired memory can leave it allocated for a while, or until a reboot; a large model loaded
on top of that brings the machine down (mlx-lm and llama.cpp reports of kernel panics). On Linux it is free at once.

Until it is, it also counts as held by the model that has ended (``Lingering``): another model must not be loaded on top
of it either.

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

    def lingering(self, ended_at: float) -> "Lingering":
        return Lingering(self.needed, self.footprint, ended_at + PATIENCE)


@dataclass(frozen=True, slots=True)
class Lingering:
    """Memory of a process that has ended. ``needed``: bytes that are available once it is back; ``size``: bytes that it
    held; ``until``: when it is given up."""

    needed: int
    size: int
    until: float

    def missing(self, available: int, now: float) -> int:
        """Bytes that count as not back yet: all of them, since nothing tells whose the available memory is."""
        return self.size if available < self.needed and now < self.until else 0

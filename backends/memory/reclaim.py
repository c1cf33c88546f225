"""The wait, before a launch, until the system has back the memory of the last process.

On macOS a process killed with wired memory can leave it behind for a while, or until a reboot; a big model loaded on
top of that takes the machine down (mlx-lm and llama.cpp reports of kernel panics). On Linux it is back at once.

The wait is never for more than was available before the last process, and never for longer than PATIENCE: what is
missing may be another program's.

Pure: no I/O, no clock.
"""

from dataclasses import dataclass

from backends.memory import units

PATIENCE = 60.0  # seconds
SLACK = 0.1  # of its footprint: others use memory too
SMALL = 256 << 20  # bytes; below it, it is not worth a wait


@dataclass(slots=True)
class ReclaimWait:
    """Bytes. ``before``: available when the last process began; ``footprint``: the most that it was seen to use."""

    before: int = 0
    footprint: int = 0

    def begin(self, available: int) -> None:
        self.before, self.footprint = available, 0

    def note(self, footprint: int | None) -> None:
        self.footprint = max(self.footprint, footprint or 0)

    @property
    def needed(self) -> int:
        """Available before the next process begins: what the last one used, unless there was less before it."""
        if self.footprint < SMALL:
            return 0
        return int(min(self.before - SLACK * self.footprint, self.footprint * (1 + SLACK)))

    def missing(self, available: int) -> str:
        """What to say while a launch waits; "" = it need not."""
        if available >= self.needed:
            return ""
        return f"waits for memory: {units.memory(available)} available, needs {units.memory(self.needed)}"

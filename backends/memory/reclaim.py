"""Is the memory of the last life back? Asked before the next, of the system, since the process is gone.

On macOS a process killed with wired memory can leave it behind for a while, or until a reboot; a big model loaded on
top of that takes the machine down (mlx-lm and llama.cpp reports of kernel panics). On Linux it is back at once.

Never waits for more than there was before that life, and never for ever: what is missing may be another program's.
Pure.
"""

from dataclasses import dataclass

PATIENCE = 60.0  # seconds
SLACK = 0.1  # of its footprint: others use memory too
SMALL = 256 << 20  # bytes; below it, it is not worth a wait


@dataclass(slots=True)
class ReclaimWait:
    """Bytes. ``before``: available when the last life began; ``footprint``: the most it was seen to use."""

    before: int = 0
    footprint: int = 0

    def begin(self, available: int) -> None:
        self.before, self.footprint = available, 0

    def note(self, footprint: int | None) -> None:
        self.footprint = max(self.footprint, footprint or 0)

    @property
    def needed(self) -> int:
        """Available before the next life begins: what the last one used, unless there was less before it."""
        if self.footprint < SMALL:
            return 0
        return int(min(self.before - SLACK * self.footprint, self.footprint * (1 + SLACK)))

    def missing(self, available: int) -> str:
        """What to say while it waits; "" = it need not."""
        if available >= self.needed:
            return ""
        return f"waits for memory: {_gib(available)} available, needs {_gib(self.needed)}"


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"

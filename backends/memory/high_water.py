"""High-water marks: the highest measured footprint of each model, over all instances and runs. Preferred to estimates.

While a model loads, its mark rises twice a second: so a mark must rise by a share to be noted, and ``LearnedNumbers``
writes all changes together.
"""

from pathlib import Path

from backends.domain.spec import Launch
from backends.memory.units import is_size
from backends.process.learned import LearnedNumbers

NAME = "memory.json"
MIN_GROWTH = 1.01  # factor by which a mark must rise to be noted
MAX_SHARE = 0.75  # of the machine's memory, that a mark may ask for: more is never free, nor can Metal wire more


class HighWaterMarks:
    """``path``: None = in memory only. ``total``: bytes of memory of the machine; None = no limit on a mark."""

    def __init__(self, path: Path | None = None, *, total: int | None = None) -> None:
        self._most = None if total is None else int(MAX_SHARE * total)
        self._marks = LearnedNumbers(path, "memory peaks", lambda peak: is_size(peak, total))
        self.keep_saved = self._marks.keep_saved
        self.save = self._marks.save

    def get(self, launch: Launch) -> int | None:
        """Bytes; None = never measured. Never so much that the model could not be loaded any more: with compressed
        memory, a process on macOS can grow beyond what the machine has."""
        seen = self._marks.get(launch)
        if seen is None:
            return None
        return int(seen) if self._most is None else min(int(seen), self._most)

    def note(self, launch: Launch, footprint: int) -> None:
        """``footprint``: bytes."""
        if footprint > (self._marks.get(launch) or 0) * MIN_GROWTH:
            self._marks.note(launch, footprint)

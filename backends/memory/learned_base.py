"""Memory of an idle process with empty caches (weights, runtime, Python), as its reports showed after it became ready.
Preferred to the estimate from the files, and kept between runs.
"""

from pathlib import Path

from backends.domain.spec import Launch
from backends.memory.units import is_size
from backends.process.learned import LearnedNumbers

NAME = "memory_base.json"


class LearnedBases:
    """``path``: None = in memory only. ``total``: bytes of memory of the machine; None = no limit."""

    def __init__(self, path: Path | None = None, *, total: int | None = None) -> None:
        self._bases = LearnedNumbers(path, "memory of idle models", lambda base: is_size(base, total))
        self.keep_saved = self._bases.keep_saved
        self.save = self._bases.save

    def get(self, launch: Launch) -> int | None:
        """Bytes; None = never measured."""
        base = self._bases.get(launch)
        return None if base is None else int(base)

    def note(self, launch: Launch, base: int) -> None:
        """``base``: bytes. The last one counts: another version of the engine has other figures."""
        if base > 0 and base != self._bases.get(launch):
            self._bases.note(launch, base)

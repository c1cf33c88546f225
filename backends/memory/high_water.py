"""High-water marks: the most memory that each model was seen to take, over all lives and runs. It beats any estimate.

Kept by the command line, since other flags are another size. A file that cannot be read is begun anew, and one that
cannot be written costs only what was learned. While a model loads, its mark rises twice a second: so ``note`` only
remembers, and ``keep_saved`` writes, off the event loop, what has come together meanwhile.
"""

import asyncio
import hashlib
import json
import logging
import threading
from pathlib import Path
from typing import Any

from backends.domain.spec import Launch

log = logging.getLogger(__name__)

NAME = "memory.json"
GROWTH = 1.01  # a mark that rises by less is not worth a write


class HighWaterMarks:
    """``path``: None = in memory only."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._known: dict[str, int] = _read(path) if path is not None else {}
        self._saved = dict(self._known)
        self._risen = asyncio.Event()
        self._saving = threading.Lock()

    def get(self, launch: Launch) -> int | None:
        """Bytes; None = never seen."""
        return self._known.get(_key(launch))

    def note(self, launch: Launch, footprint: int) -> None:
        """``footprint``: bytes."""
        key = _key(launch)
        if footprint > self._known.get(key, 0) * GROWTH:
            self._known[key] = footprint
            self._risen.set()

    async def keep_saved(self) -> None:
        """Writes the file after each change, until it is cancelled; then ``save`` has to be called once more."""
        while True:
            await self._risen.wait()
            self._risen.clear()
            await asyncio.to_thread(self.save)

    def save(self) -> None:
        """Blocks. Nothing is written where nothing has changed."""
        with self._saving:
            known = dict(self._known)
            if self._path is not None and known != self._saved:
                _write(self._path, known)
            self._saved = known


def _write(path: Path, known: dict[str, int]) -> None:
    """Whole or not at all."""
    try:
        fresh = path.with_suffix(".new")
        fresh.write_text(json.dumps(known, indent=1))
        fresh.replace(path)
    except OSError as error:
        log.warning("memory peaks not kept", extra={"path": path, "reason": error.strerror or error})


def _key(launch: Launch) -> str:
    return hashlib.sha256("\0".join(launch.argv).encode("utf-8", "surrogateescape")).hexdigest()[:24]


def _read(path: Path) -> dict[str, int]:
    try:
        found: Any = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        log.warning("memory peaks not read", extra={"path": path, "reason": error})
        return {}
    if not isinstance(found, dict):
        return {}
    return {str(key): peak for key, peak in found.items() if isinstance(peak, int) and peak > 0}

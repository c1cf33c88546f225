"""High-water marks: the highest measured footprint of each model, over all instances and runs. Preferred to estimates.

Keyed by the command line, because other flags mean another size. A file that cannot be read is replaced; one that
cannot be written loses the new marks, nothing else. While a model loads, its mark rises twice a second: so ``note``
only updates memory, and ``keep_saved`` writes all changes together, off the event loop.
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
MIN_GROWTH = 1.01  # factor by which a mark must rise to be noted


class HighWaterMarks:
    """``path``: None = in memory only."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._known: dict[str, int] = _read(path) if path is not None else {}
        self._saved = dict(self._known)
        self._risen = asyncio.Event()
        self._saving = threading.Lock()

    def get(self, launch: Launch) -> int | None:
        """Bytes; None = never measured."""
        return self._known.get(_key(launch))

    def note(self, launch: Launch, footprint: int) -> None:
        """``footprint``: bytes."""
        key = _key(launch)
        if footprint > self._known.get(key, 0) * MIN_GROWTH:
            self._known[key] = footprint
            self._risen.set()

    async def keep_saved(self) -> None:
        """Writes the file after each change, until cancelled; then ``save`` must be called once more."""
        while True:
            await self._risen.wait()
            self._risen.clear()
            await asyncio.to_thread(self.save)

    def save(self) -> None:
        """Blocks. Writes only if a mark has changed."""
        with self._saving:
            known = dict(self._known)
            if self._path is not None and known != self._saved:
                _write(self._path, known)
            self._saved = known


def _write(path: Path, known: dict[str, int]) -> None:
    """Atomic."""
    try:
        fresh = path.with_suffix(".new")
        fresh.write_text(json.dumps(known, indent=1))
        fresh.replace(path)
    except OSError as error:
        log.warning("memory peaks not saved", extra={"path": path, "reason": error.strerror or error})


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

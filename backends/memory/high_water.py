"""High-water marks: the highest measured footprint of each model, over all instances and runs. Preferred to estimates.

Keyed by the command line, because other flags mean another size. A file that is not valid is set aside, and a mark that
no process can have reached is dropped; a file that cannot be written loses the new marks, nothing else. While a model
loads, its mark rises twice a second: so ``note`` only updates memory, and ``keep_saved`` writes all changes together,
off the event loop.
"""

import asyncio
import hashlib
import json
import logging
import threading
from pathlib import Path
from typing import Any

from backends.domain.spec import Launch
from backends.process import state_folder

log = logging.getLogger(__name__)

NAME = "memory.json"
MIN_GROWTH = 1.01  # factor by which a mark must rise to be noted
MAX_MARKS = 1000  # each change of a command line makes a new one; the oldest are dropped
MAX_SHARE = 0.75  # of the machine's memory, that a mark may ask for: more is never free, nor can Metal wire more


class HighWaterMarks:
    """``path``: None = in memory only. ``total``: bytes of memory of the machine; None = no limit on a mark."""

    def __init__(self, path: Path | None = None, *, total: int | None = None) -> None:
        self._path = path
        self._most = None if total is None else int(MAX_SHARE * total)
        self._known: dict[str, int] = _read(path, total) if path is not None else {}
        self._saved = dict(self._known)
        self._risen = asyncio.Event()
        self._saving = threading.Lock()

    def get(self, launch: Launch) -> int | None:
        """Bytes; None = never measured. Never so much that the model could not be loaded any more: with compressed
        memory, a process on macOS can grow beyond what the machine has."""
        seen = self._known.get(_key(launch))
        return seen if seen is None or self._most is None else min(seen, self._most)

    def note(self, launch: Launch, footprint: int) -> None:
        """``footprint``: bytes."""
        key = _key(launch)
        if footprint > self._known.get(key, 0) * MIN_GROWTH:
            self._known.pop(key, None)  # the latest last
            self._known[key] = footprint
            if len(self._known) > MAX_MARKS:
                del self._known[next(iter(self._known))]
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
    try:
        state_folder.write(path, json.dumps(known, indent=1).encode())
    except OSError as error:
        log.warning("memory peaks not saved", extra={"path": path, "reason": error.strerror or error})


def _key(launch: Launch) -> str:
    return hashlib.sha256("\0".join(launch.argv).encode("utf-8", "surrogateescape")).hexdigest()[:24]


def _read(path: Path, total: int | None) -> dict[str, int]:
    try:
        found: Any = json.loads(state_folder.read(path))
        if not isinstance(found, dict):
            raise TypeError(f"expected an object, got {found!r:.100}")  # noqa: TRY301
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, RecursionError) as error:
        aside = state_folder.set_aside(path)
        log.warning("memory peaks not valid, file set aside", extra={"path": path, "to": aside, "reason": error})
        return {}
    known = {key: peak for key, peak in found.items() if type(peak) is int and 0 < peak <= (total or peak)}
    if dropped := len(found) - len(known):
        log.warning("memory peaks dropped: no process can have them", extra={"path": path, "count": dropped})
    return dict(list(known.items())[-MAX_MARKS:])

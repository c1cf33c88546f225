"""A number learned for each command line, kept in a file between runs: other flags are another program.

A file that is not valid is set aside, and a number that cannot be true is dropped; a file that cannot be written loses
what is new, nothing else. ``note`` only updates memory: ``keep_saved`` writes all changes together, off the event loop.
"""

import asyncio
import hashlib
import json
import logging
import threading
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from backends.domain.spec import Launch
from backends.process import state_folder

log = logging.getLogger(__name__)

MAX_NUMBERS = 1000  # each change of a command line makes a new one; the oldest are dropped


class LearnedNumbers:
    """``path``: None = in memory only. ``what``: the numbers, in words for the log. ``plausible``: whether a value of
    the file, of any JSON type, may be such a number."""

    def __init__(self, path: Path | None, what: str, plausible: Callable[[Any], bool]) -> None:
        self._path = path
        self._what = what
        self._known: dict[str, float] = self._read(path, plausible) if path is not None else {}
        self._saved = dict(self._known)
        self._changed = asyncio.Event()
        self._saving = threading.Lock()

    def get(self, launch: Launch) -> float | None:
        """None = never noted."""
        return self._known.get(_key(launch))

    def note(self, launch: Launch, number: float) -> None:
        key = _key(launch)
        self._known.pop(key, None)  # the latest last
        self._known[key] = number
        if len(self._known) > MAX_NUMBERS:
            del self._known[next(iter(self._known))]
        self._changed.set()

    async def keep_saved(self) -> None:
        """Writes the file after each change, until cancelled; then ``save`` must be called once more."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            await asyncio.to_thread(self.save)

    def save(self) -> None:
        """Blocks. Writes only if a number has changed."""
        with self._saving:
            known = dict(self._known)
            if self._path is not None and known != self._saved:
                self._write(self._path, known)
            self._saved = known

    def _write(self, path: Path, known: dict[str, float]) -> None:
        try:
            state_folder.write(path, json.dumps(known, indent=1).encode())
        except OSError as error:
            log.warning(f"{self._what} not saved", extra={"path": path, "reason": error.strerror or error})

    def _read(self, path: Path, plausible: Callable[[Any], bool]) -> dict[str, float]:
        try:
            found = _parsed(path)
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, RecursionError) as error:
            aside = state_folder.set_aside(path)
            extra = {"path": path, "to": aside, "reason": error}
            log.warning(f"{self._what} not valid, file set aside", extra=extra)
            return {}
        known = {key: number for key, number in found.items() if plausible(number)}
        if dropped := len(found) - len(known):
            log.warning(f"{self._what} dropped: no process can have them", extra={"path": path, "count": dropped})
        return dict(list(known.items())[-MAX_NUMBERS:])


def look_up(path: Path, launch: Launch, plausible: Callable[[Any], bool]) -> float | None:
    """The number in the file, for a program other than the one that keeps it: nothing is set aside or written."""
    try:
        number = _parsed(path).get(_key(launch))
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    return number if plausible(number) else None


def _parsed(path: Path) -> dict[str, Any]:
    found: Any = json.loads(state_folder.read(path))
    if not isinstance(found, dict):
        raise TypeError(f"expected an object, got {found!r:.100}")
    return found


def _key(launch: Launch) -> str:
    return _digest(launch.argv)


@lru_cache(MAX_NUMBERS)
def _digest(argv: tuple[str, ...]) -> str:
    return hashlib.sha256("\0".join(argv).encode("utf-8", "surrogateescape")).hexdigest()[:24]

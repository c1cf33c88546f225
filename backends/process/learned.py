"""What was learned of each command line, kept in a file between runs: other flags are another program.

A file that is not valid is set aside, and a value that cannot be true is dropped; a file that cannot be written loses
what is new, nothing else. ``note`` only updates memory: ``keep_saved`` writes all changes together, off the event loop.
"""

import asyncio
import hashlib
import json
import logging
import operator
import threading
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, Generic, TypeVar

from backends.domain.spec import Launch
from backends.process import state_folder

log = logging.getLogger(__name__)

MAX_VALUES = 1000  # each change of a command line makes a new one; the oldest are dropped
MAX_SECONDS = 24 * 3600.0  # nothing that is learned takes so long; a file that says so is wrong

T = TypeVar("T")


class Learned(Generic[T]):
    """``path``: None = in memory only. ``what``: the values, in words for the log. ``clean``: a value of the file, of
    any JSON type, or one that is noted, as it is kept; None = it cannot be true. ``counts``: (value known, new one) ->
    whether the new one replaces it. ``where``: what else the values are true of, as the machine."""

    def __init__(
        self,
        path: Path | None,
        what: str,
        clean: Callable[[Any], T | None],
        *,
        counts: Callable[[T, T], bool] = operator.ne,
        where: str = "",
    ) -> None:
        self._path = path
        self.what = what
        self._clean = clean
        self._counts = counts
        self._where = where
        self._known: dict[str, T] = self._read(path) if path is not None else {}
        self._saved = dict(self._known)
        self._changed = asyncio.Event()
        self._saving = threading.Lock()

    def get(self, launch: Launch) -> T | None:
        """None = never noted."""
        return self._known.get(_key(launch, self._where))

    def note(self, launch: Launch, value: T) -> None:
        key, cleaned = _key(launch, self._where), self._clean(value)
        known = self._known.get(key)
        if cleaned is None or (known is not None and not self._counts(known, cleaned)):
            return
        self._known.pop(key, None)  # the latest last
        self._known[key] = cleaned
        if len(self._known) > MAX_VALUES:
            del self._known[next(iter(self._known))]
        self._changed.set()

    async def keep_saved(self) -> None:
        """Writes the file after each change, until cancelled; then ``save`` must be called once more."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            await asyncio.to_thread(self.save)

    def save(self) -> None:
        """Blocks. Writes only if a value has changed."""
        with self._saving:
            known = dict(self._known)
            if self._path is not None and known != self._saved:
                self._write(self._path, known)
            self._saved = known

    def _write(self, path: Path, known: dict[str, T]) -> None:
        try:
            state_folder.write(path, json.dumps(known, indent=1).encode())
        except OSError as error:
            log.warning(f"{self.what} not saved", extra={"path": path, "reason": error.strerror or error})

    def _read(self, path: Path) -> dict[str, T]:
        try:
            found = _parsed(path)
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, RecursionError) as error:
            aside = state_folder.set_aside(path)
            extra = {"path": path, "to": aside, "reason": error}
            log.warning(f"{self.what} not valid, file set aside", extra=extra)
            return {}
        cleaned = ((key, self._clean(value)) for key, value in found.items())
        known = {key: value for key, value in cleaned if value is not None}
        if dropped := len(found) - len(known):
            log.warning(f"{self.what} dropped: no process can have them", extra={"path": path, "count": dropped})
        return dict(list(known.items())[-MAX_VALUES:])


def look_up(path: Path, launch: Launch, clean: Callable[[Any], T | None]) -> T | None:
    """The value in the file, for a program other than the one that keeps it: nothing is set aside or written."""
    try:
        return clean(_parsed(path).get(_key(launch)))
    except (OSError, ValueError, TypeError, RecursionError):
        return None


def is_seconds(value: Any) -> bool:
    """Whether a value of the file, of any JSON type, may be a time that was measured."""
    return type(value) in (int, float) and 0 <= value <= MAX_SECONDS


def _parsed(path: Path) -> dict[str, Any]:
    found: Any = json.loads(state_folder.read(path))
    if not isinstance(found, dict):
        raise TypeError(f"expected an object, got {found!r:.100}")
    return found


def _key(launch: Launch, where: str = "") -> str:
    return _digest((*launch.argv, where) if where else launch.argv)


@lru_cache(MAX_VALUES)
def _digest(argv: tuple[str, ...]) -> str:
    return hashlib.sha256("\0".join(argv).encode("utf-8", "surrogateescape")).hexdigest()[:24]

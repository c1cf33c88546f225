"""The most that each model was seen to take, over all lives and runs: it beats any estimate.

Kept by the command line, since other flags are another size. A file that cannot be read is begun anew, and one that
cannot be written costs only what was learned.
"""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from backends.domain.spec import Launch

log = logging.getLogger(__name__)

NAME = "memory.json"
GROWTH = 1.01  # what is less than this above the last is not written


class HighWaterMarks:
    """``path``: None = in memory only."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._known: dict[str, int] = _read(path) if path is not None else {}

    def get(self, launch: Launch) -> int | None:
        """Bytes; None = never seen."""
        return self._known.get(_key(launch))

    def note(self, launch: Launch, footprint: int) -> None:
        key = _key(launch)
        if footprint <= self._known.get(key, 0) * GROWTH:
            return
        self._known[key] = footprint
        if self._path is None:
            return
        try:
            fresh = self._path.with_suffix(".new")
            fresh.write_text(json.dumps(self._known, indent=1))
            fresh.replace(self._path)
        except OSError as error:
            log.warning("memory peaks not kept", extra={"path": self._path, "reason": error.strerror or error})


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

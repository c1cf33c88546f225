"""Load times: how long each model takes from its launch to its first token, over all instances and runs.

The first estimate for a replica that this gateway has not yet started: what its requests will wait for.
"""

from pathlib import Path
from typing import Any

from backends.domain.spec import Launch
from backends.process.learned import LearnedNumbers, look_up

NAME = "load_times.json"
MAX_SECONDS = 24 * 3600.0  # no load takes so long; a file that says so is wrong


class LoadTimes:
    """``path``: None = in memory only."""

    def __init__(self, path: Path | None = None) -> None:
        self._times = LearnedNumbers(path, "load times", _is_seconds)
        self.get = self._times.get
        self.keep_saved = self._times.keep_saved
        self.save = self._times.save

    def note(self, launch: Launch, seconds: float) -> None:
        self._times.note(launch, round(seconds, 2))


def known(folder: Path, launch: Launch) -> float | None:
    """Seconds, from the state folder of a gateway, which may be running; None = never measured."""
    return look_up(folder / NAME, launch, _is_seconds)


def _is_seconds(seconds: Any) -> bool:
    return type(seconds) in (int, float) and 0 <= seconds <= MAX_SECONDS

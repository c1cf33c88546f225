"""Load times: how long each model takes from its launch to its first token, over all instances and runs.

The first estimate for a replica that this gateway has not yet started: what its requests will wait for.
"""

from pathlib import Path
from typing import Any

from backends.domain.spec import Launch
from backends.process.learned import Learned, is_seconds, look_up

NAME = "load_times.json"


def load_times(folder: Path | None = None) -> Learned[float]:
    """``folder``: None = in memory only."""
    return Learned(folder and folder / NAME, "load times", _seconds)


def known(folder: Path, launch: Launch) -> float | None:
    """Seconds, from the state folder of a gateway, which may be running; None = never measured."""
    return look_up(folder / NAME, launch, _seconds)


def _seconds(seconds: Any) -> float | None:
    return round(seconds, 2) if is_seconds(seconds) else None

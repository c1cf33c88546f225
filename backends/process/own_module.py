"""A module of this project as a program of its own: its command line and environment."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # the folder of our packages


def command(module: str, *args: str) -> list[str]:
    """``-P``: a folder with the name of our package in the working directory must not be imported in its place."""
    return [sys.executable, "-P", "-m", module, *args]


def environment() -> dict[str, str]:
    """Ours, with the folder of our packages first in PYTHONPATH."""
    inherited = os.environ.get("PYTHONPATH")
    return os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{inherited}" if inherited else str(ROOT)}

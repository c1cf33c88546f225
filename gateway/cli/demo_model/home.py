"""Where the demo model lives, and making it when a config asks for it."""

import subprocess
import sys
from pathlib import Path

from gateway.config import Config

FOLDER = Path("~/.cache/mlx-gateway/tiny-llama").expanduser()


def make_missing(config: Config) -> bool:
    """Make the demo model if the config serves it and it is not there. False, with a message, when that failed.

    In a process of its own: mlx is never imported in the gateway's.
    """
    if not any(model.model == str(FOLDER) for model in config.models):
        return True
    made = subprocess.run(
        [sys.executable, "-m", "gateway.cli.demo_model.model", str(FOLDER)], stdin=subprocess.DEVNULL, check=False
    )
    if made.returncode != 0:
        print(f"the demo model could not be made in {FOLDER}; see above", file=sys.stderr)
    return made.returncode == 0

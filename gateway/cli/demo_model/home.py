"""The folder of the demo model, and its creation when a config serves it."""

import subprocess
import sys
from pathlib import Path

from backends.process import own_module
from gateway.config import Config

FOLDER = Path("~/.cache/mlx-gateway/tiny-llama").expanduser()


def make_missing(config: Config) -> bool:
    """Creates the demo model if the config serves it and it is missing. False, after a message, if that failed.

    Runs in a separate process: mlx is never imported in the gateway's process.
    """
    if not any(model.model == str(FOLDER) for model in config.models):
        return True
    argv = own_module.command("gateway.cli.demo_model.model", str(FOLDER))
    made = subprocess.run(argv, stdin=subprocess.DEVNULL, env=own_module.environment(), check=False)
    if made.returncode != 0:
        print(f"could not create the demo model in {FOLDER}; the cause is above", file=sys.stderr)
    return made.returncode == 0

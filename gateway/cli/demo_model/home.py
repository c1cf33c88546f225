"""The folder of the demo model, and its creation when a config serves it."""

import os
import subprocess
import sys
from pathlib import Path

from gateway.config import Config

ROOT = Path(__file__).resolve().parents[3]  # the folder of our packages
FOLDER = Path("~/.cache/mlx-gateway/tiny-llama").expanduser()


def make_missing(config: Config) -> bool:
    """Creates the demo model if the config serves it and it is missing. False, after a message, if that failed.

    Runs in a separate process: mlx is never imported in the gateway's process.
    """
    if not any(model.model == str(FOLDER) for model in config.models):
        return True
    # -P, or a folder called "gateway" in the working directory would be imported instead of ours
    argv = [sys.executable, "-P", "-m", "gateway.cli.demo_model.model", str(FOLDER)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    made = subprocess.run(argv, stdin=subprocess.DEVNULL, env=env, check=False)
    if made.returncode != 0:
        print(f"could not create the demo model in {FOLDER}; the cause is above", file=sys.stderr)
    return made.returncode == 0

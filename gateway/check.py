"""Reading a config for a command, and ``check``, which does nothing else."""

import os
import sys
from pathlib import Path

from gateway.config import Config, ConfigError, load


def check(path: Path) -> int:
    config = read(path)
    if config is None:
        return 2
    replicas = sum(model.replicas for model in config.models)
    print(f"{path}: ok, {len(config.models)} model(s), {replicas} backend(s)")
    return 0


def read(path: Path) -> Config | None:
    """None after every problem was printed. Notes are printed too."""
    try:
        config = load(path, os.environ)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return None
    for note in config.notes:
        print(f"note: {note}", file=sys.stderr)
    return config

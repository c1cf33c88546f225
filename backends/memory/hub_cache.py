"""Where the files of a model are on this machine."""

import os
from collections.abc import Iterator
from pathlib import Path


def folders(model: str) -> Iterator[Path]:
    """Its local folder, or in the hub's cache once they are there; the best first."""
    if Path(model).is_absolute():
        yield Path(model)
    elif model:
        home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
        cache = Path(os.environ.get("HF_HUB_CACHE", home / "hub"))
        yield from cache.glob(f"models--{model.replace('/', '--')}/snapshots/*")

"""The folder of a model's files on this machine: a local path, or a snapshot in the Hugging Face hub cache.

The snapshot is the one that mlx_lm loads: revision ``main``, as resolved by huggingface_hub. The location of the cache
depends on the environment of the process that loads the model, so also on the model's own ``env``. huggingface_hub
reads its variables once, at import, and for this process only: so they are evaluated here by the same rules.

Caveat: the import of huggingface_hub takes 0.3 s. It happens at the first lookup of a hub model: call it in a thread.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from string import Template

CONFIG_FILE = "config.json"  # in every model: mlx_lm cannot load a snapshot without it


def folders(model: str, env: Mapping[str, str] | None = None) -> Iterator[Path]:
    """The local folder; or the snapshot in the cache, if it is there yet; or, where the cache does not say which
    snapshot is ``main``, all snapshots, the newest first. ``env``: the model's own, added to that of this process."""
    if Path(model).is_absolute():
        yield Path(model)
    elif model:
        yield from _snapshots(model, cache_dir({**os.environ, **(env or {})}))


def cache_dir(environ: Mapping[str, str]) -> Path:
    """As ``huggingface_hub.constants.HF_HUB_CACHE`` is in a process with this environment."""
    default_home = os.path.join(environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface")  # noqa: PTH118
    home = _expanded(environ.get("HF_HOME", default_home), environ)
    legacy = environ.get("HUGGINGFACE_HUB_CACHE", str(home / "hub"))
    return _expanded(environ.get("HF_HUB_CACHE", legacy), environ)


def _expanded(path: str, environ: Mapping[str, str]) -> Path:
    if path == "~" or path.startswith("~/"):
        path = environ.get("HOME", str(Path.home())) + path[1:]
    return Path(Template(path).safe_substitute(environ)).expanduser()


def _snapshots(model: str, cache: Path) -> Iterator[Path]:
    from huggingface_hub import try_to_load_from_cache  # noqa: PLC0415 - see above
    from huggingface_hub.errors import HFValidationError  # noqa: PLC0415

    try:
        found = try_to_load_from_cache(model, CONFIG_FILE, cache_dir=cache)
    except HFValidationError:  # not a valid hub name
        return
    if isinstance(found, str):
        yield Path(found).parent
        return
    others = cache.glob(f"models--{model.replace('/', '--')}/snapshots/*")
    yield from sorted(others, key=_changed_at, reverse=True)


def _changed_at(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except OSError:  # deleted meanwhile
        return 0.0

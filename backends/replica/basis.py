"""What a start rests on outside the gateway: the files of the model, the program, the installed packages.

A replica that was given up is started again when this has changed: a disk was mounted, a snapshot has appeared in the
hub cache, a package was installed. Blocks: call it in a thread.
"""

import os
import shutil
import sysconfig
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from backends.domain.spec import Launch
from backends.memory.hub_cache import folders

MAX_FILES = 2000  # of a model's folder

Basis = tuple[object, ...]


def basis(launch: Launch) -> Basis:
    """Equal as long as nothing has changed. Never raises OSError: what cannot be read is a part of it."""
    model = launch.model_folder or launch.model
    found = tuple(islice(folders(model, launch.env), 1)) if model else ()
    files = tuple(_entries(folder) for folder in found)
    return (found, files, _stat(_program(launch)), _stat(sysconfig.get_path("purelib")))


def _program(launch: Launch) -> str:
    name = next(iter(launch.argv), "")
    return shutil.which(name, path=launch.env.get("PATH")) or name


def _entries(folder: Path) -> tuple[object, ...]:
    try:
        names = sorted(entry.name for entry in islice(os.scandir(folder), MAX_FILES))
    except OSError as error:
        return (error.errno,)
    return tuple(_of_files(folder, names))


def _of_files(folder: Path, names: list[str]) -> Iterator[object]:
    for name in names:
        yield name
        yield _stat(str(folder / name))


def _stat(path: str) -> tuple[int, ...]:
    """Links are followed: in the hub cache every file is one."""
    try:
        found = os.stat(path)  # noqa: PTH116 - of a text
    except OSError as error:
        return (error.errno or 0,)
    return (found.st_size, found.st_mtime_ns, found.st_ino)

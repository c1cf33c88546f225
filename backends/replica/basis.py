"""What a start rests on outside the gateway: the files of the model and those that its command line names, the program,
the installed packages, the address.

A replica that was given up is started again when this has changed: a disk was mounted, a snapshot has appeared in the
hub cache, a package was installed, a file was made readable, a network came up. Blocks: call it in a thread.
"""

import os
import shutil
import sysconfig
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path

from backends.domain.spec import Launch
from backends.memory.hub_cache import folders
from backends.process import ports

MAX_FILES = 2000  # of a folder
MAX_WORDS = 100  # of a command line that are looked at
MAX_NAME = 1000  # characters; longer is no path

Basis = tuple[object, ...]


def basis(launch: Launch) -> Basis:
    """Equal as long as nothing has changed. Never raises OSError: what cannot be read is a part of it."""
    program = _program(launch)
    words = (_named(word, launch) for word in launch.argv[1 : 1 + MAX_WORDS])
    model = _model(launch.model_folder or launch.model, launch)
    return (model, *words, _stat(program), *_packages(program), _address(launch.host))


def _model(name: str, launch: Launch) -> tuple[object, ...]:
    found = tuple(islice(folders(name, launch.env), 1))
    return (found, *(_entries(folder) for folder in found))


def _named(word: str, launch: Launch) -> tuple[object, ...]:
    """What a word of the command line names: a file, a folder, or a model of the hub (a draft model, adapters)."""
    name = word.partition("=")[2] if word.startswith("-") else word
    if not name or len(name) > MAX_NAME:
        return ()
    if name.count("/") == 1 and not name.startswith(("/", ".")) and not Path(name).exists():
        return _model(name, launch)
    return _entries(Path(name)) if Path(name).is_dir() else _stat(name)


def _packages(program: str) -> Iterator[tuple[int, ...]]:
    """Of the gateway's own interpreter, and of the environment that the program belongs to. A folder changes when a
    package is installed in it or removed."""
    yield _stat(sysconfig.get_path("purelib"))
    with suppress(OSError):
        for folder in sorted(Path(program).parent.parent.glob("lib/python3*/site-packages")):
            yield _stat(str(folder))


def _address(host: str) -> int:
    """0: a server could listen on that host; else the errno."""
    try:
        ports.free_port(host)
    except OSError as error:
        return error.errno or -1
    return 0


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
    except ValueError:  # a NUL byte
        return (0,)
    return (found.st_size, found.st_mtime_ns, found.st_ino, found.st_mode, found.st_uid)

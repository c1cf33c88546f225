"""Files in the state folder: written so that no one else can read or replace them, and distrusted when read.

Whatever stands there may be old, cut short, or planted through a folder that was open to others: so a file is read only
if it is a regular file of this user and not too large, and no link is followed. A link in place of the state folder
itself is allowed: people put it on another disk.
"""

import logging
import os
import stat
from contextlib import suppress
from pathlib import Path

logger = logging.getLogger(__name__)

MAX_SIZE = 1 << 20  # bytes of a file


class NotTrusted(OSError):
    """The message says what is wrong with the path, and what to do."""


def make_private(folder: Path) -> None:
    """Creates ``folder``, or takes others' access to it away. Raises OSError, NotTrusted."""
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode):
        raise NotTrusted(f"{folder} is not a folder but {_kind(found)}; remove it")
    if found.st_uid != os.geteuid():
        raise NotTrusted(f"{folder} belongs to another user (uid {found.st_uid}); remove it, or choose another folder")
    if stat.S_IMODE(found.st_mode) & 0o077:
        logger.warning("folder was open to other users; now it is not", extra={"path": folder})
        folder.chmod(0o700)


def read(path: Path) -> bytes:
    """Raises OSError, FileNotFoundError and NotTrusted among them."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)  # a FIFO would block
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise NotTrusted(f"it is {_kind(found)}")
        if found.st_uid not in (os.geteuid(), 0):
            raise NotTrusted(f"it belongs to another user (uid {found.st_uid})")
        if len(content := file.read(MAX_SIZE + 1)) > MAX_SIZE:
            raise NotTrusted(f"it is larger than {MAX_SIZE} bytes")
        return content


def write(path: Path, content: bytes) -> None:
    """Atomic, readable by this user only. No fsync: these files are of no use after a power failure. Raises OSError."""
    fresh = path.with_suffix(".tmp")
    fresh.unlink(missing_ok=True)
    try:
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        fresh.replace(path)
    except OSError:
        with suppress(OSError):
            fresh.unlink(missing_ok=True)  # a full disk
        raise


def set_aside(path: Path) -> Path:
    """Renames a file that is not valid; the name that it has now. If that fails too, the file stays."""
    aside = path.with_suffix(".corrupt")
    with suppress(OSError):
        path.replace(aside)
    return aside


def _kind(found: os.stat_result) -> str:
    kinds = {stat.S_IFLNK: "a symbolic link", stat.S_IFDIR: "a folder", stat.S_IFREG: "a file"}
    return kinds.get(stat.S_IFMT(found.st_mode), "no regular file")

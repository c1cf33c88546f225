"""What is said of a file or folder that may not be read.

On macOS a denial comes in two kinds: EACCES from the permissions of the file, and EPERM from the privacy settings (the
Desktop, Documents and Downloads folders, removable and network volumes), which deny whole programs. A service of
launchd is asked nothing and gets EPERM at once.
"""

import errno
import os
import pwd
import sys


def denied(error: PermissionError, *, platform: str = sys.platform) -> str:
    """A sentence without a full stop: what may not be read, by whom, and what to do."""
    path = str(error.filename or "a file of the model")
    if platform == "darwin" and error.errno == errno.EPERM:
        return (
            f"{path} may not be read: macOS denies it to this program; allow it in System Settings, Privacy & "
            "Security, Full Disk Access (or Files and Folders) for the program that starts the gateway, as a service "
            f"{sys.executable}, then start the gateway again; or move the model to another folder"
        )
    return (
        f"{path} may not be read by user {_user()} ({error.strerror}); give that user the permission, also to enter "
        "the folders above it (chmod), or move the model to a folder that it may read"
    )


def unreadable(error: OSError, path: object) -> str:
    """The same for any error of a read of ``path``."""
    if isinstance(error, PermissionError):
        return denied(error)
    return f"{error.filename or path} cannot be read: {error.strerror or error}; check the disk that it is on"


def _user() -> str:
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return str(os.geteuid())

"""TCP ports: find a free one, name the holder of one, check that a listener is our own.

Every function blocks, for milliseconds where it scans sockets, for seconds where the name of a host is looked up: call
them in a thread.

Caveat: macOS tells an ordinary user about sockets only process by process, and only about their own
processes; the system-wide list needs root. Linux gives the whole list, with the owner left out where it is another
user's. Either way "cannot tell" is an answer, None, and is never taken for "no".
"""

import errno
import os
import socket
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from typing import Any

import psutil

TRIES = 1000  # ports that the kernel may offer, one after the other
_WILDCARDS = frozenset({"0.0.0.0", "::"})  # noqa: S104 - compared with, not bound to


def free_port(host: str, avoid: Collection[int] = ()) -> int:
    """A port free a moment ago. ``avoid`` holds those promised to others that do not listen yet. Raises OSError."""
    family, address = _resolve(host, 0)
    for _ in range(TRIES):
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind(address)
            port: int = probe.getsockname()[1]
        if port not in avoid:
            return port
    raise OSError(errno.EADDRINUSE, f"each of {TRIES} ports is promised to another process")


def is_free(host: str, port: int) -> bool:
    """Whether a server could listen there. Raises OSError when the trouble is the host and not the port.

    Binds as mlx_lm.server does (http.server sets SO_REUSEADDR): connections in TIME_WAIT do not count as holders, a
    listener does. SO_REUSEPORT stays off, or a second server on the port would pass.
    """
    family, address = _resolve(host, port)
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return False
            raise
    return True


def holder(host: str, port: int) -> str | None:
    """The process that listens there, as "python3.11 (pid 123)"; None if there is none, or the system does not tell."""
    _, address = _resolve(host, port)
    wanted = {str(address[0])} | _WILDCARDS
    found = [
        (ip not in _WILDCARDS, pid)
        for ip, at, pid in _listeners()
        if at == port and (ip in wanted or address[0] in _WILDCARDS)
    ]
    for _, pid in sorted(found, reverse=True):  # the exact address before a wildcard
        with suppress(psutil.Error):
            return f"{psutil.Process(pid).name()} (pid {pid})"
    return None


def listener_is(pid: int, port: int) -> bool | None:
    """Whether ``pid``, a descendant or a member of its group listens on ``port``; None if that cannot be told."""
    family = _family(pid)
    hidden = False
    for member in family:
        try:
            if any(at == port for _, at, _ in _listening(member)):
                return True
        except psutil.AccessDenied:
            hidden = True
        except psutil.NoSuchProcess:
            continue
    return None if hidden else False


def _resolve(host: str, port: int) -> tuple[int, Any]:
    """Family and address, chosen as mlx_lm.server chooses: the first that getaddrinfo gives."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    return family, address


def _family(pid: int) -> set[int]:
    found = {pid}
    with suppress(psutil.Error):
        found |= {child.pid for child in psutil.Process(pid).children(recursive=True)}
    for other in psutil.pids():
        with suppress(ProcessLookupError, PermissionError):
            if other > 1 and os.getpgid(other) == pid:
                found.add(other)
    return found


Listener = tuple[str, int, int]  # address, port, pid


def _listeners() -> Iterator[Listener]:
    """All whose owner can be told."""
    if psutil.LINUX:
        yield from _listening_of(psutil.net_connections(kind="tcp"), None)
        return
    for pid in psutil.pids():
        with suppress(psutil.Error):
            yield from _listening(pid)


def _listening(pid: int) -> list[Listener]:
    return list(_listening_of(psutil.Process(pid).net_connections(kind="tcp"), pid))


def _listening_of(connections: Iterable[Any], owner: int | None) -> Iterator[Listener]:
    for one in connections:
        pid = owner if owner is not None else one.pid
        if one.status == psutil.CONN_LISTEN and pid is not None:
            yield one.laddr.ip, one.laddr.port, pid

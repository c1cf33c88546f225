"""TCP ports: find a free one, name the process that holds one, check that a listener is our own.

Every function blocks, for milliseconds where it scans sockets, for seconds where a host name is looked up: call them
in a thread.

Caveat: macOS shows an ordinary user sockets only per process, and only of the user's own processes; the system-wide
list needs root. Linux gives the whole list, without the owner of another user's sockets. On both, "unknown" is an
answer, None, and is never taken for "no".
"""

import errno
import os
import socket
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from typing import Any

import psutil

MAX_TRIES = 1000  # ports that the kernel offers, one after the other
_WILDCARDS = frozenset({"0.0.0.0", "::"})  # noqa: S104 - compared with, not bound to


_LOOPBACK = {socket.AF_INET: ("127.0.0.1",), socket.AF_INET6: ("::1", "127.0.0.1")}  # what a wildcard includes


def free_port(host: str, avoid: Collection[int] = ()) -> int:
    """A port that was free just now. ``avoid``: ports assigned to processes that do not listen yet. Raises OSError."""
    family, address = _resolve(host, 0)
    for _ in range(MAX_TRIES):
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind(address)
            port: int = probe.getsockname()[1]
        if port not in avoid and not hidden_by_loopback(host, port):
            return port
    raise OSError(errno.EADDRINUSE, f"each of {MAX_TRIES} free ports is assigned to another process")


def is_free(host: str, port: int) -> bool:
    """True: a server could listen there. Raises OSError if the host, not the port, is the problem.

    Binds as mlx_lm.server does (http.server sets SO_REUSEADDR): connections in TIME_WAIT do not count as holders, a
    listener does. SO_REUSEPORT stays off, or a second server on the port would pass.
    """
    family, address = _resolve(host, port)
    return _can_bind(family, address) and not hidden_by_loopback(host, port)


def hidden_by_loopback(host: str, port: int) -> bool:
    """``host`` is a wildcard, and a server listens on that port of the loopback address: macOS lets both listen, and
    gives connections from this machine to the other server. Raises OSError."""
    family, address = _resolve(host, port)
    if address[0] not in _WILDCARDS:
        return False
    return any(not _can_bind(*_resolve(loopback, port)) for loopback in _LOOPBACK[socket.AddressFamily(family)])


def _can_bind(family: int, address: Any) -> bool:
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return False
            if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT) and address[0] == "::1":
                return True  # a machine without IPv6
            raise
    return True


def holder(host: str, port: int) -> str | None:
    """The process that listens there, as "python3.11 (pid 123)"; None = there is none, or unknown."""
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
    """True: ``pid``, a descendant or a member of its group listens on ``port``; None = unknown."""
    family = _family(pid)
    hidden = False
    for member in family:
        try:
            if any(at == port for _, at, _ in _listening(member)):
                return True
        except (psutil.AccessDenied, OSError):  # OSError: no file descriptors left
            hidden = True
        except psutil.NoSuchProcess:
            continue
    return None if hidden else False


def _resolve(host: str, port: int) -> tuple[int, Any]:
    """Family and address, as mlx_lm.server chooses them: the first result of getaddrinfo."""
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
    """All listeners with a known owner."""
    if psutil.LINUX:
        yield from _listening_of(psutil.net_connections(kind="tcp"), None)
        return
    for pid in psutil.pids():
        with suppress(psutil.Error):
            yield from _listening(pid)


def _listening(pid: int) -> list[Listener]:
    return list(_listening_of(psutil.Process(pid).net_connections(kind="tcp"), pid))


def _listening_of(connections: Iterable[Any], owner: int | None) -> Iterator[Listener]:
    for connection in connections:
        pid = owner if owner is not None else connection.pid
        if connection.status == psutil.CONN_LISTEN and pid is not None:
            yield connection.laddr.ip, connection.laddr.port, pid

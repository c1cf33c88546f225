"""What a transport does not tell of the client's socket, and cannot do to it."""

import asyncio
import contextlib
import socket
from collections.abc import Iterator

MAX_DISCARDED = 64 * 1024  # bytes: what a client has sent that is refused at once


@contextlib.contextmanager
def _socket_of(transport: asyncio.Transport) -> Iterator[socket.socket]:
    """That of the transport itself answers from memory (uvloop), or warns (asyncio). Raises OSError."""
    borrowed = socket.socket(fileno=transport.get_extra_info("socket").fileno())
    try:
        yield borrowed
    finally:
        borrowed.detach()


def is_gone(transport: asyncio.Transport) -> bool:
    """Whether the client has reset the connection, after it had closed its sending side. Nothing is read from it any
    more then, so the event loop does not notice. A socket that was reset has no peer, on Linux and on macOS."""
    try:
        with _socket_of(transport) as sock:
            sock.getpeername()
    except OSError:
        return True
    return False


def discard_received(transport: asyncio.Transport) -> None:
    """Throw away what has arrived: closing a socket with unread data resets it, and the client may lose the answer."""
    with contextlib.suppress(OSError), _socket_of(transport) as sock:
        sock.recv(MAX_DISCARDED, socket.MSG_DONTWAIT)

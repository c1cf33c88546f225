"""A raw-socket server that fails like mlx_lm.server, for tests of code that talks to a backend.

    async with FaultServer(reset_after(SSE_HEAD)) as server: connect to 127.0.0.1:server.port

A script is ``async def (conn)``: it drives one connection with the methods of ``Conn``. No HTTP library: the script
defines the bytes, and where they are cut. When the context ends, the server's sockets are closed and its tasks have
ended.
"""

import asyncio
import socket
import struct
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Self

SSE_HEAD = b"HTTP/1.0 200 OK\r\nServer: BaseHTTP/0.6 Python/3.11\r\nContent-type: text/event-stream\r\n\r\n"
EVENT = 'data: {"choices": [{"delta": {"content": "é€😀"}}]}\n\n'.encode()
SSE_BODY = b": keepalive 2048/12010\n\n" + EVENT * 3 + b"data: [DONE]\n\n"
JSON_BODY = b'{"object": "chat.completion"}'
LENGTH_HEAD = b"HTTP/1.0 200 OK\r\nContent-type: application/json\r\nContent-Length: %d\r\n\r\n" % len(JSON_BODY)
CHUNKED_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
NO_STATUS_LINE = (
    b'{"error": "Invalid JSON in request body: Expecting value: line 1 column 1 (char 0)"}'  # mlx-lm 0.28.4
)


class Conn:
    """One accepted connection."""

    def __init__(self, sock: socket.socket) -> None:
        self.got = bytearray()
        self.read_some = asyncio.Event()  # set by a test once its client has read some data
        self.left = asyncio.Event()  # the client has disconnected
        self._sock = sock
        self._loop = asyncio.get_running_loop()

    async def request(self) -> bytes:
        """Head and body of the request, with the length of Content-Length."""
        while b"\r\n\r\n" not in self.got:
            await self._receive()
        head, _, _ = bytes(self.got).partition(b"\r\n\r\n")
        lengths = [line[15:] for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")]
        want = int(lengths[0]) if lengths else 0
        while len(self.got) < len(head) + 4 + want:
            await self._receive()
        return bytes(self.got)

    async def send(self, data: bytes) -> None:
        await self._loop.sock_sendall(self._sock, data)

    def fin(self) -> None:
        self._sock.close()

    def rst(self) -> None:
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._sock.close()

    async def gone(self) -> None:
        """For scripts: waits until the client disconnects, with FIN or RST. (Only one task at a time can receive: a
        test waits for ``left``.)"""
        try:
            while await self._loop.sock_recv(self._sock, 65536):
                pass
        except ConnectionError:
            pass
        self.left.set()

    async def _receive(self) -> None:
        data = await self._loop.sock_recv(self._sock, 65536)
        if not data:
            self.left.set()
            raise ConnectionResetError("the client disconnected before its request was complete")
        self.got += data


Script = Callable[[Conn], Awaitable[None]]


class FaultServer:
    def __init__(self, script: Script, *, backlog: int = 128) -> None:
        self.conns: list[Conn] = []
        self._script = script
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=backlog)
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]
        self._tasks: set[asyncio.Task[None]] = set()
        self._arrived = asyncio.Event()

    async def __aenter__(self) -> Self:
        asyncio.get_running_loop().add_reader(self._listener, self._accept)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        asyncio.get_running_loop().remove_reader(self._listener)
        for task in self._tasks:
            task.cancel()
        results = await asyncio.gather(*self._tasks, return_exceptions=True)
        self._listener.close()
        for conn in self.conns:
            conn.fin()
        # An error in a script is a broken test; a client that disconnects from a script is expected.
        for result in results:
            if isinstance(result, Exception) and not isinstance(result, ConnectionError):
                raise result

    async def arrived(self, count: int = 1) -> Conn:
        """Waits until ``count`` connections were accepted; returns the last of them."""
        while len(self.conns) < count:
            self._arrived.clear()
            await self._arrived.wait()
        return self.conns[count - 1]

    def _spawn(self, coroutine: Awaitable[None]) -> None:
        self._tasks.add(asyncio.ensure_future(coroutine))

    def _accept(self) -> None:
        """Not ``loop.sock_accept``: if cancelled in the tick in which a connection arrives, it loses the socket."""
        try:
            sock, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):  # the client has disconnected
            return
        sock.setblocking(False)
        self.conns.append(Conn(sock))
        self._arrived.set()
        self._spawn(self._script(self.conns[-1]))


def answer(*parts: bytes) -> Script:
    """Reads the request, sends the parts in separate segments, closes."""

    async def script(conn: Conn) -> None:
        await conn.request()
        for part in parts:
            await conn.send(part)
            await asyncio.sleep(0.001)  # so that each part is a segment; no test depends on it
        conn.fin()

    return script


def reset_after(*parts: bytes) -> Script:
    """As ``answer``, but resets the connection; if parts were sent, only once the client has read some data."""

    async def script(conn: Conn) -> None:
        await conn.request()
        for part in parts:
            await conn.send(part)
        if parts:
            await conn.read_some.wait()
        conn.rst()

    return script


def then_silent(*parts: bytes) -> Script:
    """Sends the parts and then nothing more, until the client disconnects."""

    async def script(conn: Conn) -> None:
        await conn.request()
        for part in parts:
            await conn.send(part)
        await conn.gone()
        conn.fin()

    return script


async def accept_then_close(conn: Conn) -> None:
    conn.fin()


def drip(data: bytes) -> Script:
    """One byte per segment: every multi-byte character is split."""
    return answer(*(data[i : i + 1] for i in range(len(data))))


def chunks(*parts: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)

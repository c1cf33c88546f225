"""A raw-socket server that fails like the real thing, for tests of whatever talks to a backend.

    async with FaultServer(reset_after(SSE_HEAD)) as server: connect to 127.0.0.1:server.port

A script is ``async def (conn)``: it plays one connection with the verbs of ``Conn``. No HTTP library: what goes out is
what the script says, cut where it says. On the way out the server's sockets are closed and its tasks are gone.
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
        self.read_some = asyncio.Event()  # set by a test once its client has read something
        self.left = asyncio.Event()  # the client has hung up
        self._sock = sock
        self._loop = asyncio.get_running_loop()

    async def request(self) -> bytes:
        """Head and body of the request, as Content-Length has it."""
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
        """For scripts: until the client has hung up, with FIN or RST. (One task at a time can receive: a test waits on
        ``left``.)"""
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
            raise ConnectionResetError("the client left before its request was whole")
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
        # A script that failed by itself is a broken test; a client that hangs up on it is what scripts are for.
        for result in results:
            if isinstance(result, Exception) and not isinstance(result, ConnectionError):
                raise result

    async def arrived(self, count: int = 1) -> Conn:
        """Until ``count`` connections were accepted; the last of them."""
        while len(self.conns) < count:
            self._arrived.clear()
            await self._arrived.wait()
        return self.conns[count - 1]

    def _spawn(self, coroutine: Awaitable[None]) -> None:
        self._tasks.add(asyncio.ensure_future(coroutine))

    def _accept(self) -> None:
        """Not ``loop.sock_accept``: cancelled in the very tick of a connection, it would lose the socket."""
        try:
            sock, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):  # whoever knocked has left
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
            await asyncio.sleep(0.001)  # a segment each; nothing depends on it
        conn.fin()

    return script


def reset_after(*parts: bytes) -> Script:
    """As ``answer``, but resets; where something was sent, only when the client has read from it."""

    async def script(conn: Conn) -> None:
        await conn.request()
        for part in parts:
            await conn.send(part)
        if parts:
            await conn.read_some.wait()
        conn.rst()

    return script


def then_silent(*parts: bytes) -> Script:
    """Sends the parts and then nothing more, until the client hangs up."""

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

"""A real server on a free port, configured as the gateway does it, and a raw HTTP client."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import uvicorn

from gateway.cli import server
from gateway.cli.server import bind

READ_TIMEOUT = 30.0  # seconds for each read; far more than any of them takes


@dataclass(frozen=True, slots=True)
class Answer:
    """``version``: of HTTP, from the status line."""

    version: bytes
    status: int
    headers: dict[bytes, bytes]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error object; asserts that it has all fields."""
        found: dict[str, Any] = self.json["error"]
        assert set(found) == {"message", "type", "param", "code", "request_id", "model", "backend", "retry_after"}
        assert found["request_id"] == self.headers[b"x-request-id"].decode()
        assert self.headers[b"content-type"] == b"application/json"
        return found


class Wire:
    """One connection to 127.0.0.1. Leaving the context closes it."""

    def __init__(self, port: int) -> None:
        self._port = port

    async def __aenter__(self) -> Self:
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.hang_up()

    async def send(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def post(self, path: str, body: bytes, *headers: str) -> None:
        lines = [f"POST {path} HTTP/1.1", "host: localhost", f"content-length: {len(body)}", *headers, "", ""]
        await self.send("\r\n".join(lines).encode() + body)

    async def get(self, path: str, *headers: str) -> None:
        await self.send("\r\n".join([f"GET {path} HTTP/1.1", "host: localhost", *headers, "", ""]).encode())

    async def until(self, part: bytes) -> bytes:
        async with asyncio.timeout(READ_TIMEOUT):
            return await self._reader.readuntil(part)

    async def head(self) -> tuple[bytes, int, dict[bytes, bytes]]:
        first, *lines = (await self.until(b"\r\n\r\n")).rstrip().split(b"\r\n")
        version, status, _ = first.split(b" ", 2)
        pairs = [line.partition(b": ") for line in lines]
        assert len({name for name, _, _ in pairs}) == len(pairs), f"a header twice in {lines}"
        return version, int(status), {name: value for name, _, value in pairs}

    async def answer(self) -> Answer:
        version, status, headers = await self.head()
        body = b""
        async with asyncio.timeout(READ_TIMEOUT):
            if headers.get(b"transfer-encoding") == b"chunked":
                while part := await self.chunk():
                    body += part
            else:
                body = await self._reader.readexactly(int(headers[b"content-length"]))
        return Answer(version, status, headers, body)

    async def chunk(self) -> bytes:
        size = int(await self.until(b"\r\n"), 16)
        return (await self._reader.readexactly(size + 2))[:-2]

    async def closed(self) -> bytes:
        """The data received until the server closed the connection."""
        rest = b""
        async with asyncio.timeout(READ_TIMEOUT):
            try:
                while part := await self._reader.read(65536):
                    rest += part
            except ConnectionError:
                pass
        return rest

    def hang_up(self) -> None:
        self._writer.close()

    def reset(self) -> None:
        """Close the connection without sending pending data."""
        self._writer.transport.abort()


@asynccontextmanager
async def listening(config: uvicorn.Config) -> AsyncIterator[tuple[uvicorn.Server, int]]:
    """The server and its port."""
    started = asyncio.Event()
    with bind("127.0.0.1", 0) as sock:
        one = server._Server(config, started.set)
        serving = asyncio.ensure_future(one.serve(sockets=[sock]))
        try:
            async with asyncio.timeout(READ_TIMEOUT):
                await started.wait()
            yield one, sock.getsockname()[1]
        finally:
            one.should_exit = True
            await serving

"""An upstream with mlx_lm.server's wire format (HTTP/1.0, streams that end with the connection) and a low CPU cost.

The prompt sets the answer, since any proxy passes it on: ``BENCH n=20 gap=0.05 size=560 first=0``: number of tokens,
seconds between them, characters of an answer that is no stream, seconds before the first byte. Every token contains
the monotonic time at which it was sent, in nanoseconds, and its number: ``@123#0``.
"""

import argparse
import asyncio
import re
import time
from typing import cast

import psutil
import uvloop

HEAD = b"HTTP/1.0 200 OK\r\nServer: BaseHTTP/0.6 Python/3.11.7\r\nContent-type: %s\r\n"
STREAM = HEAD % b"text/event-stream" + b"Cache-Control: no-cache\r\n\r\n"
JSON = HEAD % b"application/json" + b"Content-Length: %d\r\n\r\n%b"
CHUNK = (
    b'data: {"id": "chatcmpl-1", "system_fingerprint": "0.32.2-0.32.4", "object": "chat.completion.chunk", '
    b'"model": "%b", "created": 1795366773, "choices": [{"index": 0, "finish_reason": %b, '
    b'"delta": {"role": "assistant", "content": "@%d#%d "}}]}\n\n'
)
USAGE = (
    b'data: {"id": "chatcmpl-1", "object": "chat.completion", "model": "%b", "created": 1795366773, "choices": [], '
    b'"usage": {"prompt_tokens": 16, "completion_tokens": %d, "total_tokens": %d}}\n\n'
)
ANSWER = (
    b'{"id": "chatcmpl-1", "object": "chat.completion", "model": "%b", "created": 1795366773, "choices": [{"index": 0, '
    b'"finish_reason": "length", "message": {"role": "assistant", "content": "%b"}}], "usage": {"prompt_tokens": 16, '
    b'"completion_tokens": 20, "total_tokens": 36}}'
)


class Upstream(asyncio.Protocol):
    """One connection, one request."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._buffer = b""
        self._wanted = 0
        self._timer: asyncio.TimerHandle | None = None
        self._n = self._sent = 0
        self._gap = self._due = 0.0
        self._model = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, _: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if not self._wanted:
            end = self._buffer.find(b"\r\n\r\n")
            if end < 0:
                return
            length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", self._buffer[:end])
            self._wanted = end + 4 + int(length[1] if length else 0)
        if len(self._buffer) >= self._wanted:
            self._answer(self._buffer)

    def _answer(self, request: bytes) -> None:
        if request.startswith(b"GET"):
            self._json(b'{"status": "ok"}')
            return
        asked = dict(re.findall(rb"(\w+)=([\d.]+)", m[0])) if (m := re.search(rb"BENCH [\w=. ]+", request)) else {}
        self._n, self._gap = int(asked.get(b"n", b"1")), float(asked.get(b"gap", b"0"))
        name = re.search(rb'"model": ?"([^"]*)"', request)
        self._model = name[1] if name else b"m"
        stream = re.search(rb'"stream": ?true', request) is not None
        size = int(asked.get(b"size", b"560"))
        later = self._stream if stream else lambda: self._json(ANSWER % (self._model, b"a" * size))
        self._timer = self._loop.call_later(float(asked.get(b"first", b"0")), later)

    def _json(self, body: bytes) -> None:
        self._transport.write(JSON % (len(body), body))
        self._transport.close()

    def _stream(self) -> None:
        self._transport.write(STREAM)
        self._due = self._loop.time()
        self._token()

    def _token(self) -> None:
        while self._sent < self._n:
            last = self._sent == self._n - 1
            finish = b'"length"' if last else b"null"
            self._transport.write(CHUNK % (self._model, finish, time.monotonic_ns(), self._sent))
            self._sent += 1
            if self._gap and not last:
                self._due += self._gap
                self._timer = self._loop.call_at(self._due, self._token)
                return
        self._transport.write(USAGE % (self._model, self._n, 16 + self._n) + b"data: [DONE]\n\n")
        self._transport.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--cpu", type=int, help="the processor to run on")
    args = parser.parse_args()
    if args.cpu is not None and hasattr(psutil.Process, "cpu_affinity"):
        psutil.Process().cpu_affinity([args.cpu])

    async def serve() -> None:
        server = await asyncio.get_running_loop().create_server(Upstream, "127.0.0.1", args.port, backlog=4096)
        await server.serve_forever()

    uvloop.run(serve())


if __name__ == "__main__":
    main()

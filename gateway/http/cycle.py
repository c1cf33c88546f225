"""One request and its answer on a connection: uvicorn's cycle, with two changes; and ``Link``, for the application.

* A client of HTTP/1.0 gets no chunked coding, which it would take for text: the end of the connection ends the answer.
* An answer that begins before the body has arrived is the last one on its connection. Otherwise a client without a key
  would keep the connection for as long as it sends its body.

Caveat: relies on attributes of uvicorn's cycle that are not documented, as ``uvicorn_protocol`` does.
"""

import asyncio
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
COMMENT = b":\n\n"  # of a text/event-stream


class Cycle(RequestResponseCycle):
    """``last``: the connection ends with this answer; known when the answer is complete."""

    last = False
    _until_close = False  # the end of the connection ends the answer
    _is_sse = False

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            headers = list(message.get("headers", ()))
            self._begin(dict(headers))
            if not self.keep_alive:  # not every version of uvicorn says so itself
                message = {**message, "headers": [*headers, (b"connection", b"close")]}
        else:
            if self._until_close:
                self.expected_content_length = len(message.get("body", b""))  # uvicorn compares the two
            if not message.get("more_body", False):
                self.last, self.keep_alive = not self.keep_alive, True  # the protocol closes, when all has been read
        await super().send(message)

    def _begin(self, headers: dict[bytes, bytes]) -> None:
        self._is_sse = headers.get(b"content-type", b"").startswith(b"text/event-stream")
        if self.more_body:
            self.keep_alive = False
        if self.scope["http_version"] == "1.0" and b"content-length" not in headers:
            self._until_close, self.chunked_encoding = True, False

    @property
    def streams(self) -> bool:
        """An answer of unknown length is being sent."""
        return bool(self.response_started and not self.response_complete and self._is_open_ended)

    @property
    def _is_open_ended(self) -> bool:
        return bool(self.chunked_encoding or self._until_close)

    def framed(self, data: bytes) -> bytes:
        """As a part of an answer of unknown length."""
        return data if self._until_close else b"%x\r\n%b\r\n" % (len(data), data)

    @property
    def harmless(self) -> bytes | None:
        """Bytes that may be sent now without changing the answer; b"" = nothing is needed, None = there are none."""
        if not self.response_started:
            return CONTINUE if self.scope["http_version"] == "1.1" else b""
        if not self.streams:
            return b""
        return self.framed(COMMENT) if self._is_sse else None


class Link:
    """``client.Link`` on uvicorn's state of the request."""

    __slots__ = ("_cycle", "_flow", "_leavers", "_transport")

    def __init__(self, cycle: Cycle, leavers: set[Callable[[], None]]) -> None:
        self._cycle = cycle
        self._flow = cycle.flow
        self._transport = cycle.transport
        self._leavers = leavers  # callbacks for the loss of the connection

    @property
    def ready(self) -> bool:
        return self._cycle.streams and not self._flow.write_paused and not self._transport.is_closing()

    def push(self, data: bytes) -> None:
        self._transport.write(self._cycle.framed(data))

    def on_leave(self, callback: Callable[[], None]) -> Callable[[], None]:
        self._flow.resume_reading()  # else a disconnect is not noticed; uvicorn's ``receive`` does the same
        if self._transport.is_closing():
            asyncio.get_running_loop().call_soon(callback)
        self._leavers.add(callback)
        return lambda: self._leavers.discard(callback)

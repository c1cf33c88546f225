"""The response of one exchange: the buffer that its reader waits on, and the HTTP/1 parser that fills it.

Caveat: llhttp is not told of the end of the connection, so ``ResponseReader.eof`` decides whether the body ended
(neither Content-Length nor chunked) or was truncated.
"""

import asyncio
from enum import Enum, auto

import httptools

from backends.upstream.exchange import ExchangeError, Fault, Head, Headers, Offer

HEAD_LIMIT = 64 * 1024  # bytes
SLICE = 16 * 1024  # bytes of a body that are given out at a time: a flood of tiny events costs 1 µs for each byte


class End(Enum):
    COMPLETE = auto()  # as Content-Length or the last chunk says
    EOF = auto()  # close-delimited, and closed: a killed server ends like this too


def close_delimited(headers: Headers) -> bool:
    names = dict(headers)
    return b"content-length" not in names and b"chunked" not in names.get(b"transfer-encoding", b"").lower()


class Answer:
    """The received part of one answer, and the only task that waits for more. Used by both dialers.

    Buffered bytes are delivered before the end, whatever the end is.
    """

    __slots__ = ("_chunks", "_loop", "_offer", "_sliced", "_waiter", "end", "head", "size", "waiting_since")

    def __init__(self) -> None:
        self.head: Head | None = None
        self.end: End | ExchangeError | None = None
        self.size = 0
        self.waiting_since = 0.0  # event loop time; 0.0 = no read is pending, or it was served
        self._loop = asyncio.get_running_loop()  # kept: each get_running_loop() costs a system call (getpid)
        self._chunks: list[bytes] = []
        self._sliced = False  # what was given out last was a part of what there is
        self._waiter: asyncio.Future[None] | None = None
        self._offer: Offer | None = None  # of the pending read

    def begin(self, head: Head) -> None:
        self.head = head
        self._wake()

    def put(self, chunk: bytes) -> None:
        if self.end is not None:
            return  # bytes after a complete body are dropped
        if self._offer is not None and not self._chunks and self._accepted(self._offer, chunk):
            return
        self._chunks.append(chunk)
        self.size += len(chunk)
        self._wake()

    def _accepted(self, offer: Offer, chunk: bytes) -> bool:
        waiter = self._waiter
        if waiter is None or waiter.done():
            return False
        try:
            return offer(chunk)
        except Exception as exc:  # noqa: BLE001 - an error of the reader's offer, raised where it reads
            waiter.set_exception(exc)
            return True

    def finish(self, end: End | ExchangeError) -> None:
        """Only the first call has an effect."""
        if self.end is None:
            self.end = end
            self._wake()

    def overrule(self, error: ExchangeError) -> None:
        """Replaces any end but COMPLETE: the clean EOF of a killed server becomes the error that killed it."""
        if self.end is not End.COMPLETE:
            self.end = error
            self._wake()

    def discard(self) -> None:
        self._chunks.clear()
        self.size = 0

    async def wait_head(self) -> Head:
        while self.head is None:
            if isinstance(self.end, ExchangeError):
                raise self.end
            await self._more()
        return self.head

    async def take(self, offer: Offer | None = None) -> bytes:
        """At most ``SLICE`` bytes. Others have their turn between two slices of what came at once."""
        if self._sliced:
            await asyncio.sleep(0)
        while not self._chunks:
            if isinstance(self.end, ExchangeError):
                raise self.end
            if self.end is not None:
                return b""
            await self._more(offer)
        chunks = self._chunks
        data = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        self.discard()
        self._sliced = len(data) > SLICE
        if self._sliced:
            self._chunks.append(data[SLICE:])
            self.size = len(data) - SLICE
        return data[:SLICE]

    async def _more(self, offer: Offer | None = None) -> None:
        if self._waiter is not None:
            raise RuntimeError("two tasks read one exchange")
        self._waiter = self._loop.create_future()
        self._offer = offer
        self.waiting_since = self._loop.time()
        try:
            await self._waiter
            self.waiting_since = 0.0
        finally:
            self._waiter = self._offer = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class ResponseReader:
    """Parses the bytes of one HTTP/1 response into its ``Answer``. Also the callback object of httptools."""

    def __init__(self, answer: Answer, method: str, peer: str) -> None:
        self.on_body = answer.put  # bound directly: no Python frame between llhttp and the buffer
        self._answer = answer
        self._method = method
        self._peer = peer
        self._headers: list[tuple[bytes, bytes]] = []
        self._header_bytes = 0
        self._fed = 0  # bytes received before the head was complete
        self._until_eof = False
        self._parser: httptools.HttpResponseParser | None = httptools.HttpResponseParser(self)

    def feed(self, data: bytes) -> None:
        if self._parser is None:
            return
        if self._until_eof:  # all bytes are body
            self._answer.put(data)
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as exc:
            self._fail(Fault.PROTOCOL, f"{self._peer} does not speak HTTP: {exc}", exc)
        if self._answer.head is None:
            self._fed += len(data)
            self._check_head_size(self._fed)

    def eof(self) -> None:
        if self._answer.head is None:
            self._fail(Fault.EOF_BEFORE_HEAD, f"{self._peer} closed the connection without an answer")
        elif self._until_eof:
            self._answer.finish(End.EOF)
        else:
            self._fail(Fault.INCOMPLETE, f"{self._peer} closed the connection in the middle of its answer")

    def release(self) -> None:
        """Break the cycle of parser and callbacks, which would keep each exchange until the garbage collector runs."""
        self._parser = None

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name.lower(), value.strip(b" \t")))  # llhttp leaves trailing blanks
        self._header_bytes += len(name) + len(value)

    def on_headers_complete(self) -> None:
        if self._answer.head is not None or self._answer.end is not None or self._parser is None:
            return  # a second response, without a request
        status = self._parser.get_status_code()
        if status < 200:  # 100, 103: the final response follows
            self._headers.clear()
            return
        self._check_head_size(self._header_bytes)
        if self._answer.end is None:
            headers = tuple(self._headers)
            self._until_eof = close_delimited(headers)
            self._answer.begin(Head(status, headers))
            if self._method == "HEAD":
                self._answer.finish(End.COMPLETE)

    def on_message_complete(self) -> None:
        if self._answer.head is not None:  # else: it was a 1xx
            self._answer.finish(End.COMPLETE)

    def _check_head_size(self, size: int) -> None:
        if size > HEAD_LIMIT:
            self._fail(Fault.PROTOCOL, f"{self._peer} sent a head of more than {HEAD_LIMIT} bytes")

    def _fail(self, fault: Fault, detail: str, cause: Exception | None = None) -> None:
        error = ExchangeError(fault, detail)
        error.__cause__ = cause
        self._answer.finish(error)

"""An upstream that was asked for a stream and answered in one piece: many small servers ignore ``stream``.

Read whole, and given on as the stream it should have been, so that everything after it knows one form only.
"""

from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from backends.upstream.exchange import ExchangeError, Fault, Head, Offer
from gateway.api.json_codec import dumps, loads
from gateway.api.kinds import Kind
from gateway.stream.aggregate import MAX_ANSWER, whole_answer
from gateway.stream.error_shapes import find_error
from gateway.stream.lost_calls import Ending
from gateway.stream.sse import MAX_EVENT

DONE = b"data: [DONE]\n\n"


class Source(Protocol):
    """What an answer is read from: an exchange, or ``UnstreamedAnswer`` around one."""

    async def read(self, offer: Offer | None = None) -> bytes:
        """Raises ExchangeError."""
        ...


More = Callable[[Source, bytearray], Awaitable[bytes]]
"""Reads on, given what was read so far; b"" = that was all."""


async def plainly(source: Source, _so_far: bytearray) -> bytes:
    """Raises ExchangeError."""
    return await source.read()


def is_unstreamed(head: Head) -> bool:
    return head.get(b"content-type").lower().startswith(b"application/json")


class UnstreamedAnswer:
    """The answer of ``source`` as the events of a stream; ``read`` like the exchange's own."""

    def __init__(self, source: Source, kind: Kind, more: More = plainly) -> None:
        self._source = source
        self._more = more
        self._kind = kind
        self._done = False

    async def read(self, _offer: Offer | None = None) -> bytes:
        """Raises ExchangeError."""
        if self._done:
            return b""
        self._done = True
        return as_stream(await read_whole(self._source, MAX_EVENT, self._more), self._kind)


async def read_whole(source: Source, limit: int = MAX_ANSWER, more: More = plainly) -> bytes:
    """``limit``: bytes. Raises ExchangeError."""
    body = bytearray()
    while data := await more(source, body):
        body += data
        if len(body) > limit:
            raise ExchangeError(Fault.PROTOCOL, f"it sent an answer of more than {limit} bytes")
    return bytes(body)


def as_stream(body: bytes, kind: Kind) -> bytes:
    """Nothing, where it is no answer: then the stream it stands for ended without an end. A whole one ends with
    ``[DONE]``, so that its reader knows at once that nothing follows, and gives the slot back before it is written."""
    try:
        answer = loads(body)
    except ValueError:
        return b""
    if not isinstance(answer, dict):
        return b""
    end = b""
    if find_error(answer) is None:
        end = DONE if isinstance(whole_answer(answer, kind), Ending) else b""
        choices = answer.get("choices")
        if kind is Kind.CHAT and isinstance(choices, list):
            answer["choices"] = [_as_delta(choice) for choice in choices]
        answer["object"] = kind.chunk_object
    try:
        return b"data: " + dumps(answer) + b"\n\n" + end
    except ValueError:
        return b""


def _as_delta(choice: Any) -> Any:
    if not isinstance(choice, dict):
        return choice
    delta = choice.pop("message", None) or choice.get("delta")
    if isinstance(delta, dict) and isinstance(calls := delta.get("tool_calls"), list):
        delta["tool_calls"] = [{"index": i, **call} if isinstance(call, dict) else call for i, call in enumerate(calls)]
    return {**choice, "delta": delta or {}}

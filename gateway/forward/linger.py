"""Reading what may follow an answer that is whole, and is needed by nobody: for a short time, and at nobody's expense.

There are servers that send no ``[DONE]``, or no last chunk, and keep the connection open. Their answers end as well.
"""

import asyncio
from collections.abc import Callable

from gateway.api.json_codec import loads
from gateway.stream.unstreamed import Source

LINGER = 2.0  # seconds


class Rest:
    """Reads for ``seconds`` in all, counted from the first read."""

    def __init__(self, seconds: float = LINGER) -> None:
        self._seconds = seconds
        self._until: float | None = None  # event loop's time

    async def read(self, source: Source) -> bytes:
        """b"" = the body, or the time, has ended. Raises ExchangeError."""
        if self._until is None:
            self._until = asyncio.get_running_loop().time() + self._seconds
        try:
            async with asyncio.timeout_at(self._until):
                return await source.read()
        except TimeoutError:
            return b""


async def until_json_ends(
    source: Source, body: bytearray, *, seems_whole: Callable[[bool], None] = lambda _: None
) -> bytes:
    """The next bytes of an answer in one piece, of which ``body`` is read; b"" = the body has ended, or nothing has
    followed a whole JSON value for LINGER seconds. ``seems_whole`` is told before the read whether more is due. Raises
    ExchangeError."""
    last = body[-64:].rstrip().endswith(b"}")
    seems_whole(last)
    if not last:
        return await source.read()
    if data := await Rest().read(source):
        return data
    try:
        loads(bytes(body))
    except ValueError:
        seems_whole(False)
        return await source.read()
    return b""

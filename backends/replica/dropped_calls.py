"""Tool calls that one instance could not read and dropped, as its log tells, until the request of each has asked.

The log names no request: a line counts for the request that asks for it, once, if it was logged since a moment that the
request names. A traceback names the port of the request's connection, which is exact.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable

from backends.diagnosis.log_parser import LogParser

MAX_KEPT = 64  # that no request has asked for, of either kind
RAISED_WITHIN = 30.0  # seconds; the ports of connections are used again


class DroppedCalls:
    """``clock``: the event loop's time."""

    def __init__(self, clock: Callable[[], float] = lambda: 0.0) -> None:
        self._clock = clock
        self._dropped: deque[float] = deque(maxlen=MAX_KEPT)  # when
        self._raised: deque[tuple[int, float]] = deque(maxlen=MAX_KEPT)  # port, when
        self._counted = 0
        self._news = asyncio.Event()

    def note(self, log: LogParser) -> None:
        """After each line of output."""
        if log.dropped_calls > self._counted:
            self._counted = log.dropped_calls
            self._dropped.append(self._clock())
            self._news.set()
        while log.raised_in_call:
            self._raised.append((log.raised_in_call.popleft(), self._clock()))

    async def claim(self, *, since: float, within: float) -> bool:
        """Whether a call was dropped at ``since`` or later; waits for the news of it for ``within`` seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within):
                while not self._take(since):
                    self._news.clear()
                    await self._news.wait()
                return True
        return False

    @property
    def raised(self) -> bool:
        """Reading a call has raised an exception in a request that has not asked yet."""
        return bool(self._raised)

    def claim_raised(self, port: int) -> bool:
        """Whether reading a call raised an exception in the request of this connection, which ended it."""
        found = [one for one in self._raised if one[0] == port and one[1] >= self._clock() - RAISED_WITHIN]
        for one in found:
            self._raised.remove(one)
        return bool(found)

    def _take(self, since: float) -> bool:
        for at in self._dropped:
            if at >= since:
                self._dropped.remove(at)
                return True
        return False

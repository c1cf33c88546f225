"""Work whose cost grows with a request's body: on the event loop for small bodies, in a worker thread for large ones.

    small body (nearly all)   called directly: a thread would cost more than the work
    large body                ``BodyWorkers.run``: streams continue meanwhile
    huge body                 the same, one at a time: it takes the most memory, and its calls into C the longest

The threads are few, since their work holds the interpreter's lock for most of its time: more threads would only take
more of it from the event loop. Further requests wait in the executor's queue, which ``server.max_connections`` bounds.

Caveat: one call into C holds the lock to its end, in any thread. Measured for 25 MB of chat (Python 3.11, one core of a
server): 17 to 24 ms to parse the JSON, 2 to 10 ms to write it. ``request.size`` says which bodies are large, and
bounds the number of values in one, since many values would make such a call slow.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from gateway.request import ParsedRequest

T = TypeVar("T")

THREADS = 2
HUGE = 4 << 20  # bytes


class BodyWorkers:
    def __init__(self, threads: int = THREADS) -> None:
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="body")
        self._huge = ThreadPoolExecutor(1, thread_name_prefix="huge body")
        self._counting = ThreadPoolExecutor(1, thread_name_prefix="tokens")

    async def run(self, work: Callable[[], T], size: int = 0) -> T:
        """``size``: bytes of the body, decompressed, at most. Cancelling ends the wait; work that has begun runs to its
        end, and its result is discarded."""
        return await asyncio.get_running_loop().run_in_executor(self._huge if size > HUGE else self._threads, work)

    async def work_on(self, parsed: ParsedRequest, work: Callable[[], T]) -> T:
        """Work whose cost grows with the body of ``parsed``: in a thread, or directly where the body is small."""
        return await self.run(work, parsed.body_size) if parsed.costly else work()

    async def count(self, work: Callable[[], T]) -> T:
        """As ``run``, one at a time: to tokenize a megabyte takes up to 400 MB. No body waits for that."""
        return await asyncio.get_running_loop().run_in_executor(self._counting, work)

    def close(self) -> None:
        """Work that has not begun is cancelled."""
        for threads in (self._counting, self._huge, self._threads):
            threads.shutdown(wait=False, cancel_futures=True)

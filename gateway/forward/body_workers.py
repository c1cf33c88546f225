"""Work whose cost grows with a request's body: on the event loop for small bodies, in a worker thread for large ones.

    a small body (nearly all)   called where it is needed: a thread would cost more than the work
    a large one                 ``BodyWorkers.run``: streams go on meanwhile

The threads are few, since what they run holds the interpreter's lock for most of its time: more of them would only take
more of it away from the event loop. Requests beyond them wait in the executor's queue, which is bounded by
``server.max_connections``.

Caveat: one call into C holds the lock to its end, in whichever thread it runs. Measured for 25 MB of chat (Python 3.11,
one core of a server): to parse its JSON 17 to 24 ms, to write it 2 to 10 ms. ``request.size`` bounds the number of
values in a body, with which such a call could be made slow.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

LARGE = 256 << 10  # bytes; all work on a body of this size takes about 1 ms
THREADS = 2


def is_large(size: int) -> bool:
    """``size``: bytes of a body."""
    return size > LARGE


class BodyWorkers:
    def __init__(self, threads: int = THREADS) -> None:
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="body")

    async def run(self, work: Callable[[], T]) -> T:
        """Cancelling ends the wait; work that has begun runs to its end, and its result is dropped."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def close(self) -> None:
        """What has not begun never will."""
        self._threads.shutdown(wait=False, cancel_futures=True)

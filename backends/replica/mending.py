"""When a replica that is in back-off or given up may be started again before its time.

Either what it failed on has changed (``basis``: the model's files, the packages), or a time has come at which the cause
may have passed unseen.
"""

import asyncio
import contextlib
from collections.abc import Callable
from enum import StrEnum

from backends.domain.cadence import Cadence
from backends.domain.spec import Launch
from backends.replica.basis import Basis, basis


class Mended(StrEnum):
    """Why it is tried again, for the log."""

    CHANGED = "its files have changed"
    UNSEEN = "the cause may have passed"


class MendWatch:
    """Of one replica. ``clock``: event loop time."""

    def __init__(self, launch: Launch, *, clock: Callable[[], float], cadence: Cadence) -> None:
        self._launch = launch
        self._clock = clock
        self._cadence = cadence
        self._asked = asyncio.Event()

    def look_again(self) -> None:
        """A request came."""
        self._asked.set()

    async def until_mended(self, *, down: Callable[[], bool], retry_at: Callable[[], float]) -> Mended | None:
        """None: the replica is no longer ``down``. Looks every ``mend_retry`` seconds, and at requests. ``retry_at``:
        event loop time from which on it is tried whether or not anything has changed; inf = never."""
        before = await asyncio.to_thread(basis, self._launch)
        while down():
            at = retry_at()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(self._cadence.mend_retry, max(0.0, at - self._clock()))):
                    await self._asked.wait()
            self._asked.clear()  # before the look: a request that comes during it has another
            changed = await self._has_changed(before)
            if down() and (changed or self._clock() >= at):
                return Mended.CHANGED if changed else Mended.UNSEEN
            await asyncio.sleep(self._cadence.start_pause)  # however many requests there are
        return None

    async def _has_changed(self, before: Basis) -> bool:
        """And changes no longer: large files take some time to be copied, and are no model until then."""
        now = await asyncio.to_thread(basis, self._launch)
        if now == before:
            return False
        await asyncio.sleep(self._cadence.mend_settle)
        return await asyncio.to_thread(basis, self._launch) == now

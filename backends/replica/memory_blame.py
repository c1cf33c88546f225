"""Whether a replica that ran out of memory is to blame for it, or others that hold what it needs.

Looks at the memory in a thread, for a bounded time: requests wait for the verdict.
"""

import asyncio
import contextlib
from dataclasses import replace

from backends.domain.failure import Blame, Cause, Failure, Reason
from backends.memory.occupancy import Place
from backends.memory.past_lives import place_of
from backends.memory.scheduler import MemoryScheduler, Resident


class MemoryBlame:
    """Of one replica. ``within``: seconds that a verdict may wait for a look."""

    def __init__(self, replica: Resident, scheduler: MemoryScheduler, *, within: float) -> None:
        self._replica = replica
        self._scheduler = scheduler
        self._within = within

    async def judged(self, failure: Failure, *, alive: bool) -> Failure:
        """If others hold what it needs, the failure that says so and who, and blames neither it nor a request.
        ``alive``: its process still has its memory."""
        if failure.cause is not Cause.OOM or failure.blame is not Blame.BACKEND:
            return failure
        told = ""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._within):
                told = await self._scheduler.crowded_out(self._replica, place_of(failure), alive=alive)
        if not told:
            return failure
        message = f"{failure.message}, which others hold ({told})"
        return replace(failure, message=message, blame=Blame.MACHINE, reason=Reason.CROWDED_OUT)

    async def note_before(self) -> None:
        """How much a GPU has left. Called when the process begins, before it takes any of it."""
        past = self._replica.past
        before, seen = past.before, await self._scheduler.look(Place.DEVICE)
        if seen is not None and past.before is before:  # else another life has begun
            before[Place.DEVICE] = seen.available

    async def note_device(self, pid: int) -> None:
        """Whether the process ``pid``, which has generated, uses a GPU, and how much of it."""
        seen, past = await self._scheduler.look(Place.DEVICE), self._replica.past
        if seen is not None and pid in seen.own:
            past.on_device, past.device_size = True, seen.own[pid]

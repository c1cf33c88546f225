"""What the process of one replica is told about memory, and what is learned from what it tells.

A process without our instrument is told by its flags alone, at its launch.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from backends import mlx_server
from backends.domain.engine_command import BoundPromptCache, EngineCommand, ReleasePool, SetLimits
from backends.domain.report import EngineReport
from backends.domain.share import Share
from backends.domain.spec import Launch
from backends.memory import measured
from backends.memory.share import Ours, Sizes, sizes
from backends.process.learned import Learned

SETTLED = 3.0  # seconds after the first report of a ready process: until then its footprint may be that of its start
LOWER = 0.98  # of the least that an idle process held: noted
NOTHING = Sizes()


class Footprint(Protocol):
    """Of a process, in bytes (``process_memory``)."""

    @property
    def now(self) -> int | None: ...

    @property
    def peak(self) -> int: ...


class EngineMemory:
    """Of one replica, over all its processes. ``share``: what it may use now; ``tell``: sends a command to the present
    process."""

    def __init__(
        self,
        launch: Launch,
        *,
        share: Callable[[], Share],
        tell: Callable[[EngineCommand], object],
        peaks: Learned[int],
        bases: Learned[int],
    ) -> None:
        self._launch = launch
        self._share = share
        self._tell = tell
        self._peaks = peaks
        self._bases = bases
        size, entries = mlx_server.cache_flags(launch.argv)
        self.ours = Ours(size, entries, pool="--cache-limit-gb" not in launch.argv)
        self.share: Share | None = None  # as last looked at; None = there is no process
        self._told = NOTHING
        self._learned = False  # from what the present process has told
        self._ready_at: float | None = None  # first seen ready, by its report
        self._base: int | None = None  # least that the present process held while it was idle
        self._released_at = float("-inf")

    def placeholders(self) -> dict[str, str]:
        """For the command line of the next process."""
        self.ended()
        share = self.share = self._share()
        return {"prompt_cache_bytes": str(share.prompt_cache), "prompt_cache_size": str(share.entries)}

    def ended(self) -> None:
        """There is no process any more."""
        self.share, self._told, self._learned = None, NOTHING, False
        self._ready_at, self._base = None, None

    def note_exit(self, peak: int) -> None:
        """``peak``: the highest footprint of a process that was ready, with its caches."""
        if not self._learned:
            self._peaks.note(self._launch, peak)

    def update(self, report: EngineReport | None, memory: Footprint, *, idle: float, now: float) -> None:
        """Called again and again while the process is ready. ``idle``: seconds without a request."""
        if report is None:
            self._told = NOTHING  # it may not have heard
            self.note_exit(memory.peak)
            return
        self._ready_at = now if self._ready_at is None else self._ready_at
        if memory.now and now - self._ready_at >= SETTLED:
            self._learn(memory.now, report)
        self.resize(report)
        if measured.pool_is_idle(report, min(idle, now - self._released_at)):
            self._released_at = now
            self._tell(ReleasePool())

    def _learn(self, footprint: int, report: EngineReport) -> None:
        self._learned = True
        working = measured.working(footprint, report)
        self._peaks.note(self._launch, working)
        if measured.is_idle(report):
            self._note_base(working)

    def _note_base(self, working: int) -> None:
        """After a crowd, a process may for a while hold more than it needs."""
        if self._base is None or working < LOWER * self._base:
            self._base = working
            self._bases.note(self._launch, working)

    def resize(self, report: EngineReport) -> None:
        """Tells the process its share, where that has changed."""
        self.share = self._share()
        now = sizes(self.share, report.active, self.ours)
        if not now.differ(self._told):
            return
        self._told = now
        if now.prompt_cache is not None or now.entries is not None:
            self._tell(BoundPromptCache(now.prompt_cache, now.entries))
        self._tell(SetLimits(now.pool, now.limit))

    def room(self, report: EngineReport | None) -> int | None:
        """Bytes for the batch: beside what the prompt cache would hold once ``make_room`` was called; where we may not
        change it, beside what it holds; where that is not known, beside a full one. None = nothing is known."""
        share = self.share
        if share is None or not share.total:
            return None
        if report is None or report.cached_bytes is None:
            return share.batch
        cached = min(report.cached_bytes, share.kept) if self.ours.prompt_cache else report.cached_bytes
        return max(share.batch, share.flexible - cached)

    def most(self, report: EngineReport | None) -> int | None:
        """Bytes for the batch, once all that is cached was dropped, if that is ours to drop."""
        share = self.share
        if share is None or not share.total or report is None or not self.ours.prompt_cache:
            return self.room(report)
        return max(share.batch, share.flexible)

    def beside(self, report: EngineReport) -> int | None:
        """Bytes for the batch beside all that is cached; None = not known, or nothing is ours to drop."""
        share = self.share
        if share is None or not share.total or not self.ours.prompt_cache or not report.cached_bytes:
            return None
        return share.flexible - report.cached_bytes

    def make_room(self, report: EngineReport, need: Callable[[], int | None], *, all_of_it: bool = False) -> None:
        """Before a request is sent, or a batch grows: drops what is cached in place of the batch with it. ``need``:
        bytes of that batch. ``all_of_it``: nothing has to stay cached. The next ``update`` allows the cache its whole
        size again; what the batch takes of it is counted by the server."""
        share, cached = self.share, report.cached_bytes or 0
        kept = 0 if all_of_it or share is None else share.kept
        if share is None or not self.ours.prompt_cache or not share.total or cached <= kept:
            return
        size = max(kept, share.flexible - (need() or 0))
        if size < cached:
            self._told = replace(self._told, prompt_cache=size)
            self._tell(BoundPromptCache(size))

    def release(self, report: EngineReport) -> None:
        """For another model."""
        self.resize(report)
        self._tell(ReleasePool())

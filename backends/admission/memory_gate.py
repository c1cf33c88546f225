"""Admission by memory: whether the batch of one replica with one more request fits the memory that it may take.

What is known of a request: its prompt, counted or estimated; the likely length of its answer; and, from its stream, how
far the prompt was read and how much was written (a piece of the stream is about a token). A request is always admitted
to an idle replica: alone it has as much memory as it will ever have.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from backends.admission.batch import Member, bound, fits, likely_beyond, longest_prompt, peak
from backends.admission.engine_view import corrected
from backends.admission.growth import Growing, Stop, near, to_stop
from backends.admission.inflight import InFlight
from backends.admission.lease import Lease
from backends.admission.room_limit import RoomLimit
from backends.domain.prompt_bound import PromptBound
from backends.domain.report import EngineReport
from backends.domain.work import Work
from backends.memory import units
from backends.memory.kv_cost import KvCost

ERROR = 0.15  # of the predicted peak (nine of ten random mixes, ``benchmarks/batch_memory.py``)


@dataclass(frozen=True, slots=True)
class Shortage:
    """Why a request was not admitted, in bytes: the batch of ``members`` requests, with it, would need ``need`` of
    ``room``."""

    members: int
    need: int
    room: int

    @property
    def missing(self) -> int:
        return self.need - self.room

    def __str__(self) -> str:
        need, room = units.memory(self.need), units.memory(self.room)
        return f"with it the batch of {self.members} would need {need} of {room}"


class MemoryGate:
    """Of one replica. ``cost`` and ``room`` (bytes for the batch): None = not known, and then everything fits until
    memory runs out. ``report``: what the process tells of itself. ``doubted``: a request was refused for what the
    engine told alone, which may be over by now."""

    def __init__(
        self,
        flight: InFlight,
        *,
        cost: Callable[[], KvCost | None],
        room: Callable[[], int | None],
        clock: Callable[[], float],
        report: Callable[[], EngineReport | None] = lambda: None,
    ) -> None:
        self._flight = flight
        self._report = report
        self.doubted = False
        self._cost = cost
        self._room = room
        self._clock = clock
        self._limit = RoomLimit()
        self._bound: PromptBound | None = None

    @property
    def room(self) -> int | None:
        return self._limit.of(self._room())

    def prompt_bound(self, room: int | None) -> PromptBound | None:
        """The longest prompt that may fit; None = not known. ``room``: bytes for the batch, if the prompt cache is
        empty. The most that was seen counts: other programs may end."""
        cost = self._cost()
        if room is None or cost is None:
            return None
        if self._bound is None or room > self._bound.room:
            self._bound = PromptBound(longest_prompt(cost, int(room * (1 + ERROR))), room)
        return self._bound

    def fits(self, work: Work, cached: Callable[[], int] = int, share: float = 1.0) -> bool:
        """``cached``: tokens of its prompt that are in the prompt cache of the replica; asked where they matter.
        ``share``: of the room, that the batch may fill."""
        leases = self._flight.leases
        if not leases or (cost := self._cost()) is None or (room := self.room) is None:
            return True
        room, report = int(share * room), self._report()
        if _at_most(cost, leases, work, report) <= room:
            return True
        new = _member(work, cached())
        known = members(leases)
        found = corrected(known, report)
        if fits(cost, [*found, new], room):
            return True
        self.doubted = self.doubted or (found != known and fits(cost, [*known, new], room))
        return False

    def shortage(self, work: Work, cached: Callable[[], int] = int) -> Shortage | None:
        """None: it fits."""
        room, cost = self.room, self._cost()
        if room is None or cost is None or self.fits(work, cached):
            return None
        batch = [*self.members, _member(work, cached())]
        return Shortage(len(batch), peak(cost, batch), room)

    @property
    def need(self) -> int | None:
        """Bytes of the batch at its likely peak; None = not known."""
        cost = self._cost()
        return None if cost is None else peak(cost, self.members)

    @property
    def members(self) -> list[Member]:
        """With what the engine tells of them."""
        return corrected(members(self._flight.leases), self._report())

    def soon(self, room: int) -> int | None:
        """Bytes that the batch needs soon; None: it fits ``room``, or is not known."""
        cost, batch = self._cost(), near(self.members)
        return None if cost is None or not batch or fits(cost, batch, room) else peak(cost, batch)

    def growing(self, room: int | None) -> list[Lease]:
        """Whose requests are to be stopped now, so that the batch goes on fitting ``room``."""
        leases, room, cost = list(self._flight.leases), self._limit.of(room), self._cost()
        if room is None or cost is None or sum(not lease.stopped for lease in leases) < 2:
            return []
        found = corrected(members(leases), self._report())
        batch: list[Growing[Lease | None]] = [
            Growing(lease, each, Stop.NEVER if lease.abandoned else lease.stop(), lease.admitted)
            for lease, each in zip(leases, found, strict=False)
            if not lease.stopped
        ]
        batch += [Growing(None, each, Stop.NEVER, 0.0) for each in found[len(leases) :]]
        return [lease for lease in to_stop(cost, batch, room, error=ERROR) if lease is not None]

    @property
    def told(self) -> str:
        """What the batch needs at its likely peak of what it may take, for people."""
        amounts = ("?" if each is None else units.memory(each) for each in (self.need, self.room))
        return " of ".join(amounts)

    def ran_out(self) -> None:
        """Of memory, and not because of other programs. The requests are still in flight."""
        need = self.need
        if need is not None and len(self._flight.leases) > 1:
            self._limit.ran_out(need, self._clock())

    def answered(self) -> None:
        now = self._clock()
        if self._limit.is_due(now):
            self._limit.answered(self._room(), now)


def _at_most(cost: KvCost, leases: Iterable[Lease], work: Work, report: EngineReport | None) -> int:
    """An upper bound of what the batch needs, in time linear in its members."""
    count, longest = 1, work.prompt_tokens + work.likely_tokens
    for lease in leases:
        count += 1
        longest = max(longest, lease.work.prompt_tokens + lease.work.likely_tokens)
    if report is not None:
        count = max(count, (report.reading or 0) + (report.decoding or 0) + 1)
        longest = max(longest, likely_beyond(report.longest or 0, 0))
    return bound(cost, count, longest)


def members(leases: Iterable[Lease]) -> list[Member]:
    return [member(lease) for lease in leases]


def member(lease: Lease) -> Member:
    progress, work = lease.progress, lease.work
    written = lease.exchange.pieces if progress.begun and lease.exchange is not None else 0
    likely = work.likely_tokens
    if written >= likely:  # it is longer than most: taken to go on for a while
        likely = max(likely, min(work.max_tokens, likely_beyond(written, likely)))
    read = progress.read if progress.prefilling or progress.begun else min(lease.cached, lease.prompt_tokens)
    return Member(lease.prompt_tokens, likely, read=read, written=written, decoding=progress.begun)


def _member(work: Work, cached: int) -> Member:
    return Member(work.prompt_tokens, work.likely_tokens, read=min(cached, work.prompt_tokens))

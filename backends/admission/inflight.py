"""The requests in flight on one replica, and what they show together: silence, its explanations, their order."""

import math
from collections.abc import Collection

from backends.admission.lease import Lease
from backends.admission.pace import Pace
from backends.admission.reading_rate import ReadingRate
from backends.admission.reading_turns import Batch
from backends.admission.rhythm import LearnedRhythm, Workload
from backends.diagnosis.suspects import RequestProgress
from backends.domain.priority import Priority
from backends.mlx_server import PROMPT_CONCURRENCY
from backends.upstream.exchange import ExchangeError

LONG_PROMPT = 1.0  # seconds that its reading takes at least
NOT_BEGUN = 10.0  # seconds; mlx_lm.server begins with a request within its time budget (0.5 s) and one step, if it can
LATE = 0.1  # share of the elapsed time that is left at least of a reading that takes longer than expected
RECENT = 2.0  # seconds since the last byte of an answer that is being written


class InFlight:
    """The leases of one replica, over all its instances: requests of an instance that is ending may still be open.
    Its length is the number of slots taken.

    ``batches``: the engine is known to answer several requests at a time, so an abandoned one does not hold up others.
    ``sequential``: it has been seen to answer one after the other: a wrapper's flags or the model do not let it batch.
    """

    def __init__(self, *, batches: bool = True) -> None:
        self.pace = Pace()
        self.rhythm = LearnedRhythm()
        self.reading = ReadingRate()
        self.batches = batches
        self.sequential = False
        self._leases: dict[Lease, None] = {}
        self._idle_at = 0.0  # event loop time at which last no request was waiting
        self._last_byte_at = 0.0  # for requests that have ended since
        self.answered_at = 0.0  # event loop time of the last byte of a complete answer

    def __len__(self) -> int:
        return len(self._leases)

    @property
    def leases(self) -> Collection[Lease]:
        """All that take a slot, in the order in which they were admitted: mlx_lm.server reads prompts in that order."""
        return self._leases.keys()

    @property
    def anybody_alone(self) -> bool:
        """The request in flight must be alone on the replica. (Such a request is admitted only on an idle replica.)"""
        if len(self._leases) != 1:
            return False
        (lease,) = self._leases
        return lease.alone or lease.unbatchable

    def count_of(self, priority: Priority) -> int:
        """Requests of this class and of less urgent ones."""
        return sum(lease.priority >= priority for lease in self._leases)

    def slots_of(self, priority: Priority) -> int:
        """Slots that requests of this class and of less urgent ones take. One that others cannot run beside counts as
        many: a batch."""
        mine = (lease for lease in self._leases if lease.priority >= priority)
        return sum(PROMPT_CONCURRENCY if lease.unbatchable else 1 for lease in mine)

    @property
    def clients(self) -> int:
        """Number of client requests in flight."""
        return sum(not (lease.internal or lease.abandoned) for lease in self._leases)

    @property
    def unread(self) -> int:
        """Requests whose prompt was not read yet, as far as they tell."""
        return sum(not lease.progress.begun for lease in self._leases)

    @property
    def abandoned_count(self) -> int:
        return sum(lease.abandoned for lease in self._leases)

    @property
    def active(self) -> bool:
        """Somebody waits for an answer."""
        return any(not lease.abandoned for lease in self._leases)

    def add(self, lease: Lease) -> None:
        others = self.of(lease.generation)
        for other in others:
            other.accompanied = lease.accompanied = True
            if not other.progress.begun:
                other.crowded = lease.crowded = True
        if not others:
            self._idle_at = lease.admitted
            self._last_byte_at = 0.0
        self._leases[lease] = None

    def discard(self, lease: Lease) -> None:
        """The request has ended; an abandoned one keeps its slot until ``over``."""
        self._last_byte_at = max(self._last_byte_at, lease.last_byte_at)
        if lease.completed:
            self.answered_at = max(self.answered_at, lease.last_byte_at)
        if not lease.abandoned:
            self._leases.pop(lease, None)
        self.pace.note(*lease.written)
        self.reading.note(*lease.read, crowded=lease.crowded)
        if lease.completed and any(
            other.progress.decoding and other.admitted < lease.admitted for other in self.of(lease.generation)
        ):
            self.batches = True  # it began later than one that goes on, and has ended

    def held_up(self, generation: int, now: float) -> list[Lease]:
        """The requests that have not begun while one that came before them goes on: they wait for its end."""
        leases = self.of(generation)
        writing = [lease for lease in leases if lease.progress.decoding and now - lease.last_byte_at < RECENT]
        return [
            late
            for late in leases
            if late.exchange is not None
            and not (late.last_byte_at or late.work.one_piece)
            and late.identity.is_mlx
            and now - late.admitted >= NOT_BEGUN
            and any(lease.admitted < late.admitted for lease in writing)
        ]

    def over(self, lease: Lease) -> None:
        self._leases.pop(lease, None)

    def forget(self, generation: int) -> None:
        """The instance has ended, and with it what was abandoned on it."""
        for lease in self.abandoned(generation):
            lease.over()

    def of(self, generation: int) -> list[Lease]:
        return [lease for lease in self._leases if lease.generation == generation and not lease.abandoned]

    def abandoned(self, generation: int) -> list[Lease]:
        return [lease for lease in self._leases if lease.generation == generation and lease.abandoned]

    def noticed(self, port: int) -> None:
        """The backend has noticed that the connection from that port of ours is lost."""
        for lease in tuple(self._leases):
            if lease.abandoned and lease.hung_up_at and lease.exchange and lease.exchange.local_port == port:
                lease.over()

    def progress_of(self, generation: int) -> dict[Lease, RequestProgress]:
        """The progress of each request that was sent to this instance, abandoned ones included."""
        return {lease: lease.progress for lease in self.at_work(generation)}

    def any_decoding(self, generation: int) -> bool:
        """The answer to one of these requests has begun."""
        return any(progress.decoding for progress in self.progress_of(generation).values())

    def abort(self, generation: int, error: ExchangeError) -> None:
        for lease in (*self.of(generation), *self.abandoned(generation)):
            lease.abort(error)

    def all_in_one_piece(self, generation: int) -> bool:
        """All requests that wait for this instance get their answers in one piece, so that no byte is due yet."""
        return all(lease.work.one_piece for lease in self.of(generation) if lease.waiting)

    def reading_until(self, generation: int) -> float:
        """Event loop time until which the prompts that are being read explain silence. mlx_lm.server tokenises one
        after the other and does nothing else meanwhile, and then reads them together; other servers do not report that
        they read. What takes less than ``LONG_PROMPT`` does not count: steady arrivals must not hide a stall."""
        mine = self.at_work(generation)
        unread = sorted((lease for lease in mine if not lease.progress.decoding), key=lambda lease: lease.admitted)
        until = 0.0
        for lease in unread:
            tokens, is_mlx = lease.prompt_tokens, lease.identity.is_mlx
            took = self.pace.tokenising(tokens) if is_mlx else self.pace.reading(tokens)
            if took >= LONG_PROMPT and not lease.last_byte_at:
                until = max(until, lease.admitted) + took
        if any(lease.last_byte_at and lease.identity.is_mlx for lease in unread):
            step = self.pace.step(max(lease.prompt_tokens for lease in unread))
            if step >= LONG_PROMPT:  # a batch costs as many times its longest prompt as it has members
                until = max(until, self.last_byte_at(generation) + len(unread) * step)
        return until

    def at_work(self, generation: int) -> list[Lease]:
        """The requests that were sent to this instance, abandoned ones included."""
        return [lease for lease in self._leases if lease.generation == generation and lease.exchange is not None]

    def batch(self, generation: int, now: float) -> Batch:
        """Abandoned requests included. An answer in one piece, whose beginning is not seen, counts as begun when its
        prompt should have been read."""
        reading = longs = decoding = longest = 0
        reading_left = long_left = 0.0
        since = math.inf
        for lease in self._leases:
            if lease.generation != generation:
                continue
            longest = max(longest, lease.prompt_tokens)
            took = now - lease.admitted
            unreported = lease.work.one_piece or lease.internal
            if lease.progress.begun or (unreported and took >= lease.reading):
                decoding += 1
            elif lease.long:
                longs, since = longs + 1, min(since, lease.admitted)
                long_left += max(lease.reading - took, LATE * took)
            else:
                reading, reading_left = reading + 1, reading_left + max(lease.reading - took, LATE * took)
        return Batch(reading, reading_left, longs, since, long_left, decoding, longest)

    def workload(self, generation: int, longest: int) -> Workload:
        """``longest``: tokens of the longest conversation that the process has seen."""
        mine = self.at_work(generation)
        unread = [lease for lease in mine if not lease.progress.begun]
        return Workload(
            members=len(mine),
            unread=tuple(lease.prompt_tokens for lease in unread),
            new=tuple(lease.prompt_tokens for lease in unread if not lease.last_byte_at),
            longest=longest,
        )

    def last_byte_at(self, generation: int) -> float:
        """Event loop time of the last byte of this instance for any request, 0.0 = none."""
        mine = (lease.last_byte_at for lease in self._leases if lease.generation == generation)
        return max(mine, default=0.0)

    def quiet(self, generation: int, now: float) -> tuple[int, float]:
        """(number of requests that wait for a byte of this instance, seconds without a byte for any request while at
        least one waited). Must be called at every liveness tick.

        The arrival of a request does not reset the silence: steady arrivals must not hide a stall. A request whose
        client does not read does not count as waiting: the gateway does not read from the backend for it.
        """
        leases = self.of(generation)
        waiting = sum(lease.waiting for lease in leases)
        if not waiting:
            self._idle_at = now
            return 0, 0.0
        return waiting, now - max(self._idle_at, self._last_byte_at, self.last_byte_at(generation))

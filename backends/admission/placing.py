"""The replicas of one model as ``placement`` and ``reading_turns`` see them: what is being read where, who waits for
it, and what was decided.

Where no replica has shown how fast it reads, nothing is decided here, nor for a short request while all in flight are
short: then the pool's simple rule holds, and costs nothing.

No I/O, no clock: time is an argument.
"""

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from backends.admission.inflight import InFlight
from backends.admission.lease import Lease
from backends.admission.placement import ASSUMED_ANSWER, RECTANGLE, Asked, Candidate, Choice, choose
from backends.admission.reading_rate import LONG
from backends.admission.reading_turns import Batch, ReadingTurns
from backends.admission.slot_request import SlotRequest
from backends.domain.engine import Engine
from backends.domain.snapshot import Seat
from backends.mlx_server import PREFILL_STEP

NOTICEABLE = 0.25  # seconds of reading from which on the cost model chooses the replica
HEAVY = RECTANGLE // 8  # tokens of a prompt that make a batch noticeably slower
FRESH = 1.0  # seconds between two looks at the learned rates
DECISIONS = 32  # last ones that are kept
ARRIVALS_OVER = 30.0  # seconds; requests before that count less and less
IN_SLICES = 2  # prompts that are read in slices at a time on one replica, whose prompt cache must hold their beginnings


class Placed(Protocol):
    """A replica, as this file sees it."""

    @property
    def id(self) -> str: ...

    @property
    def generation(self) -> int: ...

    @property
    def engine(self) -> Engine: ...

    @property
    def inflight(self) -> int: ...

    @property
    def flight(self) -> InFlight: ...


@dataclass(frozen=True, slots=True)
class Decision:
    """``at``: event loop time. ``tokens``: of the prompt, ``cached``: those that the chosen replica has. ``joined``:
    the choice was to join a replica, not to wait for it."""

    at: float
    tokens: int
    cached: int
    joined: bool
    choice: Choice


class ArrivalRate:
    """Requests per second that are not long; those of ``ARRIVALS_OVER`` seconds ago count a third."""

    def __init__(self) -> None:
        self._count = 0.0
        self._at = 0.0

    def note(self, now: float) -> None:
        self._count, self._at = 1.0 + self._faded(now), now

    def per_second(self, now: float) -> float:
        return self._faded(now) / ARRIVALS_OVER

    def _faded(self, now: float) -> float:
        return self._count * math.exp((self._at - now) / ARRIVALS_OVER)


class Placing:
    """Of one model."""

    def __init__(self, backends: Sequence[Placed]) -> None:
        self.decisions: deque[Decision] = deque(maxlen=DECISIONS)
        self._backends = backends
        self._turns = {backend.id: ReadingTurns() for backend in backends}
        self._arrivals = ArrivalRate()
        self._noticeable = math.inf  # tokens of a prompt whose reading is noticeable, on the slowest replica
        self._looked_at = -FRESH
        self._longs: set[Lease] = set()  # whose long prompts are being read
        self._heavy: set[Lease] = set()  # beside which the cost model chooses for every request
        self._in_slices: dict[object, str] = {}  # prompts that are read in slices now, and on which replica

    # -- what is known of a request ------------------------------------------------------------------------------------

    def arrived(self, request: SlotRequest, now: float) -> bool:
        """A request has come. True: the cost model is to choose its replica. What is cached of it does not count here:
        that may be gone when its turn comes."""
        if now >= self._looked_at + FRESH:
            self._looked_at = now
            known = [b.flight.reading for b in self._backends if b.flight.reading.known]
            self._noticeable = min((rate.within(NOTICEABLE) for rate in known), default=math.inf)
        by_cost = request.long or request.work.prompt_tokens >= self._noticeable
        if not by_cost:
            self._arrivals.note(now)
        return by_cost

    def reading(self, request: SlotRequest, backend: Placed) -> float:
        """Seconds that ``backend`` takes for the part of the prompt that it has not cached, as other replicas have if
        it has not shown that yet; 0.0 = not known."""
        if backend.engine is not Engine.MLX_LM:
            return 0.0
        tokens, cached = request.work.prompt_tokens, request.cached_on(Seat(backend.id, backend.generation))
        return backend.flight.reading.seconds(tokens, cached) or self.slowest(tokens, cached)

    @property
    def knows_rate(self) -> bool:
        """A replica has shown how fast it reads."""
        return any(backend.flight.reading.known for backend in self._backends)

    def slowest(self, tokens: int, cached: int = 0) -> float:
        """Seconds that such a prompt takes on the slowest replica of those that have shown it; 0.0 = not known."""
        return max(backend.flight.reading.seconds(tokens, cached) for backend in self._backends)

    def is_long(self, request: SlotRequest, backend: Placed) -> bool:
        return backend.engine is Engine.MLX_LM and (request.long or self.reading(request, backend) >= LONG)

    @property
    def matters(self) -> bool:
        """The cost model is to choose the replica of every request, because of what is in flight."""
        return bool(self._heavy) and self.knows_rate

    # -- turns ---------------------------------------------------------------------------------------------------------

    @property
    def any_long(self) -> bool:
        """A long prompt is being read."""
        return bool(self._longs)

    def batch(self, backend: Placed, now: float) -> Batch:
        return backend.flight.batch(backend.generation, now)

    def admits(
        self, request: SlotRequest, backend: Placed, now: float, *, came: float, longs_came: float, others_came: float
    ) -> bool:
        """Whether it is the request's turn on ``backend``. Arrivals, in event loop time: ``came``, its own;
        ``longs_came``, of the first long request that waits for this replica; ``others_came``, of the first of all
        others in the queue. inf = there is none."""
        turns, batch = self._turns[backend.id], self.batch(backend, now)
        if self.is_long(request, backend):
            return self._may_begin(request, backend) and turns.admits_long(batch, now, others_came=others_came)
        return turns.admits(batch, now, came=came, long_came=longs_came)

    def _may_begin(self, request: SlotRequest, backend: Placed) -> bool:
        """Of those that would be read in slices, so many that none pushes another's out of the prompt cache."""
        if request.goes_on or not request.long:
            return True
        return self.slices_on(backend.id) < IN_SLICES

    def begins_slices(self, prompt: object, backend: str) -> None:
        """``prompt``: any object by which it is known. A slice of it is read on ``backend``, and the next will be."""
        self._in_slices[prompt] = backend

    def ends_slices(self, prompt: object) -> bool:
        """It has the lease for all that is left, or is given up. False: none of it was read in slices."""
        return self._in_slices.pop(prompt, None) is not None

    def slices_on(self, backend: str, *, beside: object = None) -> int:
        """Prompts that are read in slices on ``backend``, without ``beside``."""
        return sum(where == backend and prompt is not beside for prompt, where in self._in_slices.items())

    def admitted(self, lease: Lease, request: SlotRequest, backend: Placed) -> None:
        tokens = request.work.prompt_tokens
        if tokens < min(HEAVY, self._noticeable) and not request.long:
            return
        lease.reading, lease.long = self.reading(request, backend), self.is_long(request, backend)
        if lease.long:
            self._longs.add(lease)
        if lease.long or tokens >= HEAVY or lease.reading >= NOTICEABLE:
            self._heavy.add(lease)

    def over(self, now: float) -> None:
        """A prompt may have been read, or its request has ended."""
        if self._heavy:
            self._heavy = {lease for lease in self._heavy if lease.in_flight}
        for lease in tuple(self._longs):
            if lease.progress.begun or not lease.in_flight:
                self._longs.discard(lease)
                self._turns[lease.spec.id].ended(lease.admitted, now)

    def changes_at(self, now: float) -> float | None:
        """Event loop time at which a queued request's turn may come by time alone; None = never."""
        times = (self._turns[one.id].changes_at(self.batch(one, now), now) for one in self._backends)
        return min((at for at in times if at is not None), default=None)

    # -- choosing ------------------------------------------------------------------------------------------------------

    def choose(
        self,
        request: SlotRequest,
        backends: Iterable[Placed],
        now: float,
        *,
        closed: frozenset[str],
        awaited: dict[str, float],
        turn: int,
    ) -> Choice:
        """``closed``: replicas that do not take it yet; ``awaited``: seconds of reading of the long ones that wait for
        each replica; ``turn``: for a round robin among equals."""
        candidates = []
        for index, backend in enumerate(backends):
            batch, turns = self.batch(backend, now), self._turns[backend.id]
            long, ahead = self.is_long(request, backend), awaited.get(backend.id, 0.0)
            wait: float | None = None
            if backend.id in closed:
                wait = ahead + (turns.wait(batch, now) if long else batch.long_left)
            candidates.append(
                Candidate(
                    backend.id,
                    batch,
                    self.reading(request, backend),
                    long=long,
                    step=backend.flight.reading.seconds(PREFILL_STEP),
                    wait=wait,
                    gap=backend.flight.rhythm.usual_gap,
                    closed=batch.longs > 0 or ahead > 0,
                    rank=(backend.inflight, (index - turn) % len(self._backends)),
                )
            )
        work = request.work
        answer = work.likely_tokens or min(work.max_tokens, ASSUMED_ANSWER)
        return choose(Asked(work.prompt_tokens, answer), candidates, self._arrivals.per_second(now))

    def decided(self, request: SlotRequest, choice: Choice, chosen: Placed, now: float, *, joined: bool) -> None:
        cached = request.cached_on(Seat(chosen.id, chosen.generation))
        self.decisions.append(Decision(now, request.work.prompt_tokens, cached, joined, choice))

"""What the liveness ticks of one instance show of its model's rhythm, for ``admission.rhythm``.

Nothing is done for each token: the gap between tokens is the time between the last bytes at two ticks, divided by the
number of times that bytes came. A pause is seen to within a tick, so nothing that is decided from it may be shorter.

No I/O, no clock: time is an argument.
"""

from dataclasses import dataclass

from backends.admission.inflight import InFlight
from backends.admission.lease import Lease
from backends.admission.rhythm import Workload

COLD_AFTER = 60.0  # seconds without a request, after which the system may have taken the model's pages
MAY_BE_A_CALL = 2.0  # seconds without a byte, where a tool call may have been withheld


@dataclass(frozen=True, slots=True)
class _Seen:
    """Of one request at a tick. ``heard``: event loop time of its last byte, 0.0 = none; ``begun``: its answer is being
    written."""

    pieces: int
    heard: float
    begun: bool


class RhythmWatch:
    """``longest``: tokens of the longest conversation that the process has seen, answers included. ``warm``: an answer
    has begun since it was last idle for long, so the model's pages are in memory."""

    def __init__(self, inflight: InFlight, generation: int) -> None:
        self.longest = 0
        self.warm = False
        self.workload = Workload()
        self._inflight = inflight
        self._generation = generation
        self._seen: dict[Lease, _Seen] = {}
        self._heard = 0.0
        self._busy_at = 0.0
        self._silence = 0.0

    def tick(self, now: float, silence: float, heard: float) -> None:
        """``silence``: seconds so far, in which the process did nothing either; ``heard``: event loop time of the last
        sign of life."""
        leases = self._inflight.at_work(self._generation)
        self._note_warmth(leases, now)
        for lease in leases:
            self._note_conversation(lease)
        before, self.workload = self.workload, self._inflight.workload(self._generation, self.longest)
        if heard > self._heard:
            reading = before.reading or self.workload.reading
            self._inflight.rhythm.note_pause(self._silence, now, reading=reading)
        self._heard, self._silence = max(heard, self._heard), silence
        seen = {lease: _seen(lease) for lease in leases}
        for lease, latest in seen.items():
            self._learn(lease, self._seen.get(lease), latest, before)
        self._seen = seen

    def ended(self, lease: Lease) -> None:
        self._note_conversation(lease)

    def _note_warmth(self, leases: list[Lease], now: float) -> None:
        if now - self._busy_at > COLD_AFTER:
            self.warm = False
        if leases:
            self._busy_at = now
        self.warm = self.warm or any(lease.progress.begun for lease in leases)

    def _note_conversation(self, lease: Lease) -> None:
        pieces = lease.exchange.pieces if lease.exchange is not None else 0
        self.longest = max(self.longest, lease.prompt_tokens + max(lease.written[0], pieces))

    def _learn(self, lease: Lease, earlier: _Seen | None, latest: _Seen, before: Workload) -> None:
        """``before``: the workload at the last tick."""
        if not latest.heard or not lease.waiting:
            return
        rhythm, tokens = self._inflight.rhythm, lease.prompt_tokens
        if earlier is None or not earlier.heard:
            if latest.begun and lease.identity.is_mlx:  # read since the last tick, or in one step
                rhythm.note_step(tokens, latest.heard - lease.admitted, 1)
            return
        pieces, seconds = latest.pieces - earlier.pieces, latest.heard - earlier.heard
        if pieces <= 0:
            return
        if not earlier.begun:
            self._note_step(lease, earlier, latest, before)
        elif not (before.reading or self.workload.reading or (lease.work.tools and seconds > MAY_BE_A_CALL)):
            rhythm.note_gap(seconds / pieces, pieces, self.workload.members)

    def _note_step(self, lease: Lease, earlier: _Seen, latest: _Seen, before: Workload) -> None:
        """Other servers than mlx_lm.server do not report their steps."""
        if not lease.identity.is_mlx:
            return
        rhythm, tokens, seconds = self._inflight.rhythm, lease.prompt_tokens, latest.heard - earlier.heard
        if latest.begun:  # some of the pieces are those of its answer
            rhythm.note_step(tokens, seconds, 1)
        else:
            members = min(len(work.unread) - len(work.new) for work in (before, self.workload))
            rhythm.note_step(tokens, seconds / (latest.pieces - earlier.pieces), max(1, members))


def _seen(lease: Lease) -> _Seen:
    pieces = lease.exchange.pieces if lease.exchange is not None else 0
    return _Seen(pieces, lease.last_byte_at, lease.progress.begun)

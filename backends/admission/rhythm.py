"""The rhythm of one replica's model, learned while it worked, and the silence that is too long for it.

Silence: seconds without a sign of life, which is a byte for any request, or progress on a prompt in the log.

    all answers in flight have begun    20 x the p99 gap between two tokens
    some prompts are still to be read   4 x one prefill step of that size, for all prompts that are read together,
                                        and for each that has just come its tokenising and its search
    both                                at least 10 s, and at least twice the longest such pause that ended well
    nothing of that kind was learned    no deadline

The search: for each new prompt mlx_lm.server walks its longest cached conversation in quadratic time, on the thread
that generates (``PromptTrie.search``, 0.32.2), and everything stands still: 0.16 s beside 8,192 tokens and 2.8 s beside
32,768 on an M5 Max (mlx-lm#1607), 3.9 s beside 49,000 on an x86 core. Eight new prompts are searched for one after the
other.

A prefill step: the prompts that are read together, and one token of each answer, which cost as many times the longest
prompt as there are members. Later steps attend to all that was read before, so a step takes longer at most in
proportion to the size of the prompt.

Pure: no I/O, no clock.
"""

from collections import deque
from dataclasses import dataclass

from backends.admission.pace import TOKENISED

FLOOR = 10.0  # seconds; kernels that are compiled for a new shape, and a batch that is copied, take 1 s or less
GAPS = 20.0  # times the p99 gap
STEPS = 4.0  # times a prefill step
HEALTHY = 2.0  # times the longest pause that ended well
SEARCH = 2.6e-9  # seconds for each token of the longest cached conversation, squared: the slowest that was measured
SEARCHES = 3.0  # times that, for slower machines
ENOUGH_GAPS = 64  # whose p99 means something
MANY_GAPS = 4096  # the weights of all are halved then: 1 % of that is soon reached by another rhythm
SHORTEST_GAP, BUCKET_RATIO, BUCKETS = 0.001, 1.25, 56  # up to 200 s
STEPS_KEPT = 8  # last steps of one size
PAUSES_KEPT = 32  # last pauses of one kind
LONG_PAUSE = 2.0  # seconds: shorter ones need no memory
PAUSE_COUNTS_FOR = 3600.0  # seconds


@dataclass(frozen=True, slots=True)
class Workload:
    """What one instance has to do. ``members``: requests that were sent to it. ``unread``: tokens of the prompts of
    those whose answers have not begun. ``new``: tokens of the prompts for which nothing has come at all. ``longest``:
    tokens of the longest conversation that the process has seen."""

    members: int = 0
    unread: tuple[int, ...] = ()
    new: tuple[int, ...] = ()
    longest: int = 0

    @property
    def reading(self) -> bool:
        return bool(self.unread)


class Gaps:
    """A histogram of the seconds between two tokens, by powers of ``BUCKET_RATIO``; old ones fade."""

    def __init__(self) -> None:
        self._counts = [0.0] * BUCKETS
        self.total = 0.0

    def note(self, seconds: float, count: int) -> None:
        index, edge = 0, SHORTEST_GAP
        while edge < seconds and index < BUCKETS - 1:
            index, edge = index + 1, edge * BUCKET_RATIO
        self._counts[index] += count
        self.total += count
        if self.total > MANY_GAPS:
            self._counts = [weight / 2 for weight in self._counts]
            self.total /= 2

    @property
    def p99(self) -> float | None:
        """Seconds, at most a quarter too many; None = too few gaps."""
        return self._quantile(0.01)

    @property
    def median(self) -> float | None:
        """The same."""
        return self._quantile(0.5)

    def _quantile(self, above: float) -> float | None:
        """``above``: share of the gaps that are longer."""
        if self.total < ENOUGH_GAPS:
            return None
        longer, index = 0.0, BUCKETS
        while longer <= self.total * above:
            index -= 1
            longer += self._counts[index]
        return SHORTEST_GAP * BUCKET_RATIO**index


class PrefillSteps:
    """The last seconds of a prefill step for each member of its batch, by the size of the prompt in powers of two."""

    def __init__(self) -> None:
        self._steps: dict[int, deque[float]] = {}

    def note(self, tokens: int, seconds: float, members: int) -> None:
        steps = self._steps.setdefault(tokens.bit_length(), deque(maxlen=STEPS_KEPT))
        steps.append(seconds / members)

    def longest(self, tokens: int) -> float | None:
        """For a prompt of that size, as the next larger ones took, else in proportion to the largest."""
        size = tokens.bit_length()
        larger = min((known for known in self._steps if known >= size), default=None)
        if larger is not None:
            return max(self._steps[larger])
        smaller = max(self._steps, default=None)
        return None if smaller is None else max(self._steps[smaller]) * 2.0 ** (size - smaller)


class Pauses:
    """The last long pauses that ended with a sign of life."""

    def __init__(self) -> None:
        self._pauses: deque[tuple[float, float]] = deque(maxlen=PAUSES_KEPT)  # when they ended, seconds

    def note(self, seconds: float, now: float) -> None:
        if seconds >= LONG_PAUSE:
            self._pauses.append((now, seconds))

    def longest(self, now: float) -> float:
        return max((seconds for at, seconds in self._pauses if now - at <= PAUSE_COUNTS_FOR), default=0.0)


class LearnedRhythm:
    """Of one replica, over all its processes."""

    def __init__(self) -> None:
        self.usual_gap = 0.0  # seconds between two tokens, in the batches as they were, or recalled; 0.0 = not known
        self._gaps = Gaps()
        self._shares = Gaps()  # gaps divided by the members of the batch
        self._steps = PrefillSteps()
        self._pauses = {False: Pauses(), True: Pauses()}  # by whether prompts were read

    def note_gap(self, seconds: float, tokens: int, members: int) -> None:
        """So many tokens of an answer came, in a batch of so many answers, with this gap between them."""
        self._gaps.note(seconds, tokens)
        self.usual_gap = self._gaps.median or self.usual_gap
        self._shares.note(seconds / members, tokens)

    def note_step(self, tokens: int, seconds: float, members: int) -> None:
        """One prefill step of a prompt of so many tokens took so long, beside ``members`` - 1 other prompts."""
        self._steps.note(tokens, seconds, members)

    def note_pause(self, seconds: float, now: float, *, reading: bool) -> None:
        """A silence has ended by itself."""
        self._pauses[reading].note(seconds, now)

    def writing(self, tokens: int, members: int) -> float:
        """Seconds that so many tokens take in a batch of so many answers; 0.0 = not known."""
        return tokens * (self._gap(members) or 0.0)

    def deadline(self, work: Workload, now: float) -> float | None:
        """Seconds of silence with this work that are too long; None = nothing was learned of such work."""
        work_time = self._reading(work) if work.reading else self._decoding(work)
        if work_time is None:
            return None
        return max(FLOOR + _arrivals(work), work_time, HEALTHY * self._pauses[work.reading].longest(now))

    def _decoding(self, work: Workload) -> float | None:
        gap = self._gap(work.members)
        return None if gap is None else GAPS * gap

    def _gap(self, members: int) -> float | None:
        """A larger batch than those seen is slower at most in proportion."""
        gap, share = self._gaps.p99, self._shares.p99
        return None if gap is None or share is None else max(gap, share * members)

    def _reading(self, work: Workload) -> float | None:
        step = self._steps.longest(max(work.unread))
        if step is None:
            return None
        return STEPS * step * len(work.unread) + _arrivals(work) + (self._decoding(work) or 0.0)


def _arrivals(work: Workload) -> float:
    """Seconds in which everything stands still because prompts have come."""
    return len(work.new) * SEARCHES * SEARCH * work.longest**2 + sum(work.new) / TOKENISED

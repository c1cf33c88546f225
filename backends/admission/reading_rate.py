"""How long a replica takes to read a prompt, learned from those that it has read.

    seconds    = effort / rate
    effort     = (n - c) x (1 + (n + c) / 2 / DOUBLED)    tokens from c to n: each attends to all that were read before
    rate       the median of the latest samples whose prompts were of about that size

Only prompts that were read with no other being read beside them show the rate: a batch of prompts costs as many times
its longest as it has members. Where there are no others, the fastest of a crowd is the least that the rate can be.

Pure: no I/O, no clock.
"""

from collections import deque
from statistics import median

from backends.admission.pace import DOUBLED

LONG = 1.5  # seconds of reading from which on a prompt is long: people beside it would notice
LATEST = 16  # samples that count, of each size
MOST = 1 << 21  # tokens of any prompt
ENOUGH = 512  # tokens that were read; in less, most of the time is overhead


class ReadingRate:
    """Of one replica, over all its processes; 0.0 seconds as long as nothing is known. The sizes of prompts are told
    apart by powers of two: overhead weighs most in the small ones, and no formula fits the attention of all models."""

    def __init__(self) -> None:
        self._rates: dict[int, deque[float]] = {}  # effort per second, by size
        self._medians: dict[int, float] = {}
        self._crowded: deque[float] = deque(maxlen=LATEST)

    def note(self, tokens: int, cached: int, seconds: float, *, crowded: bool = False) -> None:
        """A prompt of ``tokens``, of which the prompt cache had the first ``cached``, took ``seconds`` until the first
        token of its answer. ``crowded``: another prompt was read in this time."""
        if tokens - cached < ENOUGH or seconds <= 0.0:
            return
        rate = _effort(tokens, cached) / seconds
        if crowded:
            self._crowded.append(rate)
            return
        size = tokens.bit_length()
        rates = self._rates.setdefault(size, deque(maxlen=LATEST))
        rates.append(rate)
        self._medians[size] = median(rates)

    @property
    def known(self) -> bool:
        return bool(self._medians or self._crowded)

    def seconds(self, tokens: int, cached: int = 0) -> float:
        """For a prompt of ``tokens``, of which the first ``cached`` are in the prompt cache."""
        rate = self._rate(tokens)
        return _effort(tokens, min(cached, tokens)) / rate if rate else 0.0

    def within(self, seconds: float, cached: int = 0) -> int:
        """Tokens that are read after the first ``cached`` in so many seconds; 0 = nothing is known."""
        if not self.known:
            return 0
        least, most = 0, MOST
        while most - least > 1:  # no formula: the rate is another one for each size
            middle = (least + most) // 2
            if self.seconds(cached + middle, cached) <= seconds:
                least = middle
            else:
                most = middle
        return least

    def _rate(self, tokens: int) -> float:
        """Of the samples that are nearest in size, of two that are as near the larger ones; 0.0 = not known."""
        size = tokens.bit_length()
        nearest = min(self._medians, key=lambda known: (abs(known - size), -known), default=None)
        return max(self._crowded, default=0.0) if nearest is None else self._medians[nearest]


def _effort(tokens: int, cached: int) -> float:
    """In tokens that have none before them."""
    return (tokens - cached) * (1 + (tokens + cached) / 2 / DOUBLED)

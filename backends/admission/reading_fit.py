"""The time to read a prompt as a sum of three parts, fitted to prompts that were read.

    seconds = overhead + linear x (new + new x (cached + new / 2) / doubled)

    new        tokens that were read; each attends to all before it: ``cached + new / 2`` on average
    doubled    tokens after which a token takes twice as long
    overhead   of each request: tokenising, its turn, the first token of the answer

Least squares of the relative errors, the overhead not below 0. ``doubled`` is searched for, and costs the more the
further it is from what is assumed: where the sizes that were seen do not tell it, it is as assumed.

Pure.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

DOUBT = 0.02  # cost of a factor of two between what is found and what is assumed; 1 = that of an error of 100 %
NO_OVERHEAD = 0.5  # trust in that, beside one sample: slices take equal times, which else looked like overhead
FURTHEST = 8  # powers of two from what is assumed
FINER = (0.5, 0.25, 0.125)  # powers of two, of the last steps of the search


class Sample(NamedTuple):
    """``new`` tokens, at least 1, were read after ``cached`` ones in so many ``seconds``, overhead included."""

    new: int
    cached: int
    seconds: float

    def effort(self, doubled: float) -> float:
        """In tokens that have none before them."""
        return _effort(self.new, self.cached, doubled)


@dataclass(frozen=True, slots=True)
class Fit:
    """``overhead`` and ``linear`` in seconds, of a request and of a token that has none before it."""

    overhead: float
    linear: float
    doubled: float

    def reading(self, new: int, cached: int) -> float:
        """Seconds, without the overhead."""
        return self.linear * _effort(new, cached, self.doubled)

    def within(self, seconds: float, cached: int) -> float:
        """Tokens that are read after ``cached`` ones."""
        effort, first = seconds / self.linear, 1 + cached / self.doubled
        return 2 * effort / (first + math.sqrt(first**2 + 2 * effort / self.doubled))


def fit(samples: Sequence[tuple[Sample, int]], assumed: float) -> Fit:
    """``samples``: at least one, each with its weight; ``assumed``: of ``doubled``."""
    sums = _sums(samples)
    sums[0][0] += NO_OVERHEAD / min(sample.seconds for sample, _ in samples) ** 2

    def cost(power: float) -> float:
        return DOUBT * power**2 - _solved(sums, assumed * 2**power)[1]

    best = min(map(float, range(-FURTHEST, FURTHEST + 1)), key=cost)
    for step in FINER:
        best = min((best - step, best, best + step), key=cost)
    return _solved(sums, assumed * 2**best)[0]


def _sums(samples: Sequence[tuple[Sample, int]]) -> list[list[float]]:
    """Of the products of what a request, a token, and a token for each that it attends to have in the seconds of each
    sample, with each other and with the whole, which is 1."""
    rows = [
        ((1 / seconds, new / seconds, new * (cached + new / 2) / seconds, 1.0), weight)
        for (new, cached, seconds), weight in samples
    ]
    return [[sum(weight * row[i] * row[j] for row, weight in rows) for j in range(4)] for i in range(3)]


def _solved(sums: Sequence[Sequence[float]], doubled: float) -> tuple[Fit, float]:
    """With that value of ``doubled``; and by how much less than without any part the squares of the errors are."""
    (each, by_token, by_pair, whole), (_, tokens, token_pairs, token_whole), (_, _, pairs, pair_whole) = sums
    both = by_token + by_pair / doubled
    efforts = tokens + 2 * token_pairs / doubled + pairs / doubled**2
    effort_whole = token_whole + pair_whole / doubled
    determinant = each * efforts - both**2
    overhead = (whole * efforts - effort_whole * both) / determinant
    linear = (effort_whole * each - whole * both) / determinant
    if overhead < 0 or linear <= 0:
        overhead, linear = 0.0, effort_whole / efforts
    return Fit(overhead, linear, doubled), overhead * whole + linear * effort_whole


def _effort(new: int, cached: int, doubled: float) -> float:
    return new * (1 + (cached + new / 2) / doubled)

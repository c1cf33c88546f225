"""Where a request is answered soonest, with what that costs the others: one cost model (docs/placement.md).

The alternatives are to join a replica now, or to wait for one that does not take the request yet. Each has a cost in
seconds, of this request and of those that it delays:

    wait      until the replica takes it, or until it has read the long prompt that it would join
    read      what the prompt cache there does not have, at the learned rate; with the prompts that are read together,
              each as dear as the longest
    answer    its likely tokens, at the gap between tokens that a batch of this size has
    others    prompts that are read there take the longer for it, answers stand still while it is read and are slower in
              the larger batch; and where no replica is left for short requests, each that comes meanwhile waits

Caveat: what one replica has cached and another has not is no term of its own. It shows in ``read``.

Pure: no I/O, no clock.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from backends.admission.reading_turns import Batch

RECTANGLE = 32_768  # tokens (members x longest) with which a step of decoding takes twice as long
ASSUMED_ANSWER = 256  # tokens, where nothing is known of its length
STEPS = 2  # prefill steps in which a short prompt is read and begins to be answered
CLOSE = 0.05  # seconds, and
CLOSE_SHARE = 0.1  # of the least cost: a difference that the estimates do not tell apart


@dataclass(frozen=True, slots=True)
class Asked:
    """``tokens``: of the prompt; ``answer``: tokens that are likely, 0 = not known."""

    tokens: int
    answer: int = 0


@dataclass(frozen=True, slots=True)
class Candidate:
    """One replica. ``read``: seconds that it takes for the part of the prompt that it has not cached; ``long``: that
    part keeps others out. ``step``: seconds of one prefill step of a long prompt. ``wait``: seconds until it takes the
    request, None = it does now, inf = not known. ``gap``: seconds between the tokens of one answer alone, 0.0 = not
    known. ``closed``: short requests have to wait there already. ``rank``: the least is chosen of those that cost the
    same."""

    id: str
    batch: Batch
    read: float
    long: bool = False
    step: float = 0.0
    wait: float | None = None
    gap: float = 0.0
    closed: bool = False
    rank: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds."""

    wait: float
    read: float
    answer: float
    others: float

    @property
    def total(self) -> float:
        return self.wait + self.read + self.answer + self.others


@dataclass(frozen=True, slots=True)
class Choice:
    """``costs``: of each alternative, by the replica's id."""

    id: str
    costs: dict[str, Cost]


def choose(asked: Asked, candidates: Sequence[Candidate], arrivals: float = 0.0) -> Choice:
    """``arrivals``: short requests per second. At least one candidate."""
    costs = {one.id: cost(asked, one, _kept_out(one, candidates, arrivals)) for one in candidates}
    least = min(each.total for each in costs.values())
    bound = least + max(CLOSE, CLOSE_SHARE * least)
    best = min(
        (one for one in candidates if costs[one.id].total <= bound), key=lambda one: (one.wait is not None, one.rank)
    )
    return Choice(best.id, costs)


def cost(asked: Asked, one: Candidate, kept_out: float = 0.0) -> Cost:
    """``kept_out``: seconds that short requests will wait."""
    if one.wait == math.inf:
        return Cost(math.inf, 0.0, 0.0, 0.0)
    batch, waits = one.batch, one.wait is not None
    reading = 0 if waits else batch.reading + batch.longs  # they were read until then
    decoding = batch.members - reading
    answer = asked.answer or ASSUMED_ANSWER
    longest = max(batch.longest, asked.tokens)
    mine = answer * _gap(one.gap, decoding + 1, longest)
    slower = answer * (_gap(one.gap, decoding + 1, longest) - _gap(one.gap, decoding, batch.longest))
    others = one.read * (reading + decoding) + decoding * slower
    wait = one.wait or 0.0
    if batch.longs and not waits:  # each step gives one token
        wait, others = min(batch.long_left, (STEPS + answer) * one.step), others + STEPS * one.step
    return Cost(wait, one.read * (1 + reading), mine, others + kept_out)


def _gap(alone: float, members: int, longest: int) -> float:
    return alone * (1 + members * longest / RECTANGLE)


def _kept_out(one: Candidate, candidates: Sequence[Candidate], arrivals: float) -> float:
    """Seconds that those wait together who come while it is read there, if every other replica is closed to them."""
    if not one.long or one.closed or len(candidates) < 2:
        return 0.0
    if not all(other.closed for other in candidates if other is not one):
        return 0.0
    return arrivals * one.read**2 / 2

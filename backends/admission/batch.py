"""The batch of one replica: what it needs at its likely peak, and whether it fits.

The unit of admission is not the request but the batch with it: one long prompt makes every sequence beside it as dear
as itself (``memory.kv_cost``). The peak is found by going through the batch's likely future: prompts are read step by
step, at most ``readers`` of them together, and their sequences join those that are being decoded, of which each writes
one token per step until its likely end. Between two such events a batch only grows, so that it is enough to look at
the moments just before them.

Pure.
"""

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from backends.memory.kv_cost import CACHE_STEP, KvCost
from backends.mlx_server import PROMPT_CONCURRENCY

MOST_STEPS = 1 << 16  # of ``CACHE_STEP`` tokens; no model reads more


@dataclass(frozen=True, slots=True)
class Member:
    """A sequence, in tokens. ``prompt``: all of it; ``likely``: of the whole answer, as is likely now; ``read``: of the
    prompt so far, with what was cached; ``written``: of the answer so far. ``decoding``: its prompt was read."""

    prompt: int
    likely: int
    read: int = 0
    written: int = 0
    decoding: bool = False

    @property
    def now(self) -> int:
        return self.prompt + self.written if self.decoding else self.read

    @property
    def end(self) -> int:
        """Tokens of the sequence at its likely end."""
        return self.prompt + max(self.likely, self.written + 1)


@dataclass(frozen=True, slots=True)
class _Life:
    """Steps from now at which a sequence ``begins`` to be read, ``joins`` those that are being decoded, and ``ends``;
    one that is being decoded has begun before. ``read``: its tokens when it begins; ``tokens``: when it joins."""

    begins: int
    joins: int
    ends: int
    read: int
    tokens: int

    def read_at(self, moment: int, step: int) -> int:
        return min(self.tokens, self.read + max(0, moment - self.begins) * step)

    def written_at(self, moment: int) -> int:
        return self.tokens + moment - self.joins


def bound(cost: KvCost, count: int, longest: int) -> int:
    """An upper bound of the peak of a batch of ``count`` members, whose longest ends with ``longest`` tokens; in
    constant time."""
    return 2 * cost.reading(count, longest) + cost.prefill(count, min(cost.step, longest), longest)


def peak(cost: KvCost, members: Sequence[Member], *, readers: int = PROMPT_CONCURRENCY) -> int:
    """Bytes of the batch at its likely peak, from now until the last of its members has ended."""
    lives = list(_lives(cost, members, readers))
    moments = {moment for life in lives for moment in (life.joins, life.ends)}
    return max((_at(cost, lives, moment) for moment in moments), default=0)


def fits(cost: KvCost, members: Sequence[Member], room: int, *, readers: int = PROMPT_CONCURRENCY) -> bool:
    longest = max((member.end for member in members), default=0)
    return bound(cost, len(members), longest) <= room or peak(cost, members, readers=readers) <= room


def longest_prompt(cost: KvCost, room: int) -> int:
    """Tokens of a prompt that fits alone, to within ``CACHE_STEP``."""
    low, high = 0, MOST_STEPS
    while low < high:
        steps = (low + high + 1) // 2
        low, high = (steps, high) if peak(cost, [Member(steps * CACHE_STEP, 1)]) <= room else (low, steps - 1)
    return low * CACHE_STEP


def _lives(cost: KvCost, members: Iterable[Member], readers: int) -> Iterable[_Life]:
    places = [0] * readers  # the steps at which there is place for one more prompt
    for member in members:
        if member.decoding:
            yield _Life(-1, 0, member.end - member.now, member.now, member.now)
        else:
            begins = heapq.heappop(places)
            # The last token of a prompt is the first step of decoding.
            joins = begins + max(0, -(-(member.prompt - 1 - member.read) // cost.step))
            heapq.heappush(places, joins)
            yield _Life(begins, joins, joins + member.end - member.prompt, member.read, member.prompt)


def _at(cost: KvCost, lives: Sequence[_Life], moment: int) -> int:
    """Bytes at the end of that step, before the prompts that were read in it join the answers, and the answers that
    ended in it leave; where layers have windows also after that, if that is more."""
    reading = [life for life in lives if 0 <= life.begins < max(1, moment) and moment <= life.joins]
    writing = [life for life in lives if (life.joins < moment or life.begins < 0) and moment <= life.ends]
    read = cost.reading(len(reading), _width(reading, moment, cost.step))
    decoded = cost.decoding(len(writing), _longest(writing, moment))
    kept = sum(cost.kept(life.written_at(moment)) for life in writing if life.ends == moment)
    before = read + decoded + max(_of_reading(cost, reading, moment), cost.copied(decoded), kept)
    return max(before, _joined(cost, reading, writing, moment)) if cost.windows else before


def _width(reading: Iterable[_Life], moment: int, step: int) -> int:
    return max((life.read_at(moment, step) for life in reading), default=0)


def _longest(writing: Iterable[_Life], moment: int) -> int:
    return max((life.written_at(moment) for life in writing), default=0)


def _of_reading(cost: KvCost, reading: Sequence[_Life], moment: int) -> int:
    """For a moment, beside the rectangle: in the step, in aligning its prompts, in parting those that were read."""
    if not reading:
        return 0
    width = _width(reading, moment, cost.step)
    rectangle = cost.reading(len(reading), width)
    joining = sum(life.joins == moment for life in reading)
    step = max(life.read_at(moment, cost.step) - life.read_at(moment - 1, cost.step) for life in reading)
    return max(
        cost.prefill(len(reading), step, width) + cost.copied(rectangle),
        cost.aligned(rectangle) if len(reading) > 1 else 0,
        cost.reading(joining, width) if joining < len(reading) else cost.copied(rectangle),
    )


def _joined(cost: KvCost, reading: Sequence[_Life], writing: Sequence[_Life], moment: int) -> int:
    """Where layers with a window are put into one order of time."""
    joining = [life for life in reading if life.joins == moment]
    if not joining:
        return 0
    left = [life for life in reading if life.joins > moment]
    mixed = [*joining, *(life for life in writing if life.ends > moment)]
    longest = _longest(mixed, moment) + 1
    read = cost.reading(len(left), _width(left, moment, cost.step))
    return read + cost.decoding(len(mixed), longest) + cost.turned(len(mixed), longest)

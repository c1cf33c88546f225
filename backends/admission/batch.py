"""The batch of one replica: what it needs at its likely peak, and whether it fits.

The unit of admission is not the request but the batch with it: one long prompt makes every sequence beside it as dear
as itself (``memory.kv_cost``). The peak is found by going through the batch's likely future: prompts are read step by
step, at most ``readers`` of them together, and their sequences join those that are being decoded, of which each writes
one token per step until its likely end. Between two such events a batch only grows, so that it is enough to look at
the moments just before them.

Pure.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from backends.admission.course import Course, Part
from backends.memory.kv_cost import CACHE_STEP, KvCost

LONGER = 1.25  # times its present length, an answer that is longer than was likely is taken to become,
MORE = 64  # and so many tokens more
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

    @property
    def part(self) -> Part:
        """Of the course of the batch."""
        if self.decoding:
            return Part(self.now, 0, self.end - self.now, self.written + 1)
        last = max(0, self.prompt - 1)
        read = min(self.read, last)
        return Part(read, last - read, self.end - self.prompt)


def likely_beyond(written: int, likely: int) -> int:
    """Of an answer that has got so long: what is likely now."""
    return likely if written < likely else int(LONGER * written) + MORE


def bound(cost: KvCost, count: int, longest: int) -> int:
    """An upper bound of the peak of a batch of ``count`` members, whose longest ends with ``longest`` tokens; in
    constant time. Those that are taken out of a rectangle are there twice; the last part of one prompt may be padded to
    a whole step of another's."""
    step = min(cost.step, longest)
    widest = longest + step + 2 * CACHE_STEP
    windowed = min(widest, cost.window + cost.step)
    twice = 2 * (cost.rectangle(count, widest, windowed) + cost.layer(count, widest, windowed))
    return twice + cost.prefill(count, step, longest + step)


def peak(cost: KvCost, members: Sequence[Member]) -> int:
    """Bytes of the batch at its likely peak, from now until the last of its members has ended."""
    return Course(cost, (m.part for m in members if not m.decoding), (m.part for m in members if m.decoding)).peak()


def fits(cost: KvCost, members: Sequence[Member], room: int) -> bool:
    longest = max((member.end for member in members), default=0)
    return bound(cost, len(members), longest) <= room or peak(cost, members) <= room


def longest_prompt(cost: KvCost, room: int) -> int:
    """Tokens of a prompt that fits alone, to within ``CACHE_STEP``."""
    low, high = 0, MOST_STEPS
    while low < high:
        steps = (low + high + 1) // 2
        low, high = (steps, high) if peak(cost, [Member(steps * CACHE_STEP, 1)]) <= room else (low, steps - 1)
    return low * CACHE_STEP

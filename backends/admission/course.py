"""The likely course of one batch inside mlx_lm.server: its rectangles, step by step, and the most that they take.

Follows ``BatchGenerator._next`` of mlx_lm 0.32, in its order. One step: every answer gets a token, and those that end
leave; waiting prompts join those that are being read; prompts that were read but for their last token are taken out
and become answers; the next part of the other prompts is read. mlx computes as late as it can, so that what was joined,
split or left behind is held as it was until the batch is used again:

    answers     are held with those that have left, and those that have joined beside them, until the next token
    prompts     are held with those that have become answers, until the next part was read

Between two steps in which something begins, joins or ends, a batch only grows: it is enough to look at the last.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from backends.memory.kv_cost import CACHE_STEP, KvCost, grown


@dataclass(slots=True)
class Part:
    """``tokens``: of it that are in the cache; ``unread``: of its prompt, without the last one, which is the first step
    of decoding; ``unwritten``: of its answer; ``written``: in the cache since it is decoded."""

    tokens: int
    unread: int
    unwritten: int
    written: int = 0


class Held(NamedTuple):
    """Bytes in memory, and those of the largest layer."""

    size: int = 0
    layer: int = 0

    def beside(self, other: "Held") -> "Held":
        return Held(self.size + other.size, self.layer + other.layer)


NOTHING = Held()


@dataclass(slots=True)
class Rectangle:
    """In tokens. ``end``: where all rows end, padding included; ``room``: that a row has room for; ``windowed``: in a
    layer with a window; ``passed``: through that layer."""

    rows: int = 0
    end: int = 0
    room: int = 0
    windowed: int = 0
    passed: int = 0

    def held(self, cost: KvCost) -> Held:
        return Held(
            cost.rectangle(self.rows, self.room, self.windowed), cost.layer(self.rows, self.room, self.windowed)
        )

    def write(self, tokens: int, window: int) -> bool:
        """Tokens of answers, one by one. True: it has got other room."""
        before = self.room, self.windowed
        self.end += tokens
        self.passed += tokens
        self.room += grown(max(0, self.end - self.room))
        more = grown(max(0, self.passed - self.windowed))
        self.windowed = min(window, self.windowed + more)
        return before != (self.room, self.windowed)

    def read(self, tokens: int, times: int, window: int) -> None:
        """So many tokens of each prompt, so many times."""
        self.end += tokens * times
        self.passed += tokens * times
        if self.end > self.room:
            before = self.end - tokens
            self.room = (before if before % CACHE_STEP else max(before, self.room)) + grown(tokens)
        if window:
            self.windowed = min(window - 1, self.windowed + tokens * (times - 1)) + tokens

    def extend(self, other: "Rectangle") -> None:
        self.rows += other.rows
        self.end = max(self.end, other.end)
        self.room = max(self.room, other.room)
        self.windowed = max(self.windowed, other.windowed)
        self.passed = max(self.passed, other.passed)

    def of(self, sequences: Iterable[Part]) -> "Rectangle":
        """With these alone: padding that none of them needs is cut off, but not in a window."""
        tokens = [each.tokens for each in sequences]
        spare = self.end - max(tokens, default=0)
        return Rectangle(len(tokens), self.end - spare, self.room - spare, self.windowed, self.passed)


def _answers(writing: list[Part], window: int) -> Rectangle:
    """Of answers, as if each had been alone so far."""
    longest = max((each.tokens for each in writing), default=0)
    windowed = max((each.tokens - each.written + grown(each.written) for each in writing), default=0)
    return Rectangle(len(writing), longest, grown(longest), min(windowed, window), longest)


def _rewrite(before: Held, now: Held) -> int:
    """Layer by layer: the first is there in both forms, and so is the last."""
    return max(before.size + now.layer, now.size + before.layer)


class Course:
    """``waiting``: prompts that are not being read yet, or are, in their order; ``writing``: answers."""

    def __init__(self, cost: KvCost, waiting: Iterable[Part], writing: Iterable[Part]) -> None:
        self._cost = cost
        self._readers = cost.readers
        self._waiting = deque(waiting)
        self._reading: list[Part] = []
        self._writing = list(writing)
        self._prompts = Rectangle()
        self._answers = _answers(self._writing, cost.window)
        self._read = NOTHING  # what is held of the prompts
        self._written = self._answers.held(cost)  # and of the answers
        self._rewritten = False  # the answers are held as they were
        self._between = 0  # bytes of what is made on the way to the next ones, of the largest layer
        self._gone = 0  # bytes of answers that have all left, until the end of the step
        self._most = 0

    def peak(self) -> int:
        """Bytes, at most."""
        while self._waiting or self._reading or self._writing:
            self._skip()
            kept = self._write()
            self._begin()
            self._join()
            self._read_on()
            self._note(self._read.size + self._written.size + kept)
            self._gone = 0
        return self._most

    def _note(self, size: int) -> None:
        self._most = max(self._most, size + self._gone)

    def _skip(self) -> None:
        """Steps before the next that can be the most."""
        steps = self._quiet()
        if not steps:
            return
        for each in self._writing:
            each.tokens += steps
            each.unwritten -= steps
        if self._writing and self._answers.write(steps, self._cost.window):
            self._grow()
        if self._reading:
            self._prompts.read(self._cost.step, steps, self._cost.window)
            self._read = self._prompts.held(self._cost)
        for each in self._reading:
            each.tokens += steps * self._cost.step
            each.unread -= steps * self._cost.step

    def _quiet(self) -> int:
        if self._rewritten or (self._waiting and len(self._reading) < self._readers):
            return 0
        whole = min((each.unread // self._cost.step for each in self._reading), default=None)
        steps = [each.unwritten for each in self._writing] + ([] if whole is None else [whole])
        return max(0, min(steps) - 1)

    def _write(self) -> int:
        """The next token of every answer. Bytes on their way to the prompt cache."""
        if not self._writing:
            return 0
        before = self._written
        if self._answers.write(1, self._cost.window):
            self._grow()
        now = self._answers.held(self._cost)
        self._note(self._read.size + (_rewrite(before, now) + self._between if self._rewritten else now.size))
        for each in self._writing:
            each.tokens += 1
            each.unwritten -= 1
        ended = [each for each in self._writing if each.unwritten <= 0]
        self._written, self._rewritten, self._between = now, bool(ended), 0
        passed = self._answers.passed
        if ended:
            self._leave()
        return self._cost.leaving([each.tokens for each in ended], passed)

    def _grow(self) -> None:
        """Empty tokens are put behind those that are there."""
        self._rewritten = True
        room, windowed = min(CACHE_STEP, self._answers.room), min(CACHE_STEP, self._answers.windowed)
        self._between += self._cost.layer(self._answers.rows, room, windowed)

    def _leave(self) -> None:
        """Rows are taken out, and padding that is left is then cut off."""
        self._writing = [each for each in self._writing if each.unwritten > 0]
        if self._writing:
            before, self._answers = self._answers.end, self._answers.of(self._writing)
            self._between = self._answers.held(self._cost).layer if self._answers.end < before else 0
        else:
            self._gone, self._written, self._rewritten, self._answers = self._written.size, NOTHING, False, Rectangle()

    def _begin(self) -> None:
        new = [self._waiting.popleft() for _ in range(min(len(self._waiting), self._readers - len(self._reading)))]
        if not new:
            return
        cached = max(each.tokens for each in new)
        windowed = min(cached, self._cost.window - 1 + self._cost.step)  # as of those that are being read
        self._prompts.extend(Rectangle(len(new), cached, cached, windowed, cached))
        self._reading += new

    def _join(self) -> None:
        """Prompts that were read become answers, each with its first step."""
        joining = [each for each in self._reading if not each.unread]
        if not joining:
            return
        self._reading = [each for each in self._reading if each.unread]
        taken = self._prompts.of(joining)
        taken.windowed = min(taken.windowed, self._cost.window)
        taken.write(1, self._cost.window)
        held = taken.held(self._cost)
        if self._reading:
            self._read = self._prompts.held(self._cost)
            self._note(self._read.size + self._written.size + held.size + held.layer)
            self._prompts = self._prompts.of(self._reading)
        else:
            most = max(self._read.size, held.size + self._read.layer) + held.layer
            self._note(self._written.size + most)
            self._prompts, self._read = Rectangle(), NOTHING
        for each in joining:
            each.tokens += 1
        if self._writing:
            if self._rewritten:  # by those that have just left: not the last form
                self._between = max(self._between, self._answers.held(self._cost).layer)
            self._rewritten = True
            self._between += self._padded(taken)
        self._writing += joining
        self._answers.extend(taken)
        self._written = self._written.beside(held)

    def _padded(self, taken: Rectangle) -> int:
        """Of one layer: those that are not the longest are padded; full windows are brought into the order of time."""
        both = (self._answers, taken)
        end, room, windowed = (max(sizes) for sizes in zip(*((r.end, r.room, r.windowed) for r in both), strict=True))
        rows = sum(each.rows for each in both if (each.end, each.room) != (end, room))
        turned = self._answers.rows if self._answers.passed >= self._cost.window else 0
        return max(self._cost.layer(rows, room, 0), self._cost.layer(rows + turned, 0, windowed))

    def _read_on(self) -> None:
        if not self._reading:
            return
        parts = [min(self._cost.step, each.unread) for each in self._reading]
        longest, before = max(parts), self._read
        self._prompts.read(longest, 1, self._cost.window)
        now = self._read = self._prompts.held(self._cost)
        step = max(self._cost.prefill(len(parts), longest, self._prompts.end), now.layer - before.layer)
        self._note(self._written.size + _rewrite(before, now) + step)
        if min(parts) < longest:
            self._note(self._written.size + now.size + self._cost.aligned(now.size))
        for each, part in zip(self._reading, parts, strict=True):
            each.tokens += part
            each.unread -= part

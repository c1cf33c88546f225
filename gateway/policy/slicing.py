"""When a long prompt is read in slices, and where it is cut.

A slice is a plain completion of one token whose prompt is a beginning of the whole prompt, as one text. mlx_lm.server
(0.32.2) keeps what it has read in its prompt cache, where the next slice finds it; between two slices other requests
run. As seen on the real server:

    entry         its key is the tokens of the slice and the one that was generated; a prompt that goes on from it takes
                  its place, any other leaves it there, until it has pushed the conversations of others out
    bias          so the token to generate is the one that follows in the prompt
    cut           between two tokens, where the tokens of the beginning are those of the whole

The first two slices of a model show whether its prompt cache can be cut back (recurrent layers, windows: no): the first
generates another token, so that the second finds all of it only if that is taken off. Where it cannot, the second finds
one token less, in an entry that is kept beside the other, and each slice would leave two entries there.

How large a slice is follows from the time that it may take, and from how long others take between two of them: neither
waits for the other much longer than the other for it.

Pure: no I/O, no clock.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from backends.admission.reading_rate import LONG
from backends.domain.snapshot import Seat

MIN_CHARS = 4096  # of a prompt; the reading of a shorter one is not worth a look
CHARS_PER_TOKEN = 1.5  # at least, of a long prompt: for the question whether it is worth to count its tokens
SHORTEST, LONGEST = 0.75, 2.0  # seconds that a slice takes
ALONE = 1.0  # seconds that it takes while nobody waits
NOBODY = 0.02  # seconds between two slices: nobody has waited
FIRST = 1024  # tokens of the first slice, as long as nothing is known of the rate
LONG_UNKNOWN = 4096  # tokens from which on a prompt is long, as long as nothing is known of the rate
LEAST = 256  # tokens of a slice
GROWTH = 2.0  # from one slice to the next at most: one that others were read beside says little
REST = 1.5  # times a slice: so much is sent as it is
END = 512  # characters at the end that are not cut: the template's own words, and the last of the client
FORGET = 600.0  # seconds after which a model that could not be read in slices is tried again
LOST = 30.0  # likewise, if it could before: at first; each time in a row four times as long
LOSSES = 2  # times that a prompt does not find its last slice, after which it is sent as it is
MOVES = 2  # times that a prompt begins again on another replica
TRIES = 8  # cuts that are tried, where there is no place for one or an entry may be equal to the slice
FURTHER = 512  # characters from one of them to the next


class Rate(Protocol):
    """What is known of the time that an instance takes to read (``backends.admission.reading_rate``)."""

    @property
    def known(self) -> bool: ...

    def seconds(self, tokens: int, cached: int = 0) -> float: ...

    def within(self, seconds: float, cached: int = 0) -> int: ...


def worth_counting(chars: int, cached_chars: int, seconds: Callable[[int], float], *, known: bool) -> bool:
    """Whether a prompt may be long. ``seconds``: that so many tokens take, where that is ``known``."""
    most = round((chars - cached_chars) / CHARS_PER_TOKEN)
    return chars >= MIN_CHARS and (seconds(most) >= LONG if known else most >= LONG_UNKNOWN)


def is_long(tokens: int, cached: int, seconds: Callable[[int, int], float], *, known: bool) -> bool:
    return seconds(tokens, cached) >= LONG if known else tokens - cached >= LONG_UNKNOWN


class Ability(Enum):
    UNKNOWN = "unknown"
    YES = "yes"
    NO = "no"


class Abilities:
    """Which models can be read in slices, as far as their answers have shown."""

    def __init__(self) -> None:
        self._able: set[str] = set()
        self._unable: dict[str, float] = {}  # model -> until when
        self._losses: dict[str, int] = {}  # model -> prompts in a row that lost what was read
        self._lost: dict[str, float] = {}  # model -> until when it is therefore not tried

    def of(self, model: str, now: float) -> Ability:
        if now < max(self._unable.get(model, 0.0), self._lost.get(model, 0.0)):
            return Ability.NO
        return Ability.YES if model in self._able else Ability.UNKNOWN

    def note(self, model: str, *, able: bool, now: float) -> None:
        if able:
            self._able.add(model)
            self._unable.pop(model, None)
        else:
            self._able.discard(model)
            self._unable[model] = now + FORGET

    def lost(self, model: str, now: float) -> None:
        """What slices of a prompt had read was gone, of a model that can: its prompt cache is too small for what comes,
        or the request itself has another template."""
        losses = self._losses[model] = self._losses.get(model, 0) + 1
        self._lost[model] = now + min(FORGET, LOST * 4 ** min(losses - 1, 8))

    def found(self, model: str) -> None:
        """A request has found what its slices had read."""
        self._losses.pop(model, None)


@dataclass(frozen=True, slots=True)
class Slice:
    """One that was read. ``at``: characters; ``tokens``: of its prompt, of which ``cached`` were found; ``seconds``:
    that the rest took."""

    at: int
    tokens: int
    cached: int
    seconds: float


class Slicing:
    """One prompt that is read in slices. ``chars`` and ``tokens``: of all of it. ``cached``: tokens of it that the
    prompt cache should have. ``proven``: the model is known to be able to be read in slices.

    ``read``: tokens that the prompt cache has, and ``at`` their characters; ``found``: the tokens that it had before
    the first slice, None = not known yet; ``count``: slices so far; ``able``: as they have shown, None = not yet;
    ``losses``: times that what was read was gone, although the model is able."""

    def __init__(self, chars: int, tokens: int, cached: int, *, proven: bool) -> None:
        self.chars, self.tokens = chars, tokens
        self.able: bool | None = True if proven else None
        self.count = 0
        self.losses = 0
        self.seat: Seat | None = None
        self._begins = 0
        self._over = False
        self._expected = cached
        self._restart()

    def _restart(self) -> None:
        self.read = self.at = 0
        self.found: int | None = None
        self._last: Slice | None = None
        self._step = 0

    def sit(self, seat: Seat) -> None:
        """The next slice goes to ``seat``: where it is another one than before, nothing is read there. Where the last
        one has ended between two slices, they may be the cause: what is sent whole is in flight until then."""
        if seat == self.seat:
            return
        if self.seat is not None:
            self._expected = 0
            self._over = self._over or seat.backend == self.seat.backend
        self.seat = seat
        self._begins += 1
        self._restart()

    def give_up(self) -> None:
        """The rest is to be sent as it is, for a reason that says nothing of the model."""
        self._over = True

    @property
    def may_go_on(self) -> bool:
        return not self._over and self.able is not False and not self.lost and self._begins <= 1 + MOVES

    @property
    def lost(self) -> bool:
        """What slices read is pushed out of the prompt cache, again and again."""
        return self.losses >= LOSSES

    def next(self, rate: Rate, waited: float, *, beside: bool = False) -> int | None:
        """Characters near which to cut next; None = the rest is to be sent. ``waited``: seconds that others took since
        the last slice; ``beside``: another prompt is read in slices there."""
        if not self.may_go_on:
            return None
        have, seconds = max(self.read, self._expected), budget(waited, beside=beside)
        self._step = self._tokens(rate, seconds, have)
        if self._is_rest(rate, seconds, have):
            return None
        ahead = have + self._step - self.read
        near = self.at + round(ahead * (self.chars - self.at) / max(1, self.tokens - self.read))
        return near if not self.is_end(near) else None

    def _is_rest(self, rate: Rate, seconds: float, have: int) -> bool:
        """What is left takes little longer than a slice; as far as the last one tells, which was of another size."""
        left, last = self.tokens - have, self._last
        if not rate.known or (last is not None and left > GROWTH * REST * (last.tokens - last.cached)):
            return left <= REST * self._step
        return rate.seconds(self.tokens, have) * self._slowness(rate) <= REST * seconds

    def is_end(self, near: int) -> bool:
        """So near to the end of the prompt it is not cut."""
        return near > self.chars - END

    @property
    def probes(self) -> bool:
        """The next slice is to leave an entry that another prompt can only find by cutting it back."""
        return self.able is None and self.found is None

    @property
    def target(self) -> int:
        """Tokens of the prompt of the next slice, about."""
        return min(self.tokens, max(self.read, self._expected) + (self._step or FIRST))

    def _tokens(self, rate: Rate, seconds: float, have: int) -> int:
        known, last = rate.within(seconds / self._slowness(rate), have) or FIRST, self._last
        if last is None:
            return max(LEAST, known)
        new = last.tokens - last.cached
        if new < LEAST:  # it was all there: so may be the next
            return max(known, round(GROWTH * self._step))
        return max(LEAST, min(known, round(GROWTH * max(new, self._step))))

    def _slowness(self, rate: Rate) -> float:
        """Of the last slice, beside what is known."""
        last = self._last
        if last is None or last.tokens - last.cached < LEAST:
            return 1.0
        expected = rate.seconds(last.tokens, last.cached)
        return min(GROWTH, max(1 / GROWTH, last.seconds / expected)) if expected else 1.0

    def note(self, latest: Slice) -> None:
        """It was read, and all before it, if that was lost."""
        self.count += 1
        if self.found is None:
            self.found = latest.cached
        else:
            self.judge(latest.cached)
        self.read, self.at, self._last = latest.tokens, latest.at, latest
        self._expected = min(self._expected, latest.tokens)

    def judge(self, cached: int) -> bool:
        """What came after the slices has found so many tokens. More than they have read tells nothing: it was there
        before. False: what was read is not there."""
        if 2 * cached < self.read:
            self.able = self.able or False
            self.losses += 1
            return False
        if self.able is None and 0 < self.read >= cached:
            self.able = cached == self.read
        return True


def budget(waited: float, *, beside: bool = False) -> float:
    """Seconds for a slice. ``waited``: that others took since the last one. Two long prompts gain nothing by short
    turns: each costs some time to begin with."""
    if beside:
        return LONGEST
    return ALONE if waited < NOBODY else min(LONGEST, max(SHORTEST, waited))

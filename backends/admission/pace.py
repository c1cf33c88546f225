"""How long its work may keep a backend silent: (tokens, rates and pauses seen) -> seconds.

Pure: no I/O, no clock.
"""

from collections import deque

from backends.mlx_server import PREFILL_STEP

TOKENISED = 10_000.0  # prompt tokens per second that mlx_lm.server tokenises at least (an H200's host: 250,000)
READ = 250.0  # prompt tokens per second that are read at least, where the server does not report progress
DOUBLED = 32_768  # tokens read before, with which a step takes twice as long
SLOWEST = 5.0  # tokens per second of an answer, until answers have shown the rate
ENOUGH = 16  # tokens of an answer whose rate means something
PAUSES = 16  # last pauses that count
USUAL = 2.0  # times the longest but one of them, silence is usual
ANSWERS = 64  # last answers whose slowest rate counts


class Pace:
    """The rates of one replica."""

    def __init__(self) -> None:
        self._rates: deque[float] = deque(maxlen=ANSWERS)

    def note(self, tokens: int, seconds: float) -> None:
        """A complete answer of that many tokens took so long."""
        if tokens >= ENOUGH and seconds > 0:
            self._rates.append(tokens / seconds)

    def tokenising(self, tokens: int) -> float:
        return tokens / TOKENISED

    def reading(self, tokens: int) -> float:
        return tokens / READ

    def step(self, tokens: int) -> float:
        """One step in the reading of a prompt of that size: the later ones attend to all that was read before."""
        return min(tokens, PREFILL_STEP) / READ * (1 + tokens / DOUBLED)

    def writing(self, tokens: int) -> float:
        """At the slowest rate seen."""
        return tokens / min(self._rates, default=SLOWEST)


class UsualSilence:
    """The last pauses between two signs of progress. A prompt is read in steps, each of which takes a little longer
    than the one before."""

    def __init__(self) -> None:
        self._pauses: deque[float] = deque(maxlen=PAUSES)
        self._heard = 0.0
        self._quiet = 0.0

    def note(self, quiet: float, heard: float) -> None:
        """``quiet``: seconds of silence so far; ``heard``: time of the last sign of progress. Called regularly."""
        if heard > self._heard:
            self._pauses.append(self._quiet)
        self._heard, self._quiet = max(heard, self._heard), quiet

    @property
    def patience(self) -> float:
        """Seconds of silence that are usual. The longest pause may have been an exception."""
        return USUAL * sorted(self._pauses)[-2] if len(self._pauses) > 1 else 0.0

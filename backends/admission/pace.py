"""How long the work of a request may keep a backend silent: (tokens, rates seen) -> seconds.

Pure: no I/O, no clock.
"""

from collections import deque

TOKENISED = 10_000.0  # prompt tokens per second that mlx_lm.server tokenises at least (an H200's host: 250,000)
READ = 250.0  # prompt tokens per second that are read at least, where the server does not report progress
SLOWEST = 5.0  # tokens per second of an answer, until answers have shown the rate
ENOUGH = 16  # tokens of an answer whose rate means something
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

    def writing(self, tokens: int) -> float:
        """At the slowest rate seen."""
        return tokens / min(self._rates, default=SLOWEST)

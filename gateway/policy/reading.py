"""How long a model takes to read a prompt that is in no prompt cache, learned from its answers. Pure."""

from collections import deque
from statistics import median

LATEST = 16  # answers that count
ENOUGH = 512  # tokens that were read; in less, most of the time is overhead


class ReadingRate:
    """Of one model. The rate is the median: a prompt that was read beside others took longer than it would alone."""

    def __init__(self) -> None:
        self._rates: deque[float] = deque(maxlen=LATEST)  # tokens per second

    def note(self, tokens: int, seconds: float) -> None:
        """``tokens`` of a prompt were read, and the first token of the answer came after ``seconds``."""
        if tokens >= ENOUGH and seconds > 0.0:
            self._rates.append(tokens / seconds)

    def seconds(self, tokens: int) -> float:
        """0.0 as long as nothing is known."""
        return tokens / median(self._rates) if self._rates else 0.0

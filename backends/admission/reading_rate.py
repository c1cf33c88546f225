"""How long a replica takes to read a prompt, learned from those that it has read.

What is fitted (``reading_fit``) are the medians of the latest samples, one of each size: so that one prompt that took
long for another reason does not count, nor a crowd of small ones for more than a large one.

Only prompts that were read with no other being read beside them show the rate: a batch of prompts costs as many times
its longest as it has members. Where there are no others, the fastest of a crowd is the least that the rate can be.

Pure: no I/O, no clock.
"""

import operator
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from backends.admission.pace import DOUBLED
from backends.admission.reading_fit import Fit, Sample, fit

LONG = 1.5  # seconds of reading from which on a prompt is long: people beside it would notice
LATEST = 16  # samples that count, of each size
MOST = 1 << 21  # tokens of any prompt
ENOUGH = 512  # tokens that were read; less shows the overhead, not the rate
SHORT = 0  # the size of such a sample; of the others, the power of two of the tokens that each attends to


def size_of(sample: Sample) -> int:
    return (sample.cached + sample.new // 2).bit_length() if sample.new >= ENOUGH else SHORT


class ReadingRate:
    """Of one replica, over all its processes; 0.0 seconds as long as nothing is known."""

    def __init__(self) -> None:
        self._doubled: float = DOUBLED
        self._samples: dict[int, deque[Sample]] = {}  # by size
        self._crowded: deque[Sample] = deque(maxlen=LATEST)
        self._fit: Fit | None = None  # None = to be worked out

    def assume(self, doubled: float) -> None:
        """``doubled``: tokens after which a token takes twice as long, as the model's files tell. It counts as long as
        prompts of one size have been read."""
        self._doubled, self._fit = doubled, None

    def note(self, tokens: int, cached: int, seconds: float, *, crowded: bool = False) -> None:
        """A prompt of ``tokens``, of which the prompt cache had the first ``cached``, took ``seconds`` until the first
        token of its answer. ``crowded``: another prompt was read in this time."""
        sample = Sample(tokens - cached, cached, seconds)
        if sample.new <= 0 or seconds <= 0.0:
            return
        enough = sample.new >= ENOUGH
        if not crowded:
            self._samples.setdefault(size_of(sample), deque(maxlen=LATEST)).append(sample)
        elif enough:
            self._crowded.append(sample)
        if enough:  # the overhead is worked out along with the rate: no short request pays for that
            self._fit = None

    @property
    def samples(self) -> list[Sample]:
        """One of each size, of those that were read alone."""
        return [sample for sample, _ in self._usual()] if self._alone else []

    @property
    def known(self) -> bool:
        return self._alone or bool(self._crowded)

    @property
    def _alone(self) -> bool:
        """One that was read alone has shown the rate."""
        return any(self._samples)  # SHORT is 0

    def seconds(self, tokens: int, cached: int = 0) -> float:
        """For a prompt of ``tokens``, of which the first ``cached`` are in the prompt cache."""
        return self._fitted().reading(max(0, tokens - cached), cached) if self.known else 0.0

    def within(self, seconds: float, cached: int = 0) -> int:
        """Tokens that are read after the first ``cached`` in so many seconds; 0 = nothing is known."""
        return int(min(MOST, self._fitted().within(seconds, cached))) if self.known else 0

    def _fitted(self) -> Fit:
        if self._fit is None:
            self._fit = fit([*self._usual()], self._doubled)
        return self._fit

    def _usual(self) -> Iterable[tuple[Sample, int]]:
        """One sample of each size, with the number of those that it stands for."""
        for size, samples in self._samples.items():
            yield _median(samples, _seconds if size == SHORT else self._per_token), len(samples)
        if not self._alone:
            yield min(self._crowded, key=self._per_token), len(self._crowded)

    def _per_token(self, sample: Sample) -> float:
        return sample.seconds / sample.effort(self._doubled)


def _median(samples: Sequence[Sample], key: Callable[[Sample], float]) -> Sample:
    """Of two in the middle, the quicker one: what is measured too high is more frequent than too low."""
    return sorted(samples, key=key)[(len(samples) - 1) // 2]


_seconds = operator.attrgetter("seconds")

"""How fast each model reads and writes, over all runs on one kind of machine: where the first requests of a gateway are
answered best.

What is recalled counts as one sample of each size, so that two new ones overrule it. No deadline is derived from it: a
machine that is slower today must not look stalled.
"""

import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from backends.admission.inflight import InFlight
from backends.admission.reading_fit import Sample
from backends.admission.reading_rate import MOST, size_of
from backends.domain.spec import Launch
from backends.process.learned import Learned, is_seconds

NAME = "rates.json"
EVERY = 60.0  # seconds between two looks at what was learned
MAX_SAMPLES = 64  # one of each power of two is a third of that


class Rates(NamedTuple):
    """``gap``: seconds between two tokens of an answer, 0.0 = not known; ``read``: one prompt of each size."""

    gap: float
    read: tuple[Sample, ...]


NOTHING = Rates(0.0, ())


def learned_rates(folder: Path | None = None, *, total: int = 0) -> Learned[Rates]:
    """``folder``: None = in memory only. ``total``: bytes of memory of the machine, which tells it from others that
    have the same home folder."""
    machine = f"{platform.machine()}, {os.cpu_count()} processors, {total} bytes"
    return Learned(folder and folder / NAME, "rates of reading and writing", _rates, where=machine)


class RatesMemory:
    """Of one replica: recalls what its command line has shown, and notes what changes."""

    def __init__(self, flight: InFlight, launch: Launch, known: Learned[Rates], now: float) -> None:
        self._flight = flight
        self._launch = launch
        self._known = known
        self._looked_at = now
        if (rates := known.get(launch)) is not None:
            flight.rhythm.usual_gap = rates.gap
            for new, cached, seconds in rates.read:
                flight.reading.note(new + cached, cached, seconds)
        self._last = self._seen()

    def tick(self, now: float) -> None:
        if now >= self._looked_at + EVERY:
            self._looked_at = now
            self.note()

    def note(self) -> None:
        """What is new, beside what other replicas of the model have noted."""
        seen, last = self._seen(), self._last
        if seen == last:
            return
        self._last = seen
        known = self._known.get(self._launch) or NOTHING
        read = {size_of(sample): sample for sample in known.read}
        read |= {size_of(sample): sample for sample in seen.read if sample not in last.read}
        gap = seen.gap if seen.gap != last.gap else known.gap
        self._known.note(self._launch, Rates(gap, tuple(read.values())))

    def _seen(self) -> Rates:
        return Rates(self._flight.rhythm.usual_gap, tuple(self._flight.reading.samples))


def _rates(value: Any) -> Rates | None:
    """None: it tells nothing, or cannot be true."""
    if not isinstance(value, Sequence) or len(value) != 2 or not isinstance(value[1], Sequence):
        return None
    gap, read = value
    if not (is_seconds(gap) and len(read) <= MAX_SAMPLES and all(map(_is_sample, read))):
        return None
    samples = tuple(Sample(new, cached, float(f"{seconds:.4g}")) for new, cached, seconds in read)
    return Rates(float(f"{gap:.3g}"), samples) if gap or samples else None


def _is_sample(value: Any) -> bool:
    if not isinstance(value, Sequence) or len(value) != 3:
        return False
    new, cached, seconds = value
    return _is_count(new) and new > 0 and _is_count(cached) and is_seconds(seconds) and seconds > 0


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MOST

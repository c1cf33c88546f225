"""Whether a silent process is at work: (its activity, the signs of life) -> Effort.

A process that computes, or would if it had a core, may be at something that sends nothing: mlx_lm.server withholds a
tool call until it is whole, and searches its prompt cache, tokenises and compiles kernels without a word. How much of a
core an engine needs for its tokens differs widely (where a GPU does the work, little), so that is learned first.

    STOPPED     it was stopped by a signal, and does nothing. (cpulimit stops and continues a process all the time.)
    WORKING     it does a quarter of what it does while it writes answers, or more
    IDLE        it does less
    UNKNOWN     that cannot be told

Pure: no I/O, no clock.
"""

from collections import deque
from dataclasses import dataclass
from enum import Enum, auto

from backends.domain.activity import Activity

LEAST_USUAL = 0.02  # of a core: an idle server takes 0.0025, where somebody waits too (measured, mlx-lm 0.32.2)
IDLE_SHARE = 0.25  # of the usual; and of a core, at most
WINDOW = 4.0  # seconds whose share means something: an idle process too is busy for moments
SILENT = 0.5  # seconds
STALE = 4.0  # seconds between two samples after which neither says anything of the other
STILL = 0.005  # seconds of activity between two samples: none
SHARES = 32  # last ones, of which a quarter may be lower than the usual one


class Effort(Enum):
    STOPPED = auto()
    WORKING = auto()
    IDLE = auto()
    UNKNOWN = auto()


@dataclass(frozen=True, slots=True)
class _Sample:
    at: float
    seconds: float
    queued: float
    heard: float
    writing: bool
    stopped: bool


class EffortMeter:
    """``usual``: share of a core while answers were written, or less: a tick that was not all writing must not hide
    the process at work; 0.0 = not known."""

    def __init__(self) -> None:
        self.usual = 0.0
        self._shares: deque[float] = deque(maxlen=SHARES)
        self.effort = Effort.UNKNOWN
        self._samples: deque[_Sample] = deque()  # of the last ``WINDOW`` seconds, and one before
        self._starved = 0.0  # seconds since ``_heard``
        self._heard = 0.0
        self._since = 0.0  # when ``effort`` began; IDLE at the beginning of the first window

    @property
    def is_trusted(self) -> bool:
        """It can tell an idle process from one that writes."""
        return self.usual >= LEAST_USUAL

    def needs_sample(self, silent: float) -> bool:
        """``silent``: seconds since the last sign of life. A sample costs 0.6 ms on a machine with 100 processes."""
        return len(self._shares) < SHARES or silent >= SILENT

    def lost(self) -> None:
        """The process could not be read."""
        self._samples.clear()
        self._now_is(Effort.UNKNOWN, 0.0)

    def note(self, found: Activity, now: float, *, heard: float, writing: bool) -> None:
        """A sample. ``heard``: time of the last sign of life; ``writing``: all answers in flight have begun."""
        samples = self._samples
        sample = _Sample(now, found.computed + found.queued, found.queued, heard, writing, found.stopped)
        if samples and now - samples[-1].at > STALE:
            self.lost()
        if samples:
            self._learn(samples[-1], sample)
        samples.append(sample)
        while len(samples) > 2 and now - samples[1].at >= WINDOW:
            samples.popleft()
        last = samples[-2] if len(samples) > 1 else sample
        if last is not sample and _lay_still(last, sample):
            self._now_is(Effort.STOPPED, last.at)
        elif now - samples[0].at < WINDOW or any(one.stopped for one in samples):
            self._now_is(Effort.UNKNOWN, now)
        else:
            self._now_is(self._of_share(_share(samples[0], sample)), samples[0].at)
        self._note_starved(last, sample)

    def starved_since(self, heard: float) -> float:
        """Seconds since the last sign of life, at ``heard``, in which it was at work and others had the cores."""
        return self._starved if heard == self._heard else 0.0

    def still_for(self, now: float) -> float:
        """Seconds for which it has done nothing; 0 while that is not known."""
        is_fresh = bool(self._samples) and now - self._samples[-1].at <= STALE
        return now - self._since if is_fresh and self.effort in (Effort.STOPPED, Effort.IDLE) else 0.0

    def _now_is(self, effort: Effort, since: float) -> None:
        if effort is not self.effort:
            self.effort, self._since = effort, since

    def _learn(self, last: _Sample, latest: _Sample) -> None:
        if last.writing and latest.writing and latest.heard > last.heard and latest.at > last.at:
            self._shares.append(_share(last, latest))
            self.usual = sorted(self._shares)[len(self._shares) // 4]

    def _note_starved(self, last: _Sample, latest: _Sample) -> None:
        if latest.heard > self._heard:
            self._heard, self._starved = latest.heard, 0.0
        elif self.effort is Effort.WORKING and latest.seconds > last.seconds:
            part = (latest.queued - last.queued) / (latest.seconds - last.seconds)
            self._starved += part * (latest.at - last.at)

    def _of_share(self, share: float) -> Effort:
        if self.is_trusted:
            return Effort.IDLE if share < IDLE_SHARE * min(1.0, self.usual) else Effort.WORKING
        return Effort.UNKNOWN if share < IDLE_SHARE else Effort.WORKING


def _lay_still(one: _Sample, other: _Sample) -> bool:
    return one.stopped and other.stopped and other.seconds - one.seconds < STILL


def _share(one: _Sample, other: _Sample) -> float:
    return (other.seconds - one.seconds) / (other.at - one.at)

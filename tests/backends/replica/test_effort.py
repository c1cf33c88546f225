"""Whether a silent process is at work, sample by sample."""

from collections.abc import Iterable

import pytest

from backends.domain.activity import Activity
from backends.replica.effort import LEAST_USUAL, SHARES, STALE, WINDOW, Effort, EffortMeter

START = 1000.0


class Process:
    """Is looked at every second. ``share``: of a core that it uses; ``queued``: the part of it in which it waits."""

    def __init__(self, usual: float = 0.0) -> None:
        self.meter = EffortMeter()
        self.now = START
        self.heard = START
        self._computed = self._queued = 0.0
        for _ in range(SHARES + 1 if usual else 0):
            self.passes(1, usual, heard=True)

    def passes(self, seconds: int, share: float, *, heard: bool = False, queued: float = 0.0) -> None:
        for _ in range(seconds):
            self._pass(share, queued, heard=heard, stopped=False)

    def stops(self, shares: Iterable[float]) -> None:
        """Seconds at whose end it is stopped."""
        for share in shares:
            self._pass(share, 0.0, heard=False, stopped=True)

    def _pass(self, share: float, queued: float, *, heard: bool, stopped: bool) -> None:
        self.now += 1.0
        self._computed += (1 - queued) * share
        self._queued += queued * share
        self.heard = self.now if heard else self.heard
        self.meter.note(Activity(self._computed, self._queued, stopped), self.now, heard=self.heard, writing=True)

    @property
    def effort(self) -> Effort:
        return self.meter.effort

    @property
    def still(self) -> float:
        return self.meter.still_for(self.now)


@pytest.mark.parametrize(
    ("usual", "share", "effort"),
    [
        (1.0, 0.24, Effort.IDLE),
        (1.0, 0.26, Effort.WORKING),
        (8.0, 0.26, Effort.WORKING),
        (0.1, 0.024, Effort.IDLE),
        (0.1, 0.026, Effort.WORKING),
        (LEAST_USUAL / 2, 0.0, Effort.UNKNOWN),
        (LEAST_USUAL / 2, 0.26, Effort.WORKING),
        (0.0, 0.0, Effort.UNKNOWN),
        (0.0, 0.26, Effort.WORKING),
    ],
)
def test_its_share_is_compared_with_the_usual_one(usual: float, share: float, effort: Effort) -> None:
    process = Process(usual)
    process.passes(10, share)
    assert process.effort is effort


def test_it_is_still_from_the_beginning_of_the_first_window_without_work() -> None:
    process = Process(1.0)
    process.passes(20, 1.0)
    assert process.still == 0.0
    process.passes(10, 0.0)
    assert WINDOW <= process.still <= 11.0
    process.passes(4, 0.5)
    assert process.still == 0.0


def test_ticks_that_were_not_all_writing_change_little() -> None:
    """A search of the prompt cache computes all the time; the writing of a GPU's tokens little."""
    process = Process(0.08)
    process.passes(SHARES // 2, 1.0, heard=True)
    assert process.meter.usual == pytest.approx(0.08)
    process.passes(10, 0.03)
    assert process.effort is Effort.WORKING


def test_one_that_is_stopped_is_still_at_once() -> None:
    process = Process(1.0)
    process.stops([0.4])
    assert process.still == 0.0, "it ran until a moment ago"
    process.stops([0.0, 0.0, 0.0])
    assert process.effort is Effort.STOPPED
    assert process.still == 3.0
    process.passes(1, 1.0)
    assert process.still == 0.0


def test_one_that_is_stopped_and_continued_all_the_time_is_not_stopped() -> None:
    """As by cpulimit: it is stopped whenever it is looked at, and computes in between."""
    process = Process(1.0)
    for _ in range(30):
        process.stops([0.05])
        assert process.effort is Effort.UNKNOWN
        assert process.still == 0.0


@pytest.mark.parametrize("queued", [0.0, 0.9])
def test_seconds_in_which_others_have_the_cores(queued: float) -> None:
    process = Process(1.0)
    process.passes(30, 1.0, queued=queued)
    assert process.meter.starved_since(process.heard) == pytest.approx(30 * queued, abs=2.0)
    assert process.meter.starved_since(process.heard + 1.0) == 0.0, "of the next silence"
    process.passes(1, 1.0, heard=True)
    assert process.meter.starved_since(process.heard) == 0.0


def test_a_process_that_could_not_be_read_for_a_while() -> None:
    process = Process(1.0)
    process.passes(10, 0.0)
    assert process.still > 0.0
    assert process.meter.still_for(process.now + STALE + 0.1) == 0.0
    process.meter.lost()
    assert (process.effort, process.still) == (Effort.UNKNOWN, 0.0)
    process.passes(10, 0.0)
    assert process.effort is Effort.IDLE


def test_it_is_measured_until_its_rhythm_is_known_and_in_silence() -> None:
    assert Process().meter.needs_sample(0.0)
    assert not Process(1.0).meter.needs_sample(0.0)
    assert Process(1.0).meter.needs_sample(1.0)

"""What is learned of the rhythm of a model, value by value; ``replica/test_deadlines`` has the whole."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.admission.rhythm import (
    BUCKET_RATIO,
    ENOUGH_GAPS,
    FLOOR,
    GAPS,
    HEALTHY,
    LONG_PAUSE,
    MANY_GAPS,
    PAUSE_COUNTS_FOR,
    SEARCH,
    SEARCHES,
    SHORTEST_GAP,
    STEPS,
    STEPS_KEPT,
    Gaps,
    LearnedRhythm,
    PrefillSteps,
    Workload,
)

WRITING = Workload(members=1)


@given(gap=st.floats(SHORTEST_GAP, 100.0), count=st.integers(ENOUGH_GAPS, 10**6))
def test_the_p99_of_equal_gaps(gap: float, count: int) -> None:
    gaps = Gaps()
    gaps.note(gap, count)
    p99 = gaps.p99
    assert p99 is not None
    assert gap * 0.999 <= p99 <= gap * BUCKET_RATIO * 1.001


def test_one_gap_of_a_hundred_is_no_p99_and_two_are() -> None:
    gaps = Gaps()
    gaps.note(0.03, 99)
    gaps.note(5.0, 1)
    assert gaps.p99 is not None
    assert gaps.p99 < 0.04
    gaps.note(5.0, 1)
    assert gaps.p99 > 4.9


def test_few_gaps_tell_nothing() -> None:
    gaps = Gaps()
    gaps.note(0.03, ENOUGH_GAPS - 1)
    assert gaps.p99 is None


def test_old_gaps_fade() -> None:
    gaps = Gaps()
    for _ in range(100):
        gaps.note(0.03, MANY_GAPS)
    slow = MANY_GAPS // 50
    gaps.note(2.0, slow)
    assert gaps.total <= MANY_GAPS + slow
    assert gaps.p99 is not None
    assert gaps.p99 >= 2.0


def test_a_step_is_known_by_the_next_larger_prompt_or_in_proportion_to_the_largest() -> None:
    steps = PrefillSteps()
    assert steps.longest(1000) is None
    steps.note(2000, 1.0, 1)
    steps.note(60_000, 8.0, 2)
    assert steps.longest(1000) == 1.0
    assert steps.longest(2047) == 1.0
    assert steps.longest(2048) == 4.0, "half of 8: there were two"
    assert steps.longest(120_000) == 8.0
    assert steps.longest(250_000) == 16.0


def test_the_last_steps_count() -> None:
    steps = PrefillSteps()
    steps.note(2000, 50.0, 1)
    for _ in range(STEPS_KEPT):
        steps.note(2000, 1.0, 1)
    assert steps.longest(2000) == 1.0


def learned(gap: float = 0.03, step: float = 1.0) -> LearnedRhythm:
    rhythm = LearnedRhythm()
    rhythm.note_gap(gap, 1000, 1)
    rhythm.note_step(4000, step, 1)
    return rhythm


def test_nothing_learned() -> None:
    assert LearnedRhythm().deadline(WRITING, 0.0) is None
    assert LearnedRhythm().deadline(Workload(1, unread=(100,)), 0.0) is None
    assert LearnedRhythm().writing(1000, 1) == 0.0


def test_answers_that_are_written() -> None:
    assert learned().deadline(WRITING, 0.0) == FLOOR
    assert learned(gap=1.0).deadline(WRITING, 0.0) == pytest.approx(GAPS * 1.0, rel=BUCKET_RATIO - 1)
    crowd = learned(gap=1.0).deadline(Workload(members=8), 0.0)
    assert crowd == pytest.approx(8 * GAPS * 1.0, rel=BUCKET_RATIO - 1), "eight were not seen: at most eight times"


def test_prompts_that_are_read() -> None:
    one = learned(step=5.0).deadline(Workload(1, unread=(4000,)), 0.0)
    assert one == pytest.approx(STEPS * 5.0, abs=1.0)
    four = learned(step=5.0).deadline(Workload(4, unread=(4000, 50, 50, 50)), 0.0)
    assert four == pytest.approx(4 * STEPS * 5.0, abs=4.0)


def test_new_prompts_beside_a_long_conversation() -> None:
    """Eight waited for 20 s beside 49,000 tokens."""
    work = Workload(9, unread=(50,) * 8, new=(50,) * 8, longest=49_000)
    deadline = learned().deadline(work, 0.0)
    assert deadline is not None
    assert deadline >= FLOOR + 8 * SEARCHES * SEARCH * 49_000**2 > 3 * 20.0


@pytest.mark.parametrize("reading", [False, True])
def test_never_less_than_what_has_ended_well(reading: bool) -> None:
    rhythm = learned()
    work = Workload(1, unread=(4000,) if reading else ())
    rhythm.note_pause(9.0, 100.0, reading=reading)
    rhythm.note_pause(LONG_PAUSE / 2, 100.0, reading=reading)
    assert rhythm.deadline(work, 100.0) == HEALTHY * 9.0
    assert rhythm.deadline(work, 101.0 + PAUSE_COUNTS_FOR) == FLOOR

"""How long a replica takes to read a prompt, as its earlier ones have taught."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.admission.pace import DOUBLED
from backends.admission.reading_rate import ENOUGH, LATEST, ReadingRate

Sample = tuple[int, float]
SAMPLES = st.lists(st.tuples(st.integers(ENOUGH, 10**6), st.floats(1e-3, 1e3)), min_size=1, max_size=3 * LATEST)


def learned(tokens: int = 1000, seconds: float = 2.0) -> ReadingRate:
    rate = ReadingRate()
    rate.note(tokens, 0, seconds)
    return rate


def test_nothing_is_known_before_a_long_enough_prompt_was_read() -> None:
    rate = ReadingRate()
    rate.note(ENOUGH - 1, 0, 1.0)
    rate.note(ENOUGH, 0, 0.0)
    rate.note(50_000, 50_000 - ENOUGH + 1, 1.0)
    assert (rate.known, rate.seconds(50_000), rate.within(1.0)) == (False, 0.0, 0)
    rate.note(1000, 0, 2.0)
    assert rate.known
    assert rate.seconds(1000) == pytest.approx(2.0)


def test_what_is_cached_is_not_read_and_each_token_attends_to_all_before_it() -> None:
    rate = learned()
    whole, half = rate.seconds(2 * DOUBLED), rate.seconds(DOUBLED)
    assert whole == pytest.approx(half + rate.seconds(2 * DOUBLED, DOUBLED))
    assert whole > 2.5 * half
    assert rate.seconds(1000, 1000) == rate.seconds(1000, 2000) == 0.0


def test_a_size_that_was_seen_says_more_than_one_that_was_not() -> None:
    rate = learned(1000, 1.0)
    rate.note(50_000, 0, 10.0)
    assert rate.seconds(49_000) < 10.0
    assert rate.seconds(900) > 0.8
    assert rate.seconds(200_000) > 40.0


@given(SAMPLES)
def test_the_estimate_lies_within_what_was_seen(answers: list[Sample]) -> None:
    rate = ReadingRate()
    for tokens, seconds in answers:
        rate.note(tokens, 0, seconds)
    rates = [tokens * (1 + tokens / 2 / DOUBLED) / seconds for tokens, seconds in answers]
    effort = 1000 * (1 + 500 / DOUBLED)
    assert effort / max(rates) * 0.999 <= rate.seconds(1000) <= effort / min(rates) * 1.001


@given(st.floats(0.01, 100.0), st.integers(0, 500_000))
def test_tokens_and_seconds_are_two_views_of_one_rate(seconds: float, cached: int) -> None:
    rate = learned(4000, 1.0)
    tokens = rate.within(seconds, cached)
    assert rate.seconds(cached + tokens, cached) <= seconds < rate.seconds(cached + tokens + 1, cached)


def test_what_is_read_in_a_time_is_by_the_rate_of_its_size() -> None:
    """Not of the size of what is cached, which may be nothing."""
    rate = learned(1000, 0.1)
    rate.note(20_000, 0, 20.0)
    assert 5000 < rate.within(10.0) < 16_000, "at the rate of the small one it were 60 000"


def test_a_crowd_does_not_make_the_replica_look_slow() -> None:
    rate = ReadingRate()
    for seconds in (9.0, 8.0, 10.0):
        rate.note(1000, 0, seconds, crowded=True)
    assert rate.seconds(1000) == pytest.approx(8.0), "the fastest of them, as long as nothing better is known"
    rate.note(1000, 0, 1.0)
    rate.note(1000, 0, 9.0, crowded=True)
    assert rate.seconds(1000) == pytest.approx(1.0)

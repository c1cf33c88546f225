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
    assert rate.seconds(1000) == pytest.approx(2.0, rel=0.05)


def test_what_is_cached_is_not_read_and_each_token_attends_to_all_before_it() -> None:
    rate = learned()
    whole, half = rate.seconds(2 * DOUBLED), rate.seconds(DOUBLED)
    assert whole == pytest.approx(half + rate.seconds(2 * DOUBLED, DOUBLED))
    assert whole > 2.5 * half
    assert rate.seconds(1000, 1000) == rate.seconds(1000, 2000) == 0.0


def attention(tokens: int, cached: int = 0) -> float:
    """As a model of 2 layers took on a processor: 20 tokens were read as quickly as one after 10 000."""
    return 8e-5 * (tokens - cached) + 1e-7 * (tokens**2 - cached**2)


def test_prompts_of_some_hundred_tokens_tell_of_those_of_many_thousand() -> None:
    rate = ReadingRate()
    rate.assume(400)
    for tokens in (530, 700, 950):
        rate.note(tokens, 0, attention(tokens))
    for tokens, cached in ((2000, 0), (6554, 0), (20_000, 0), (20_000, 18_000)):
        assert rate.seconds(tokens, cached) == pytest.approx(attention(tokens, cached), rel=0.2)


def test_what_was_seen_overrules_what_the_files_of_the_model_tell() -> None:
    rate = ReadingRate()
    rate.assume(100_000)
    for tokens in (600, 1100, 2500, 5000):
        for _ in range(3):
            rate.note(tokens, 0, attention(tokens))
    assert rate.seconds(6554) == pytest.approx(attention(6554), rel=0.2)
    assert rate.seconds(20_000) == pytest.approx(attention(20_000), rel=0.2)


def test_a_long_prompt_is_believed_at_once_and_a_crowd_of_small_ones_does_not_outvote_it() -> None:
    rate = ReadingRate()
    for _ in range(LATEST):
        rate.note(700, 0, 0.5)
    rate.note(50_000, 0, 90.0)
    assert rate.seconds(50_000) == pytest.approx(90.0, rel=0.25)
    assert rate.seconds(700) == pytest.approx(0.5, rel=0.25)


def test_one_that_took_ten_times_as_long_does_not_count() -> None:
    usual, hit = ReadingRate(), ReadingRate()
    for tokens in (700, 750, 5000, 5200, 5400):
        for rate in (usual, hit):
            rate.note(tokens, 0, attention(tokens))
    for tokens in (720, 5100):
        hit.note(tokens, 0, 10 * attention(tokens))
    for tokens in (800, 5000, 40_000):
        assert hit.seconds(tokens) == pytest.approx(usual.seconds(tokens), rel=0.1)


def test_a_machine_that_has_become_slower_is_noticed() -> None:
    rate = ReadingRate()
    for factor in (*[1] * 3 * LATEST, *[4] * (LATEST // 2 + 1)):
        rate.note(4000, 0, factor * 2.0)
    assert rate.seconds(4000) == pytest.approx(8.0, rel=0.05)


def test_the_overhead_of_short_requests_is_not_taken_for_reading() -> None:
    """Beside an answer that is being written, a request waits for its turn."""
    rate = ReadingRate()
    for _ in range(4):
        rate.note(30, 0, 0.4)
    for tokens in (600, 800, 900):
        rate.note(tokens, 0, 0.4 + tokens / 5000)
    assert 1.0 < rate.seconds(8000) < 3.0, "it were 8 s at the rate of the small ones"


@given(SAMPLES, st.integers(0, 10**6), st.integers(0, 10**6))
def test_no_sample_makes_more_tokens_quicker(samples: list[Sample], tokens: int, more: int) -> None:
    rate = ReadingRate()
    for size, seconds in samples:
        rate.note(size, 0, seconds)
    assert 0.0 <= rate.seconds(tokens) <= rate.seconds(tokens + more)
    assert rate.seconds(tokens + more, tokens) <= rate.seconds(tokens + more)


@given(st.floats(0.01, 100.0), st.integers(0, 500_000))
def test_tokens_and_seconds_are_two_views_of_one_rate(seconds: float, cached: int) -> None:
    rate = learned(4000, 1.0)
    tokens = rate.within(seconds, cached)
    least, most = (rate.seconds(cached + count, cached) for count in (tokens, tokens + 1))
    assert least * (1 - 1e-9) <= seconds <= most * (1 + 1e-9)


def test_what_is_read_in_a_time_is_by_the_rate_of_its_size() -> None:
    """Not of the size of what is cached, which may be nothing."""
    rate = learned(1000, 0.1)
    rate.note(20_000, 0, 20.0)
    assert 5000 < rate.within(10.0) < 20_000, "at the rate of the small one it were 60 000"


def test_a_crowd_does_not_make_the_replica_look_slow() -> None:
    rate = ReadingRate()
    for seconds in (9.0, 8.0, 10.0):
        rate.note(1000, 0, seconds, crowded=True)
    assert rate.seconds(1000) == pytest.approx(8.0, rel=0.01), "the fastest of them, as long as nothing better is known"
    rate.note(1000, 0, 1.0)
    rate.note(1000, 0, 9.0, crowded=True)
    assert rate.seconds(1000) == pytest.approx(1.0, rel=0.01)

"""The time to read a prompt, fitted to prompts that were read."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.admission.reading_fit import Fit, Sample, fit

DOUBLED = 20_000.0
SAMPLES = st.lists(
    st.tuples(
        st.builds(Sample, st.integers(1, 10**6), st.integers(0, 10**6), st.floats(1e-4, 1e4)), st.integers(1, 16)
    ),
    min_size=1,
    max_size=14,
)


def seen(truth: Fit, *sizes: tuple[int, int], weight: int = 16) -> list[tuple[Sample, int]]:
    """``sizes``: (new, cached)."""
    return [(Sample(new, cached, truth.overhead + truth.reading(new, cached)), weight) for new, cached in sizes]


@given(st.floats(1e-5, 1e-2), st.floats(0.0, 3.0), st.floats(1000.0, 100_000.0))
def test_what_many_sizes_show_is_found_whatever_was_assumed(linear: float, overhead: float, doubled: float) -> None:
    truth = Fit(overhead * 100 * linear, linear, doubled)
    found = fit(seen(truth, (20, 0), (600, 0), (4000, 0), (16_000, 0), (40_000, 0)), DOUBLED)
    for new, cached in ((1000, 0), (10_000, 0), (40_000, 0), (2000, 38_000)):
        assert found.reading(new, cached) == pytest.approx(truth.reading(new, cached), rel=0.3)


@given(st.floats(1e-5, 1e-2), st.floats(500.0, 100_000.0), st.integers(512, 100_000), st.integers(0, 100_000))
def test_one_size_shows_the_rate_and_the_growth_is_as_assumed(
    linear: float, doubled: float, new: int, cached: int
) -> None:
    truth = Fit(0.0, linear, doubled)
    found = fit(seen(truth, (new, cached)), doubled)
    assert found.reading(50_000, 0) == pytest.approx(truth.reading(50_000, 0))
    assert found.overhead == pytest.approx(0.0, abs=1e-6)


def test_slices_that_take_equal_times_are_not_taken_for_overhead() -> None:
    truth = Fit(0.0, 2e-4, 10_000)
    slices, have = [], 0
    for number in range(12):
        new = int(truth.within(1.0, have))
        seconds = truth.reading(new, have) * (1.15 if number % 2 else 0.9)
        slices.append((Sample(new, have, seconds), 4))
        have += new
    assert fit(slices, DOUBLED).reading(have, 0) == pytest.approx(truth.reading(have, 0), rel=0.3)


def test_short_prompts_that_take_long_do_not_make_the_reading_slow() -> None:
    truth = Fit(0.3, 1e-4, 20_000)
    found = fit(seen(truth, (20, 0), (600, 0), (900, 0)), DOUBLED)
    assert found.reading(40_000, 0) == pytest.approx(truth.reading(40_000, 0), rel=0.3)


@given(SAMPLES, st.floats(100.0, 1e6))
def test_more_takes_longer(samples: list[tuple[Sample, int]], doubled: float) -> None:
    found = fit(samples, doubled)
    assert found.overhead >= 0
    assert 0 < found.reading(1000, 0) < found.reading(1001, 0)
    assert found.reading(1000, 5000) < found.reading(1000, 6000)
    assert found.reading(9000, 0) == pytest.approx(found.reading(4000, 0) + found.reading(5000, 4000))


@given(SAMPLES, st.floats(0.01, 100.0))
def test_where_all_took_twice_as_long_all_will(samples: list[tuple[Sample, int]], factor: float) -> None:
    slower = [(sample._replace(seconds=sample.seconds * factor), weight) for sample, weight in samples]
    one, other = fit(samples, DOUBLED), fit(slower, DOUBLED)
    assert other.reading(10_000, 0) == pytest.approx(factor * one.reading(10_000, 0), rel=0.01)


@given(SAMPLES, st.floats(0.01, 100.0), st.integers(0, 500_000))
def test_tokens_and_seconds_are_two_views_of_one_rate(
    samples: list[tuple[Sample, int]], seconds: float, cached: int
) -> None:
    found = fit(samples, DOUBLED)
    new = found.within(seconds, cached)
    assert found.linear * (new + new * (cached + new / 2) / found.doubled) == pytest.approx(seconds, rel=1e-6)

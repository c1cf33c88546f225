"""How long a request may wait, and how long a model takes to read its prompt."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.policy.patience import CLIENT_MARGIN, patience, read_timeout
from gateway.policy.reading import ENOUGH, LATEST, ReadingRate


def test_the_least_of_three_counts() -> None:
    assert patience(60.0, 0.0, deadline=None, client_deadline=None, now=100.0) == 60.0
    assert patience(60.0, 12.5, deadline=None, client_deadline=None, now=100.0) == 47.5
    assert patience(60.0, 0.0, deadline=130.0, client_deadline=None, now=100.0) == 30.0
    assert patience(60.0, 0.0, deadline=130.0, client_deadline=110.0, now=100.0) == 10.0 - CLIENT_MARGIN
    assert patience(60.0, 70.0, deadline=None, client_deadline=None, now=100.0) == -10.0


@pytest.mark.parametrize(
    ("header", "seconds"),
    [(b"600", 600.0), (b"2.5", 2.5), (b"", None), (b"0", None), (b"-1", None), (b"nan", None), (b"inf", None),
     (b"1e99", None), (b"ten", None), (b"\xff", None)],
)  # fmt: skip
def test_what_the_client_says_of_its_own_timeout(header: bytes, seconds: float | None) -> None:
    assert read_timeout(header) == seconds


def test_nothing_is_known_of_a_model_that_has_read_no_long_prompt() -> None:
    rate = ReadingRate()
    assert rate.seconds(50_000) == 0.0
    rate.note(ENOUGH - 1, 1.0)
    rate.note(ENOUGH, 0.0)
    assert rate.seconds(50_000) == 0.0
    rate.note(1000, 2.0)
    assert rate.seconds(50_000) == 100.0


@given(st.lists(st.tuples(st.integers(ENOUGH, 10**6), st.floats(1e-3, 1e3)), min_size=1, max_size=3 * LATEST))
def test_one_that_was_read_beside_others_does_not_decide(answers: list[tuple[int, float]]) -> None:
    rate = ReadingRate()
    for tokens, seconds in answers:
        rate.note(tokens, seconds)
    rates = [tokens / seconds for tokens, seconds in answers[-LATEST:]]
    assert 1000 / max(rates) * 0.999 <= rate.seconds(1000) <= 1000 / min(rates) * 1.001

"""How long a request may wait."""

import pytest

from gateway.policy.patience import CLIENT_MARGIN, patience, read_timeout


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

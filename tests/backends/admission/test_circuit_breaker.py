"""Taking out a backend that lives and fails, and letting it in again slowly."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.admission.circuit_breaker import FIRST, LONGEST, WINDOW, CircuitBreaker, against
from backends.admission.slow_start import RAMP, SlowStart, is_due
from backends.domain.failure import Aftermath, Blame, CallFailure, Cause, Reason, Sent
from tests.failures import call_failure, changed

CUT = call_failure(Cause.NONE, Aftermath.ALIVE, "it ended its answer early", truncated=True)


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (CUT, True),
        (changed(CUT, cause=Cause.STALLED, truncated=False), True),
        (changed(CUT, cause=Cause.UNREACHABLE, sent=Sent.NOTHING), True),
        (changed(CUT, code="overloaded", sent=Sent.NOTHING), False),
        (changed(CUT, reason=Reason.BUSY, sent=Sent.NOTHING), False),
        (changed(CUT, reason=Reason.BUSY), True),
        (changed(CUT, no_retry=True), False),
        (changed(CUT, blame=Blame.REQUEST), False),
        (changed(CUT, blame=Blame.MACHINE), False),
        (changed(CUT, blame=Blame.GATEWAY), False),
        (changed(CUT, aftermath=Aftermath.EXITED), False),
    ],
)
def test_what_speaks_against_a_backend(failure: CallFailure, expected: bool) -> None:
    assert against(failure) is expected


def told(breaker: CircuitBreaker, outcomes: str, now: float = 0.0, every: float = 1.0) -> float:
    """``+`` and ``-``, one every second; when the last was told."""
    for outcome in outcomes:
        breaker.record(now, ok=outcome == "+")
        now += every
    return now - every


@pytest.mark.parametrize(
    ("outcomes", "opens"),
    [
        ("--", False),
        ("---", True),
        ("+--+--", True),
        ("+-+-", False),
        ("+-+-+-", True),
        ("--+-++", False),
        ("+++++--", False),
    ],
)
def test_when_it_opens(outcomes: str, opens: bool) -> None:
    breaker = CircuitBreaker()
    now = told(breaker, outcomes)
    assert breaker.closed(now) is not opens
    assert breaker.opened == opens
    assert bool(breaker.reason) is opens


def test_what_was_a_minute_ago_is_forgotten() -> None:
    breaker = CircuitBreaker()
    told(breaker, "+-+-+")
    assert not breaker.record(WINDOW + 10, ok=False)


def test_it_takes_a_token_and_the_time() -> None:
    breaker = CircuitBreaker()
    now = told(breaker, "---")
    assert breaker.left(now) == FIRST
    assert not breaker.closed(now + LONGEST), "nothing has shown that it generates"
    breaker.probe_succeeded()
    assert not breaker.closed(now + FIRST - 0.1)
    assert breaker.closed(now + FIRST)


def test_each_time_it_lasts_longer_until_it_was_well_for_a_while() -> None:
    breaker, now, lasted = CircuitBreaker(), 0.0, []
    for _ in range(7):
        now = told(breaker, "---", now)
        lasted.append(breaker.left(now))
        breaker.probe_succeeded()
        now += breaker.left(now)
    assert lasted == [5, 10, 20, 40, 80, 120, 120]
    now = told(breaker, "---", now + 1000)
    assert breaker.left(now) == FIRST


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 30)), max_size=60))
def test_it_never_opens_without_three_failures(history: list[tuple[bool, float]]) -> None:
    breaker, now, failures = CircuitBreaker(), 0.0, 0
    for ok, wait in history:
        now += wait
        failures += not ok
        if breaker.record(now, ok=ok):
            assert not ok
            assert failures >= 3
            assert not breaker.closed(now)
            failures = 0
            breaker.probe_succeeded()
            now += breaker.left(now)


# -- slow start -------------------------------------------------------------------------------------------------------


def test_who_never_failed_has_its_whole_share() -> None:
    assert SlowStart().allowance(8, 0.0) == 8
    assert SlowStart().next_step(8, 0.0) is None


def test_the_only_replica_has_one_where_load_may_be_the_cause() -> None:
    assert not is_due(Cause.KILLED, unanswered=0, accompanied=False)
    assert not is_due(Cause.KILLED, unanswered=1, accompanied=False)
    assert is_due(Cause.KILLED, unanswered=2, accompanied=False)
    assert is_due(Cause.KILLED, unanswered=0, accompanied=True)
    assert is_due(Cause.OOM, unanswered=0, accompanied=False)


def test_one_and_one_more_for_each_answer() -> None:
    slow = SlowStart()
    slow.begin(100.0)
    assert slow.allowance(8, 99.0) == slow.allowance(8, 100.0) == 1
    slow.answered = 3
    assert slow.allowance(8, 100.0) == 4
    slow.answered = 30
    assert slow.allowance(8, 100.0) == 8
    assert slow.next_step(8, 100.0) is None


@given(limit=st.integers(1, 500), answered=st.integers(0, 9))
def test_time_alone_brings_it_back_step_by_step(limit: int, answered: int) -> None:
    slow, now, steps = SlowStart(), 50.0, 0
    slow.begin(now)
    slow.answered = answered
    before = slow.allowance(limit, now)
    assert 1 <= before <= limit
    while (wait := slow.next_step(limit, now)) is not None:
        assert 0 < wait <= RAMP
        now += wait + 1e-6
        allowed = slow.allowance(limit, now)
        assert before <= allowed <= limit
        before = allowed
        steps += 1
        assert steps <= limit
    assert now <= 50.0 + RAMP + 1
    assert slow.allowance(limit, math.inf) == limit

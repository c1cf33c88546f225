"""Back-off, jitter, forgiveness, and when to give up."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.domain.failure import Aftermath, Blame, Cause, Failure, Reason
from backends.domain.spec import RestartPolicy
from backends.replica.restart_policy import NEEDS_OPERATOR, GiveUp, History, Retry, decide, record, stays

POLICY = RestartPolicy(min_backoff=1.0, max_backoff=60.0, max_failures=5, window=300.0)
PATIENT = RestartPolicy(min_backoff=1.0, max_backoff=60.0, max_failures=10_000, window=1e9)


def failure(cause: Cause = Cause.OOM) -> Failure:
    return Failure(cause, Aftermath.EXITED, "it died")


def delay(history: History, policy: RestartPolicy = PATIENT, chance: float = 0.5) -> float:
    decision = decide(history, policy, failure(), proven=True, chance=chance)
    assert isinstance(decision, Retry)
    return decision.delay


def test_the_back_off_doubles_up_to_its_bound() -> None:
    history, delays = History(), []
    for n in range(9):
        history = record(history, PATIENT, now=float(n), served=0.0)
        delays.append(delay(history))
    assert delays == [1, 2, 4, 8, 16, 32, 60, 60, 60]


def test_a_very_long_streak_overflows_nothing() -> None:
    assert delay(History((1.0,), streak=100_000)) == 60.0


@given(streak=st.integers(1, 200), chance=st.floats(0, 1, exclude_max=True))
def test_jitter_is_a_quarter_either_way_within_the_bound(streak: int, chance: float) -> None:
    middle = min(PATIENT.max_backoff, 2.0 ** (streak - 1))
    most = min(PATIENT.max_backoff, 1.25 * middle)
    assert 0.75 * middle <= delay(History((1.0,), streak), chance=chance) <= most


def test_jitter_spreads() -> None:
    history = History((1.0,), streak=4)
    assert delay(history, chance=0.0) == 6.0
    assert delay(history, chance=0.999999) == pytest.approx(10.0)


@pytest.mark.parametrize(("served", "streak"), [(0.0, 5), (59.9, 5), (60.0, 1), (9999.0, 1)])
def test_good_service_is_forgiveness(served: float, streak: int) -> None:
    assert record(History((10.0,), streak=4), POLICY, now=20.0, served=served).streak == streak


def test_failures_leave_the_window_and_the_streak_stays() -> None:
    history = History((0.0, 1.0, 100.0), streak=3)
    after = record(history, POLICY, now=300.0, served=0.0)
    assert after == History((1.0, 100.0, 300.0), streak=4)
    assert record(history, POLICY, now=301.0, served=0.0).failures == (100.0, 301.0)


def test_it_gives_up_at_the_last_failure_allowed() -> None:
    history = History()
    for n in range(POLICY.max_failures - 1):
        history = record(history, POLICY, now=float(n), served=0.0)
        assert isinstance(decide(history, POLICY, failure(), proven=True, chance=0.5), Retry)
    history = record(history, POLICY, now=9.0, served=0.0)
    assert decide(history, POLICY, failure(), proven=True, chance=0.5) == GiveUp("5 failures within 300 s")


def test_the_same_failures_further_apart_never_end_it() -> None:
    history, now = History(), 0.0
    for _ in range(200):
        now += POLICY.window / (POLICY.max_failures - 1) + 0.001
        history = record(history, POLICY, now=now, served=0.0)
        assert isinstance(decide(history, POLICY, failure(), proven=True, chance=0.5), Retry)
        assert len(history.failures) < POLICY.max_failures


@given(st.lists(st.tuples(st.floats(0, 200), st.floats(0, 200)), max_size=60))
def test_giving_up_means_that_many_failures_in_the_window(gaps: list[tuple[float, float]]) -> None:
    history, now, times = History(), 0.0, []
    for gap, served in gaps:
        now += gap
        times.append(now)
        history = record(history, POLICY, now=now, served=served)
        within = sum(now - at < POLICY.window for at in times)
        decision = decide(history, POLICY, failure(), proven=True, chance=0.5)
        assert isinstance(decision, GiveUp) == (within >= POLICY.max_failures)


@pytest.mark.parametrize("cause", Cause)
def test_a_person_is_needed_only_where_it_never_worked(cause: Cause) -> None:
    first = record(History(), POLICY, now=0.0, served=0.0)
    unproven = decide(first, POLICY, failure(cause), proven=False, chance=0.5)
    assert isinstance(unproven, GiveUp) == (cause in NEEDS_OPERATOR)
    assert decide(first, POLICY, failure(cause), proven=True, chance=0.5) == Retry(1.0)


def test_what_may_pass_unseen_is_tried_again() -> None:
    seen = {cause for cause in Cause if stays(failure(cause))}
    assert seen == {Cause.LOAD_FAILURE, Cause.MODEL_NOT_FOUND, Cause.DEPENDENCY}
    assert not stays(replace(failure(Cause.DEPENDENCY), blame=Blame.MACHINE))


def test_what_may_mend_itself_needs_no_person() -> None:
    assert NEEDS_OPERATOR.isdisjoint({Cause.DOWNLOAD, Cause.OOM, Cause.PORT_IN_USE, Cause.START_TIMEOUT, Cause.KILLED})


def test_one_failure_allowed_is_none_retried() -> None:
    policy = RestartPolicy(max_failures=1)
    history = record(History(), policy, now=0.0, served=0.0)
    assert isinstance(decide(history, policy, failure(), proven=True, chance=0.5), GiveUp)


def test_what_passes_only_delays() -> None:
    passing = Failure(Cause.DEPENDENCY, Aftermath.EXITED, "", blame=Blame.MACHINE, reason=Reason.EXHAUSTED)
    history, delays = History(), []
    for n in range(3 * POLICY.max_failures):
        history = record(history, POLICY, passing, now=float(n), served=0.0)
        decision = decide(history, POLICY, passing, proven=False, chance=0.5)
        assert isinstance(decision, Retry)
        delays.append(decision.delay)
    assert delays == sorted(delays)
    assert delays[-1] == POLICY.max_backoff
    assert history.failures == (), "they do not count against the model later"

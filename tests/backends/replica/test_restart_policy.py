"""Back-off, jitter, forgiveness, and when to give up."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.domain.failure import Aftermath, Blame, Cause, Failure, Reason
from backends.domain.spec import RestartPolicy
from backends.replica.restart_policy import GiveUp, History, Retry, decide, hopeless, record

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
        history = record(history, PATIENT, failure(), now=float(n), served=0.0)
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
    assert record(History((10.0,), streak=4), POLICY, failure(), now=20.0, served=served).streak == streak


def test_failures_leave_the_window_and_the_streak_stays() -> None:
    history = History((0.0, 1.0, 100.0), streak=3)
    after = record(history, POLICY, failure(), now=300.0, served=0.0)
    assert after == History((1.0, 100.0, 300.0), streak=4)
    assert record(history, POLICY, failure(), now=301.0, served=0.0).failures == (100.0, 301.0)


# -- crash looping -----------------------------------------------------------------------------------------------------


def test_one_that_fails_too_often_goes_on_at_the_longest_back_off() -> None:
    history = History()
    for n in range(POLICY.max_failures - 1):
        history = record(history, POLICY, failure(), now=float(n), served=0.0)
        assert not history.looping
    history = record(history, POLICY, failure(), now=9.0, served=0.0)
    assert history.looping
    assert decide(history, POLICY, failure(), proven=True, chance=0.5) == Retry(60.0)
    assert decide(history, POLICY, failure(), proven=False, chance=0.0) == Retry(45.0)


def test_it_is_crash_looping_until_it_has_served_well() -> None:
    history = History((1.0, 2.0, 3.0, 4.0, 5.0), streak=5, looping=True)
    assert record(history, POLICY, failure(), now=5000.0, served=59.0).looping, "the failures are just further apart"
    after = record(history, POLICY, failure(), now=5000.0, served=60.0)
    assert after == History((5000.0,), streak=1)
    assert decide(after, POLICY, failure(), proven=True, chance=0.5) == Retry(1.0)


def test_the_same_failures_further_apart_are_no_loop() -> None:
    history, now = History(), 0.0
    for _ in range(200):
        now += POLICY.window / (POLICY.max_failures - 1) + 0.001
        history = record(history, POLICY, failure(), now=now, served=0.0)
        assert not history.looping
        assert len(history.failures) < POLICY.max_failures


@given(st.lists(st.tuples(st.floats(0, 200), st.floats(0, 200), st.sampled_from(Cause)), max_size=60))
def test_what_has_been_ready_is_never_given_up(gaps: list[tuple[float, float, Cause]]) -> None:
    history, now, times = History(), 0.0, []
    for gap, served, cause in gaps:
        now += gap
        times.append(now)
        history = record(history, POLICY, failure(cause), now=now, served=served)
        within = sum(now - at < POLICY.window for at in times)
        decision = decide(history, POLICY, failure(cause), proven=True, chance=0.5)
        assert isinstance(decision, Retry)
        if within >= POLICY.max_failures:
            assert history.looping
            assert decision.delay == POLICY.max_backoff


def test_one_failure_allowed_is_none_retried_soon() -> None:
    policy = RestartPolicy(max_failures=1)
    history = record(History(), policy, failure(), now=0.0, served=0.0)
    assert decide(history, policy, failure(), proven=True, chance=0.5) == Retry(policy.max_backoff)


# -- given up ----------------------------------------------------------------------------------------------------------

HOPELESS = {Cause.LOAD_FAILURE, Cause.MODEL_NOT_FOUND, Cause.DEPENDENCY, Cause.DISTRIBUTED}


@pytest.mark.parametrize("cause", Cause)
def test_given_up_is_what_never_was_ready_and_fails_hopelessly_in_the_same_way(cause: Cause) -> None:
    history, now = History(), 0.0
    for _ in range(POLICY.max_failures - 1):
        now += 1000.0  # however long a start takes to fail
        history = record(history, POLICY, failure(cause), now=now, served=0.0)
        assert isinstance(decide(history, POLICY, failure(cause), proven=False, chance=0.5), Retry)
    history = record(history, POLICY, failure(cause), now=now + 1000.0, served=0.0)
    last = decide(history, POLICY, failure(cause), proven=False, chance=0.5)
    assert isinstance(last, GiveUp) == (cause in HOPELESS)
    if isinstance(last, GiveUp):
        assert last.reason == "it has never been ready, and has failed 5 times in a row in the same way"
        assert last.again == (POLICY.max_backoff if cause is Cause.DISTRIBUTED else None)
    assert isinstance(decide(history, POLICY, failure(cause), proven=True, chance=0.5), Retry)


@pytest.mark.parametrize("other", [Cause.KILLED, Cause.DEPENDENCY])
def test_another_cause_begins_the_count_anew(other: Cause) -> None:
    history = History()
    for n, cause in enumerate([Cause.LOAD_FAILURE] * 4 + [other] + [Cause.LOAD_FAILURE] * 4):
        history = record(history, POLICY, failure(cause), now=1000.0 * n, served=0.0)
        assert isinstance(decide(history, POLICY, failure(cause), proven=False, chance=0.5), Retry)
    assert (history.cause, history.alike) == (Cause.LOAD_FAILURE, 4)


def test_what_the_machine_is_to_blame_for_is_not_hopeless() -> None:
    assert {cause for cause in Cause if hopeless(failure(cause))} == HOPELESS
    assert not hopeless(replace(failure(Cause.DEPENDENCY), blame=Blame.MACHINE))


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
    assert (history.failures, history.looping) == ((), False), "they do not count against the model later"
    broken = History(cause=Cause.DEPENDENCY, alike=4)
    assert record(broken, POLICY, passing, now=0.0, served=0.0).alike == 4, "nor for it"

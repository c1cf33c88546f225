"""Back-off, jitter, forgiveness, and when to give up."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.domain.failure import Aftermath, Blame, Cause, Failure, Reason
from backends.domain.spec import RestartPolicy
from backends.replica.restart_policy import GiveUp, History, Retry, decide, hopeless, record, was_good

POLICY = RestartPolicy(min_backoff=1.0, max_backoff=60.0, max_failures=5, window=300.0)
PATIENT = RestartPolicy(min_backoff=1.0, max_backoff=60.0, max_failures=10_000, window=1e9)


def failure(cause: Cause = Cause.OOM) -> Failure:
    return Failure(cause, Aftermath.EXITED, "it died")


def delay(history: History, policy: RestartPolicy = PATIENT, chance: float = 0.5) -> float:
    decision = decide(history, policy, failure(), proven=True, chance=chance)
    assert isinstance(decision, Retry)
    return decision.delay


def unanswered(history: History, policy: RestartPolicy = POLICY, *, now: float, cause: Cause = Cause.OOM) -> History:
    return record(history, policy, failure(cause), now=now, good=False)


def test_the_back_off_doubles_up_to_its_bound() -> None:
    history, delays = History(), []
    for n in range(9):
        history = unanswered(history, PATIENT, now=float(n))
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


# -- good lives --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answered", "ready_for", "good"),
    [(False, 0.0, False), (False, 59.9, False), (False, 60.0, True), (True, 0.1, True), (True, 9999.0, True)],
)
def test_good_is_who_has_answered_or_lasted(answered: bool, ready_for: float, good: bool) -> None:
    assert was_good(POLICY, answered=answered, ready_for=ready_for) == good


@given(
    lives=st.lists(st.tuples(st.floats(0, 400), st.booleans(), st.sampled_from(Cause), st.booleans()), max_size=40),
    cause=st.sampled_from(Cause),
    chance=st.floats(0, 1, exclude_max=True),
)
def test_a_good_life_is_followed_after_the_shortest_back_off_whatever_was_before(
    lives: list[tuple[float, bool, Cause, bool]], cause: Cause, chance: float
) -> None:
    history, now = History(), 0.0
    for gap, good, earlier, shared in lives:
        now += gap
        history = record(history, POLICY, replace(failure(earlier), shared=shared), now=now, good=good)
    history = record(history, POLICY, failure(cause), now=now, good=True)
    assert decide(history, POLICY, failure(cause), proven=True, chance=chance) == Retry(POLICY.min_backoff)
    assert not history.looping
    assert history == History(failed_at=now)


def test_twenty_deaths_of_one_that_answers_in_between_are_no_loop() -> None:
    history = History()
    for n in range(20):
        history = record(history, POLICY, failure(Cause.KILLED), now=15.0 * n, good=True)
        assert not history.looping
        assert decide(history, POLICY, failure(Cause.KILLED), proven=True, chance=0.9) == Retry(POLICY.min_backoff)


def test_failures_leave_the_window_and_the_streak_stays() -> None:
    history = History((0.0, 1.0, 100.0), streak=3)
    after = unanswered(history, now=300.0)
    assert after == History((1.0, 100.0, 300.0), streak=4, failed_at=300.0)
    assert unanswered(history, now=301.0).failures == (100.0, 301.0)
    assert after.failed_lately(POLICY, 599.9)
    assert not after.failed_lately(POLICY, 600.0)
    assert not History().failed_lately(POLICY, 0.0)


@given(lives=st.lists(st.tuples(st.floats(0, 400), st.sampled_from(Cause)), max_size=20), count=st.integers(1, 30))
def test_who_ran_out_of_memory_that_others_hold_starts_soon_and_loses_nothing(
    lives: list[tuple[float, Cause]], count: int
) -> None:
    history, now = History(), 0.0
    for gap, cause in lives:
        now += gap
        history = unanswered(history, now=now, cause=cause)
    crowded = replace(failure(), blame=Blame.MACHINE, reason=Reason.CROWDED_OUT)
    after = history
    for n in range(count):
        after = record(after, POLICY, crowded, now=now + n, good=False)
    assert after == history
    assert decide(after, POLICY, crowded, proven=False, chance=0.9) == Retry(POLICY.min_backoff)
    assert record(history, POLICY, crowded, now=now, good=True) == History(failed_at=now), "it had served"


# -- crash looping -----------------------------------------------------------------------------------------------------


def test_one_that_never_answers_goes_on_at_the_longest_back_off() -> None:
    history = History()
    for n in range(POLICY.max_failures - 1):
        history = unanswered(history, now=float(n))
        assert not history.looping
    history = unanswered(history, now=9.0)
    assert (history.looping, history.streak) == (True, POLICY.max_failures)
    assert decide(history, POLICY, failure(), proven=True, chance=0.5) == Retry(60.0)
    assert decide(history, POLICY, failure(), proven=False, chance=0.0) == Retry(45.0)


def test_it_is_crash_looping_until_a_good_life() -> None:
    history = History((1.0, 2.0, 3.0, 4.0, 5.0), streak=5, looping=True)
    assert unanswered(history, now=5000.0).looping, "the failures are just further apart"
    assert history.forgiven == History()
    after = record(history, POLICY, failure(), now=5000.0, good=True)
    assert after == History(failed_at=5000.0)
    assert decide(after, POLICY, failure(), proven=True, chance=0.5) == Retry(1.0)


def test_the_same_failures_further_apart_are_no_loop() -> None:
    history, now = History(), 0.0
    for _ in range(200):
        now += POLICY.window / (POLICY.max_failures - 1) + 0.001
        history = unanswered(history, now=now)
        assert not history.looping
        assert len(history.failures) < POLICY.max_failures


@given(st.lists(st.tuples(st.floats(0, 200), st.booleans(), st.sampled_from(Cause)), max_size=60))
def test_what_has_been_ready_is_never_given_up(lives: list[tuple[float, bool, Cause]]) -> None:
    history, now, times = History(), 0.0, list[float]()
    for gap, good, cause in lives:
        now += gap
        times = [] if good else [*times, now]
        history = record(history, POLICY, failure(cause), now=now, good=good)
        within = sum(now - at < POLICY.window for at in times)
        decision = decide(history, POLICY, failure(cause), proven=True, chance=0.5)
        assert isinstance(decision, Retry)
        if within >= POLICY.max_failures:
            assert history.looping
            assert decision.delay == POLICY.max_backoff


def test_one_failure_allowed_is_none_retried_soon() -> None:
    policy = RestartPolicy(max_failures=1)
    history = unanswered(History(), policy, now=0.0)
    assert decide(history, policy, failure(), proven=True, chance=0.5) == Retry(policy.max_backoff)


# -- given up ----------------------------------------------------------------------------------------------------------

HOPELESS = {Cause.LOAD_FAILURE, Cause.MODEL_NOT_FOUND, Cause.DEPENDENCY, Cause.DISTRIBUTED}


@pytest.mark.parametrize("cause", Cause)
def test_given_up_is_what_never_was_ready_and_fails_hopelessly_in_the_same_way(cause: Cause) -> None:
    history, now = History(), 0.0
    for _ in range(POLICY.max_failures - 1):
        now += 1000.0  # however long a start takes to fail
        history = record(history, POLICY, failure(cause), now=now, good=False)
        assert isinstance(decide(history, POLICY, failure(cause), proven=False, chance=0.5), Retry)
    history = record(history, POLICY, failure(cause), now=now + 1000.0, good=False)
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
        history = record(history, POLICY, failure(cause), now=1000.0 * n, good=False)
        assert isinstance(decide(history, POLICY, failure(cause), proven=False, chance=0.5), Retry)
    assert (history.cause, history.alike) == (Cause.LOAD_FAILURE, 4)


def test_what_the_machine_is_to_blame_for_is_not_hopeless() -> None:
    assert {cause for cause in Cause if hopeless(failure(cause))} == HOPELESS
    assert not hopeless(replace(failure(Cause.DEPENDENCY), blame=Blame.MACHINE))


def test_what_passes_only_delays() -> None:
    passing = Failure(Cause.DEPENDENCY, Aftermath.EXITED, "", blame=Blame.MACHINE, reason=Reason.EXHAUSTED)
    history, delays = History(), []
    for n in range(3 * POLICY.max_failures):
        history = record(history, POLICY, passing, now=float(n), good=False)
        decision = decide(history, POLICY, passing, proven=False, chance=0.5)
        assert isinstance(decision, Retry)
        delays.append(decision.delay)
    assert delays == sorted(delays)
    assert delays[-1] == POLICY.max_backoff
    assert (history.failures, history.looping) == ((), False), "they do not count against the model later"
    broken = History(cause=Cause.DEPENDENCY, alike=4)
    assert record(broken, POLICY, passing, now=0.0, good=False).alike == 4, "nor for it"

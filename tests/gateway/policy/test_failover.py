"""The retry policy: a test for each rule, and what holds for every situation there can be."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import pytest

from backends.admission.slot_request import Isolation
from backends.diagnosis.suspects import MEMORY
from backends.domain.failure import Aftermath, Blame, CallFailure, Cause, Reason, Sent
from gateway.policy.failover import (
    CROWD_PAUSE,
    MAX_ATTEMPTS,
    MAX_TRIES,
    VICTIM_PAUSE,
    Resume,
    Situation,
    Surface,
    TryNext,
    decide,
    is_crowd,
)
from gateway.stream.relay import Seen
from gateway.stream.resume import CATCH_UP_LIMIT
from tests.failures import call_failure, changed

BEFORE = (Seen.WAITING, Seen.OPEN)
AFTER = (Seen.SPEAKING, Seen.DONE)
LEFT = (None, -1.0, 0.0, VICTIM_PAUSE, 9.0)  # seconds


def failed(
    cause: Cause = Cause.NATIVE_CRASH,
    *,
    blame: Blame = Blame.BACKEND,
    sent: Sent = Sent.MAYBE,
    suspect: bool = False,
    aftermath: Aftermath = Aftermath.EXITED,
    truncated: bool = False,
    inflight: int = 1,
) -> CallFailure:
    """``inflight``: how many were, this one included."""
    alone = suspect and inflight == 1
    about = {"blame": blame, "sent": sent, "suspect": suspect, "truncated": truncated}
    return call_failure(cause, aftermath, "it died", alone=alone, inflight=inflight, **about)


def what(
    failure: CallFailure,
    seen: Seen = Seen.WAITING,
    *,
    generations: int = 1,
    tries: int = 1,
    left: float | None = None,
    apart: bool = False,
) -> TryNext | Resume | Surface:
    isolation = Isolation.APART if apart else Isolation.SHARED
    now = Situation(failure, seen, generations, tries, left, suspected=failure.suspect, isolation=isolation)
    return decide(now)


def situations() -> Iterator[Situation]:
    flags = (False, True)
    for cause, blame, sent, suspect, truncated, inflight in product(Cause, Blame, Sent, flags, flags, (1, 7)):
        if suspect and (sent is Sent.NOTHING or blame is not Blame.BACKEND or truncated):
            continue  # see ``blame.suspects``
        failure = failed(cause, blame=blame, sent=sent, suspect=suspect, truncated=truncated, inflight=inflight)
        for seen, generations, tries, left in product(Seen, (0, 1, 2), (1, 2, MAX_TRIES), LEFT):
            if sent is Sent.MAYBE and generations == 0:
                continue  # this attempt is one
            for suspected, replay, isolation in product({False, suspect}, (None, 1.0, CATCH_UP_LIMIT), Isolation):
                tried = max(tries, generations)
                yield Situation(failure, seen, generations, tried, left, suspected, replay, isolation)


# -- one test for each rule ------------------------------------------------------------------------------------------


def test_a_failure_of_the_request_alone_is_told_as_it_is() -> None:
    assert what(failed(Cause.BAD_REQUEST, blame=Blame.REQUEST)) == Surface()


def test_a_prompt_that_a_replica_has_cached_is_tried_on_the_others() -> None:
    cached = changed(failed(Cause.NONE, blame=Blame.REQUEST, aftermath=Aftermath.ALIVE), reason=Reason.PROMPT_CACHED)
    assert what(cached) == TryNext()
    assert what(cached, tries=MAX_TRIES) == Surface()


@pytest.mark.parametrize("cause", sorted(MEMORY))
@pytest.mark.parametrize("seen", AFTER)
def test_a_suspect_of_running_out_of_memory_is_told_so(cause: Cause, seen: Seen) -> None:
    assert what(failed(cause, suspect=True), seen) == Surface(suspect=True)


@pytest.mark.parametrize("cause", sorted(MEMORY))
@pytest.mark.parametrize("seen", BEFORE)
def test_it_is_replayed_only_where_other_memory_is_used(cause: Cause, seen: Seen) -> None:
    assert what(failed(cause, suspect=True), seen) == TryNext(isolation=Isolation.ALONE, elsewhere=True)


@pytest.mark.parametrize("cause", sorted(MEMORY))
@pytest.mark.parametrize("seen", BEFORE)
def test_a_suspect_of_a_crowd_is_tried_again_apart_from_all_others(cause: Cause, seen: Seen) -> None:
    crowd = failed(cause, suspect=True, inflight=6)
    assert what(crowd, seen) == TryNext(CROWD_PAUSE, isolation=Isolation.APART)
    beside = changed(failed(cause, suspect=True), alone=False, beside=2)
    assert what(beside, seen) == TryNext(CROWD_PAUSE, isolation=Isolation.APART), "others had part of the memory"
    assert what(crowd, seen, left=CROWD_PAUSE) == Surface(), "it has not failed alone: it may be sent again"


@pytest.mark.parametrize("cause", sorted(MEMORY))
def test_it_is_told_once_it_has_failed_so(cause: Cause) -> None:
    assert what(failed(cause, suspect=True), generations=2, tries=2, apart=True) == Surface(suspect=True)
    still = failed(cause, suspect=True, inflight=2)
    assert what(still, generations=2, tries=2, apart=True) == Surface(), "it was not alone after all"


@pytest.mark.parametrize("suspect", [False, True])
def test_the_second_crowd_of_a_bystander_is_followed_by_an_attempt_apart(suspect: bool) -> None:
    second = failed(Cause.OOM, suspect=suspect, inflight=5)
    assert what(second, generations=2, tries=2) == TryNext(CROWD_PAUSE, isolation=Isolation.APART)
    assert what(second, generations=3, tries=3, apart=True) == Surface()
    assert what(failed(Cause.OOM, sent=Sent.NOTHING, inflight=5), generations=2, tries=3) == TryNext()


def test_an_answer_in_its_middle_goes_on_apart_where_the_crowd_decoded() -> None:
    crowd = failed(Cause.OOM, suspect=True, inflight=6)
    assert decide(Situation(crowd, Seen.SPEAKING, 1, 1, replay=5.0)) == Resume(CROWD_PAUSE, isolation=Isolation.APART)
    assert decide(Situation(crowd, Seen.SPEAKING, 1, 1)) == Surface()
    assert decide(Situation(failed(Cause.OOM, inflight=6), Seen.SPEAKING, 1, 1, replay=5.0)) == Resume()


@pytest.mark.parametrize("cause", sorted(MEMORY))
def test_bystanders_of_that_fail_over(cause: Cause) -> None:
    assert what(failed(cause)) == TryNext()
    assert what(failed(cause, sent=Sent.NOTHING)) == TryNext()


def test_other_suspects_are_replayed_alone() -> None:
    assert what(failed(suspect=True)) == TryNext(isolation=Isolation.ALONE)


def test_what_may_still_work_on_it_counts_against_the_budget() -> None:
    alive = failed(Cause.NONE, aftermath=Aftermath.ALIVE, truncated=True)
    assert what(alive) == TryNext(counts=True)
    assert what(failed(Cause.UNREACHABLE, aftermath=Aftermath.ALIVE, sent=Sent.NOTHING), generations=0) == TryNext()


@pytest.mark.parametrize("seen", AFTER)
def test_nothing_is_tried_once_the_client_has_content(seen: Seen) -> None:
    assert what(failed(), seen) == Surface()


@pytest.mark.parametrize("seen", BEFORE)
def test_until_then_another_replica_is_tried(seen: Seen) -> None:
    assert what(failed(), seen) == TryNext()


@pytest.mark.parametrize(("left", "expected"), [(None, TryNext()), (0.1, TryNext()), (0.0, Surface()), (-1, Surface())])
def test_the_deadline_ends_it(left: float | None, expected: TryNext | Surface) -> None:
    assert what(failed(), left=left) == expected


def test_an_attempt_that_cannot_have_reached_its_backend_does_not_count() -> None:
    refused = failed(Cause.UNREACHABLE, sent=Sent.NOTHING)
    for tries in range(1, MAX_TRIES):
        assert what(refused, generations=0, tries=tries) == TryNext()
    assert what(refused, generations=0, tries=MAX_TRIES) == Surface()


def test_a_second_generation_is_the_last() -> None:
    assert what(failed(), generations=1) == TryNext()
    assert what(failed(), generations=2, tries=2) == Surface()
    assert what(failed(suspect=True), generations=2, tries=2) == Surface(suspect=True)


def test_a_suspect_of_the_second_only_is_none() -> None:
    assert decide(Situation(failed(suspect=True), Seen.WAITING, 2, 2)) == Surface()


def test_what_a_gateway_upstream_says_is_believed() -> None:
    assert what(changed(failed(Cause.OOM), no_retry=True)) == Surface(suspect=True)


def test_victims_of_another_process_let_the_gpu_come_to_rest() -> None:
    victim = failed(Cause.GPU_VICTIM, blame=Blame.MACHINE)
    assert what(victim) == TryNext(pause=VICTIM_PAUSE)
    assert what(victim, left=VICTIM_PAUSE + 0.1) == TryNext(pause=VICTIM_PAUSE)
    assert what(victim, left=VICTIM_PAUSE) == Surface(), "the pause would outlast the request"


def test_an_answer_in_its_middle_goes_on_elsewhere_where_it_can() -> None:
    def middle(
        failure: CallFailure, seen: Seen = Seen.SPEAKING, left: float | None = None, replay: float | None = 5.0
    ) -> TryNext | Resume | Surface:
        return decide(Situation(failure, seen, 2, 2, left, replay=replay))

    assert middle(failed(Cause.KILLED)) == Resume()
    assert middle(failed(Cause.GPU_VICTIM)) == Resume(pause=VICTIM_PAUSE)
    assert middle(failed(Cause.NONE, aftermath=Aftermath.ALIVE, truncated=True)) == Resume(counts=True)
    assert middle(failed(Cause.KILLED), left=5.1) == Resume()
    assert middle(failed(Cause.KILLED), left=5.0) == Surface(), "it would take too long"
    assert middle(failed(Cause.GPU_VICTIM), left=5.1) == Surface(), "with the pause"
    assert middle(failed(Cause.KILLED), replay=CATCH_UP_LIMIT - 0.1) == Resume()
    assert middle(failed(Cause.KILLED), replay=CATCH_UP_LIMIT) == Surface()
    assert middle(failed(Cause.KILLED), replay=None) == Surface()
    assert middle(failed(Cause.KILLED), Seen.DONE) == Surface()
    assert middle(failed(Cause.NATIVE_CRASH, suspect=True)) == Resume(isolation=Isolation.ALONE)
    assert middle(failed(Cause.BAD_REQUEST, blame=Blame.REQUEST)) == Surface()


def test_a_suspect_in_its_middle_goes_on_once_and_alone() -> None:
    stalled = failed(Cause.STALLED, suspect=True, aftermath=Aftermath.WEDGED)
    first = Situation(stalled, Seen.SPEAKING, 1, 1, suspected=True, replay=5.0)
    assert decide(first) == Resume(isolation=Isolation.ALONE)
    assert decide(replace(first, isolation=Isolation.ALONE)) == Surface(suspect=True), "so it was the cause"
    assert decide(replace(first, failure=failed(Cause.KILLED), isolation=Isolation.ALONE)) == Resume(), (
        "that came from outside"
    )
    assert decide(replace(first, failure=failed(Cause.OOM, suspect=True))) == Surface(suspect=True)


# -- every situation -------------------------------------------------------------------------------------------------


@pytest.mark.no_cover  # more than a million situations
def test_what_holds_always() -> None:
    count = 0
    for now in situations():
        count += 1
        decision, failure = decide(now), now.failure
        apart = not isinstance(decision, Surface) and decision.isolation is Isolation.APART
        if isinstance(decision, TryNext):
            assert now.seen in BEFORE
            assert failure.verdict.blame is not Blame.REQUEST
            assert now.tries < MAX_TRIES
            assert now.left is None or now.left > decision.pause >= 0
            assert failure.sent is Sent.NOTHING or now.generations < MAX_ATTEMPTS or apart
            assert bool(decision.isolation) is (failure.suspect or apart)
            assert decision.elsewhere is (failure.alone and failure.verdict.cause in MEMORY)
            assert not (apart and (now.isolation is Isolation.APART or decision.elsewhere or not is_crowd(failure)))
            pause = CROWD_PAUSE if apart else 0.0
            assert decision.pause == (VICTIM_PAUSE if failure.verdict.cause is Cause.GPU_VICTIM else pause)
        elif isinstance(decision, Resume):
            assert now.seen is Seen.SPEAKING
            assert decision.isolation or not failure.suspect
            assert failure.verdict.blame is not Blame.REQUEST
            assert now.replay is not None
            assert now.replay + decision.pause < CATCH_UP_LIMIT
            assert now.left is None or now.left > decision.pause + now.replay
        elif decision.suspect:
            assert failure.suspect
            assert not is_crowd(failure)
            assert failure.sent is Sent.MAYBE
            assert failure.verdict.blame is not Blame.REQUEST
    assert count > 10_000


def test_no_request_is_generated_more_than_three_times_or_wanders_for_ever() -> None:
    """Every sequence of failures that the policy allows, to its end; three times where it was in two crowds."""
    kinds = [
        failed(cause, sent=sent, suspect=suspect and sent is Sent.MAYBE, inflight=inflight)
        for cause, sent, suspect, inflight in product(
            (Cause.OOM, Cause.KILLED, Cause.GPU_VICTIM), Sent, (False, True), (1, 7)
        )
    ]
    # Only what the policy looks at: two sequences with the same counts go on alike.
    ends, todo = set(), {(0, 0, False)}
    while todo:
        generations, tries, apart = todo.pop()
        for failure in kinds:
            counts = (generations + (failure.sent is Sent.MAYBE), tries + 1)
            then = what(failure, generations=counts[0], tries=counts[1], apart=apart)
            if isinstance(then, TryNext):
                todo.add((*counts, apart or then.isolation is Isolation.APART))
            else:
                ends.add((*counts, apart))
    assert max(generations for generations, _, apart in ends if not apart) == MAX_ATTEMPTS
    assert max(generations for generations, _, apart in ends if apart) == MAX_ATTEMPTS + 1
    assert max(tries for _, tries, _ in ends) == MAX_TRIES


def test_a_crowd_that_is_moved_from_an_occupied_replica_needs_no_retry_budget() -> None:
    stalled = failed(Cause.STALLED, blame=Blame.GATEWAY, aftermath=Aftermath.ALIVE)
    assert what(stalled) == TryNext(counts=True)
    assert what(changed(stalled, reason=Reason.OCCUPIED)) == TryNext()


def stopped() -> CallFailure:
    failure = failed(Cause.OOM, blame=Blame.GATEWAY, aftermath=Aftermath.ALIVE, inflight=0)
    return replace(failure, verdict=replace(failure.verdict, reason=Reason.NO_ROOM))


def test_what_was_stopped_so_that_memory_lasts_goes_on_as_far_as_it_can() -> None:
    """Neither it nor the replica is to blame: it is not alone, does not count, and may be stopped more than once."""
    for tries in range(1, MAX_TRIES):
        assert what(stopped(), tries=tries, generations=0) == TryNext()
    speaking = Situation(stopped(), Seen.SPEAKING, generations=0, tries=1, replay=1.0)
    assert decide(speaking) == Resume()
    assert decide(replace(speaking, replay=None)) == Surface(suspect=False)

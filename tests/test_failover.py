"""The retry policy: a test for each rule, and what holds for every situation there can be."""

from collections.abc import Iterator
from itertools import product

import pytest

from backends.failure import Aftermath, Blame, Cause, Failure, Sent
from gateway.failover import (
    DETERMINISTIC,
    MAX_ATTEMPTS,
    MAX_TRIES,
    VICTIM_PAUSE,
    Situation,
    Surface,
    TryNext,
    decide,
)
from gateway.relay import Seen

BEFORE = (Seen.WAITING, Seen.OPEN)
AFTER = (Seen.SPEAKING, Seen.DONE)
LEFT = (None, -1.0, 0.0, VICTIM_PAUSE, 9.0)  # seconds


def failed(
    cause: Cause = Cause.NATIVE_CRASH,
    *,
    blame: Blame = Blame.BACKEND,
    sent: Sent = Sent.MAYBE,
    companions: int | None = 1,
    truncated: bool = False,
) -> Failure:
    return Failure(
        cause, Aftermath.EXITED, "it died", blame=blame, sent=sent, companions=companions, truncated=truncated
    )


def what(
    failure: Failure, seen: Seen = Seen.WAITING, *, generations: int = 1, tries: int = 1, left: float | None = None
) -> TryNext | Surface:
    return decide(Situation(failure, seen, generations, tries, left))


def situations() -> Iterator[Situation]:
    for cause, blame, sent, companions, truncated in product(Cause, Blame, Sent, (None, 0, 1), (False, True)):
        failure = failed(cause, blame=blame, sent=sent, companions=companions, truncated=truncated)
        for seen, generations, tries, left in product(Seen, (0, 1, 2), (1, 2, MAX_TRIES), LEFT):
            if sent is Sent.MAYBE and generations == 0:
                continue  # this attempt is one
            yield Situation(failure, seen, generations, max(tries, generations), left)


# -- one test for each rule ------------------------------------------------------------------------------------------


def test_a_failure_of_the_request_alone_is_told_as_it_is() -> None:
    assert what(failed(Cause.BAD_REQUEST, blame=Blame.REQUEST)) == Surface()


@pytest.mark.parametrize("cause", sorted(DETERMINISTIC))
@pytest.mark.parametrize("seen", Seen)
def test_who_was_alone_when_memory_ran_out_is_not_replayed(cause: Cause, seen: Seen) -> None:
    assert what(failed(cause, companions=0), seen) == Surface(suspect=True)


@pytest.mark.parametrize("cause", sorted(DETERMINISTIC))
def test_bystanders_of_that_fail_over(cause: Cause) -> None:
    assert what(failed(cause, companions=3)) == TryNext()
    assert what(failed(cause, companions=0, sent=Sent.NOTHING)) == TryNext()


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
    assert what(failed(companions=0), generations=2, tries=2) == Surface(suspect=True)


def test_who_is_a_suspect_after_two() -> None:
    assert what(failed(companions=0, truncated=True), generations=2, tries=2) == Surface()
    assert what(failed(companions=0, blame=Blame.MACHINE), generations=2, tries=2) == Surface()
    assert what(failed(companions=0, blame=Blame.GATEWAY), generations=2, tries=2) == Surface()


@pytest.mark.parametrize("cause", [Cause.UNREACHABLE, Cause.OOM])
def test_nobody_is_a_suspect_where_nobody_knows_who_else_was_there(cause: Cause) -> None:
    """Another gateway upstream that is overloaded, shuts down, still loads, or has no memory to load."""
    busy = failed(cause, companions=None)
    assert what(busy) == TryNext()
    assert what(busy, generations=2, tries=2) == Surface()


def test_victims_of_another_process_let_the_gpu_come_to_rest() -> None:
    victim = failed(Cause.GPU_VICTIM, blame=Blame.MACHINE)
    assert what(victim) == TryNext(pause=VICTIM_PAUSE)
    assert what(victim, left=VICTIM_PAUSE + 0.1) == TryNext(pause=VICTIM_PAUSE)
    assert what(victim, left=VICTIM_PAUSE) == Surface(), "the pause would outlast the request"


# -- every situation -------------------------------------------------------------------------------------------------


def test_what_holds_always() -> None:
    count = 0
    for now in situations():
        count += 1
        decision, failure = decide(now), now.failure
        if isinstance(decision, TryNext):
            assert now.seen in BEFORE
            assert failure.blame is not Blame.REQUEST
            assert now.tries < MAX_TRIES
            assert now.left is None or now.left > decision.pause >= 0
            assert failure.sent is Sent.NOTHING or now.generations < MAX_ATTEMPTS
            assert not (failure.cause in DETERMINISTIC and failure.companions == 0 and failure.sent is Sent.MAYBE)
            assert decision.pause == (VICTIM_PAUSE if failure.cause is Cause.GPU_VICTIM else 0.0)
        elif decision.suspect:
            assert failure.companions == 0
            assert failure.sent is Sent.MAYBE
            assert failure.blame is not Blame.REQUEST
    assert count > 10_000


def test_no_request_is_generated_more_than_twice_or_wanders_for_ever() -> None:
    """Every sequence of failures that the policy allows, to its end."""
    kinds = [
        failed(cause, sent=sent, companions=companions)
        for cause, sent, companions in product((Cause.OOM, Cause.KILLED, Cause.GPU_VICTIM), Sent, (0, 1))
    ]
    # Only what the policy looks at: two sequences with the same counts go on alike.
    ends, todo = set(), {(0, 0)}
    while todo:
        generations, tries = todo.pop()
        for failure in kinds:
            counts = (generations + (failure.sent is Sent.MAYBE), tries + 1)
            if isinstance(what(failure, generations=counts[0], tries=counts[1]), TryNext):
                todo.add(counts)
            else:
                ends.add(counts)
    assert max(generations for generations, _ in ends) == MAX_ATTEMPTS
    assert max(tries for _, tries in ends) == MAX_TRIES

"""Where a request is answered soonest, and what that costs the others."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.admission.placement import CLOSE, Asked, Candidate, choose, cost
from backends.admission.reading_rate import ReadingRate
from backends.admission.reading_turns import Batch

IDLE = Batch()
SHORT, LONG = Asked(100, 50), Asked(50_000, 200)


def candidate(
    name: str,
    read: float = 0.0,
    batch: Batch = IDLE,
    *,
    long: bool = False,
    wait: float | None = None,
    gap: float = 0.0,
    closed: bool = False,
    rank: int = 0,
) -> Candidate:
    return Candidate(name, batch, read, long=long, wait=wait, gap=gap, closed=closed, rank=(rank,))


def chosen(asked: Asked, *candidates: Candidate, arrivals: float = 0.0) -> str:
    return choose(asked, candidates, arrivals).id


def test_what_costs_the_same_is_decided_by_rank() -> None:
    assert chosen(SHORT, candidate("a", 0.1, rank=1), candidate("b", 0.1, rank=0)) == "b"
    assert chosen(SHORT, candidate("a", 0.1, rank=1), candidate("b", 0.1 + CLOSE / 2, rank=0)) == "b"
    assert chosen(SHORT, candidate("a", 0.1, rank=1), candidate("b", 0.1 + 2 * CLOSE, rank=0)) == "a"
    assert chosen(SHORT, candidate("a", wait=CLOSE / 2), candidate("b", rank=1)) == "b", "now rather than later"


def test_a_short_request_keeps_away_from_a_long_one_that_is_written() -> None:
    """Each member of the batch is as dear as the longest."""
    long = candidate("a", 0.1, Batch(decoding=1, longest=50_000), gap=0.02)
    crowd = candidate("b", 0.1, Batch(decoding=5, longest=500), gap=0.02, rank=5)
    assert chosen(SHORT, long, crowd) == "b"
    huge = candidate("b", 0.1, Batch(decoding=60, longest=500), gap=0.02, rank=60)
    assert chosen(SHORT, long, huge) == "a", "but not at any price"


def test_a_long_one_keeps_away_from_those_whose_answers_would_stand_still() -> None:
    people = candidate("a", 4.0, Batch(decoding=3, longest=500), long=True)
    idle = candidate("b", 4.0, long=True, rank=1)
    assert chosen(LONG, people, idle) == "b"
    told = cost(LONG, people)
    assert (told.read, told.others) == (4.0, 12.0)


def test_long_prompts_gather_on_one_replica_where_short_requests_need_the_other() -> None:
    reads = candidate("a", 4.0, Batch(longs=1, long_left=3.0), long=True, wait=3.0, closed=True)
    free = candidate("b", 4.0, long=True)
    assert chosen(LONG, reads, free, arrivals=0.1) == "b", "nobody would wait"
    assert chosen(LONG, reads, free, arrivals=2.0) == "a"
    third = candidate("c", 4.0, long=True)
    assert chosen(LONG, reads, free, third, arrivals=2.0) in "bc", "one is left for them"


@pytest.mark.parametrize(("rate", "choice"), [(500.0, "wait"), (5000.0, "join")])
def test_ten_times_the_learned_rate_changes_the_choice(rate: float, choice: str) -> None:
    """A conversation of 8000 tokens is in the cache of a replica that reads a long prompt for two more seconds; the
    other one is idle, and would have to read all of it."""
    learned = ReadingRate()
    learned.note(4000, 0, 4000 / rate)
    busy = Batch(longs=1, long_left=2.0)
    own = candidate("a", learned.seconds(8200, 8000), busy, wait=2.0, closed=True)
    other = candidate("b", learned.seconds(8200), long=True)
    assert chosen(Asked(8200, 100), own, other) == {"wait": "a", "join": "b"}[choice]


def test_a_short_request_does_not_join_a_long_prompt_that_is_read_where_it_need_not() -> None:
    """Nor where it might, since that takes too long: each prefill step gives one token."""
    reads = Candidate("a", Batch(longs=1, long_left=30.0), 0.01, step=0.5)
    crowd = candidate("b", 0.01, Batch(decoding=8), rank=8)
    assert chosen(SHORT, reads, crowd) == "b"
    assert cost(SHORT, reads).wait == pytest.approx(26.0)
    assert cost(Asked(100, 1000), reads).wait == 30.0, "it has ended by then"


def test_what_a_replica_has_cached_is_worth_its_reading() -> None:
    own = candidate("a", 0.1, Batch(decoding=2, longest=8000), gap=0.01)
    other = candidate("b", 5.0, gap=0.01, long=True)
    assert chosen(Asked(8000, 100), own, other) == "a"


def test_a_wait_of_unknown_length_is_no_alternative() -> None:
    assert chosen(LONG, candidate("a", wait=math.inf), candidate("b", 100.0, Batch(decoding=9))) == "b"
    assert chosen(LONG, candidate("a", wait=math.inf, rank=1), candidate("b", wait=math.inf)) == "b"


BATCHES = st.builds(Batch, reading=st.integers(0, 8), decoding=st.integers(0, 32), longest=st.integers(0, 100_000))
CANDIDATES = st.lists(
    st.builds(
        Candidate,
        id=st.uuids().map(str),
        batch=BATCHES,
        read=st.floats(0.0, 100.0),
        long=st.booleans(),
        wait=st.none() | st.floats(0.0, 100.0),
        gap=st.floats(0.0, 0.2),
        closed=st.booleans(),
        rank=st.tuples(st.integers(0, 9)),
    ),
    min_size=1,
    max_size=5,
)


@given(st.builds(Asked, tokens=st.integers(1, 100_000), answer=st.integers(0, 8192)), CANDIDATES, st.floats(0.0, 50.0))
def test_the_choice_is_about_the_cheapest_and_each_alternative_has_a_cost(
    asked: Asked, candidates: list[Candidate], arrivals: float
) -> None:
    choice = choose(asked, candidates, arrivals)
    totals = {name: each.total for name, each in choice.costs.items()}
    assert totals.keys() == {one.id for one in candidates}
    assert all(total >= 0.0 for total in totals.values())
    assert totals[choice.id] <= min(totals.values()) * 1.1 + CLOSE + 1e-9


@given(BATCHES, BATCHES, st.floats(0.01, 10.0))
def test_more_company_is_never_cheaper(one: Batch, more: Batch, read: float) -> None:
    both = Batch(one.reading + more.reading, 0.0, 0, math.inf, 0.0, one.decoding + more.decoding, one.longest)
    alone, together = (cost(SHORT, candidate("a", read, batch, gap=0.01)) for batch in (one, both))
    assert alone.total <= together.total + 1e-9

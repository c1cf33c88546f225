"""When a long prompt is read in slices, and where it is cut."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.admission.reading_rate import LONG, ReadingRate
from backends.domain.snapshot import Seat
from gateway.policy.slicing import (
    ALONE,
    END,
    FIRST,
    FORGET,
    LEAST,
    LONG_UNKNOWN,
    LONGEST,
    LOST,
    MIN_CHARS,
    MOVES,
    SHORTEST,
    Abilities,
    Ability,
    Slice,
    Slicing,
    budget,
    is_long,
    worth_counting,
)

HERE, THERE = Seat("m:0", 1), Seat("m:1", 1)
DENSITY = 3  # characters of a token

True_ = Callable[[int, int], float]  # tokens, cached -> seconds that they take


def fast(tokens: int, cached: int) -> float:
    return (tokens - cached) / 5000


def quadratic(tokens: int, cached: int) -> float:
    """As measured with a model of 2 layers on a processor: attention is nearly all."""
    return 6e-5 * (tokens - cached) + 6e-8 * (tokens**2 - cached**2)


def learned(took: True_, *sizes: int) -> ReadingRate:
    rate = ReadingRate()
    for size in sizes:
        rate.note(size, 0, took(size, 0))
    return rate


def read(
    plan: Slicing, rate: ReadingRate, took: True_, *, cached: int = 0, waited: float = 0.0, loses: bool = False
) -> list[Slice]:
    """All slices of a prompt, on a server that has ``cached`` tokens of it; ``loses``: it finds none of its slices."""
    slices: list[Slice] = []
    plan.sit(HERE)
    while (near := plan.next(rate, waited)) is not None:
        assert plan.at < near <= plan.chars - END
        assert len(slices) < 1000, "it ends"
        tokens = near // DENSITY
        found = min(tokens - 1, cached if loses or not slices else max(cached, slices[-1].tokens))
        slices.append(Slice(near, tokens, found, took(tokens, found)))
        rate.note(tokens, found, slices[-1].seconds)
        plan.note(slices[-1])
    return slices


def of(tokens: int, cached: int = 0, *, proven: bool = True) -> Slicing:
    return Slicing(tokens * DENSITY, tokens, cached, proven=proven)


@pytest.mark.parametrize("took", [fast, quadratic])
@pytest.mark.parametrize("tokens", [12_000, 50_000])
def test_no_slice_takes_much_longer_than_it_may(took: True_, tokens: int) -> None:
    rate = learned(took, 1000, 4000, 8000)
    slices = read(of(tokens), rate, took)
    assert len(slices) >= 2
    assert max(one.seconds for one in slices) < 2 * ALONE
    rest = took(tokens, slices[-1].tokens)
    assert rest < 3 * ALONE
    assert all(one.seconds > ALONE / 3 for one in slices), "nor is it cut finer than that"


def test_the_first_prompt_of_all_begins_small() -> None:
    """Nothing is known of the rate: neither is a slow machine stopped for a minute, nor a fast one slowed down."""
    slow = read(of(20_000), ReadingRate(), lambda tokens, cached: (tokens - cached) / 250)
    assert max(one.seconds for one in slow) < 5
    quick = read(of(200_000), ReadingRate(), lambda tokens, cached: (tokens - cached) / 25_000)
    assert len(quick) < 20
    assert quick[0].tokens == FIRST


def test_the_longer_others_take_the_longer_are_the_slices() -> None:
    assert budget(0.0) == ALONE
    assert [budget(waited) for waited in (0.1, 0.5, 1.2, 30.0)] == [SHORTEST, SHORTEST, 1.2, LONGEST]
    assert budget(0.1, beside=True) == LONGEST, "the others have long prompts"
    few, many = (len(read(of(50_000), learned(fast, 8000), fast, waited=waited)) for waited in (5.0, 0.1))
    assert few < many


def test_a_rate_that_is_ten_times_as_high_makes_ten_times_fewer_slices() -> None:
    def slower(tokens: int, cached: int) -> float:
        return 10 * fast(tokens, cached)

    count, tenfold = (len(read(of(100_000), learned(took, 20_000), took)) for took in (fast, slower))
    assert count * 5 < tenfold < count * 20
    known = (learned(fast, 20_000), learned(slower, 20_000))
    assert [is_long(4000, 0, rate.seconds, known=True) for rate in known] == [False, True]


def test_a_model_whose_cache_cannot_be_cut_back_shows_it_in_its_second_slice() -> None:
    plan = of(50_000, proven=False)
    slices = read(plan, learned(fast, 8000), fast, loses=True)
    assert (len(slices), plan.able, plan.may_go_on) == (2, False, False)
    plan = of(50_000, proven=False)
    assert len(read(plan, learned(fast, 8000), fast)) > 5
    assert plan.able


def test_an_entry_of_one_token_less_is_no_slice_that_was_cut_back() -> None:
    """As seen with recurrent layers: it is kept beside the entry of the slice."""
    for missing, able in ((1, False), (0, True), (-500, None)):
        plan = of(50_000, proven=False)
        plan.sit(HERE)
        probes = [plan.probes]
        plan.note(Slice(6000, 2000, 0, 1.0))
        assert [*probes, plan.probes] == [True, False]
        plan.note(Slice(9000, 3000, 2000 - missing, 1.0))
        assert plan.able is able


def test_a_beginning_that_all_have_is_not_taken_for_a_slice() -> None:
    """The template's first tokens are always found."""
    plan = of(50_000, proven=False)
    read(plan, learned(fast, 8000), fast, cached=12, loses=True)
    assert plan.able is False


def test_abilities_are_forgotten_where_they_were_missing() -> None:
    known = Abilities()
    assert known.of("m", 0.0) is Ability.UNKNOWN
    known.note("m", able=False, now=0.0)
    assert [known.of("m", at) for at in (0.0, FORGET - 1, FORGET)] == [Ability.NO, Ability.NO, Ability.UNKNOWN]
    known.note("m", able=True, now=FORGET)
    assert known.of("m", FORGET) is Ability.YES
    assert known.of("other", FORGET) is Ability.UNKNOWN


def test_a_loss_says_little_of_a_model_that_can() -> None:
    """Others may have pushed it out of the prompt cache."""
    plan = of(50_000)
    plan.sit(HERE)
    for count, found in enumerate((0, 2000, 0, 4000)):
        assert plan.may_go_on
        plan.note(Slice(3000 * (count + 1), 1000 * (count + 1), found, 1.0))
        assert plan.losses == [0, 0, 1, 1][count]
    plan.note(Slice(20_000, 6000, 12, 1.0))
    assert (plan.able, plan.lost, plan.may_go_on) == (True, True, False)
    unknown = of(50_000, proven=False)
    unknown.sit(HERE)
    unknown.note(Slice(3000, 1000, 0, 1.0))
    unknown.note(Slice(6000, 2000, 0, 1.0))
    assert (unknown.able, unknown.may_go_on) == (False, False)


def test_a_model_that_lost_what_was_read_is_tried_again_sooner_unless_that_goes_on() -> None:
    known, now = Abilities(), 0.0
    known.note("m", able=True, now=now)
    for seconds in (LOST, 4 * LOST, 16 * LOST, FORGET, FORGET):
        known.lost("m", now)
        known.note("m", able=True, now=now)
        assert known.of("m", now + seconds - 0.1) is Ability.NO, "whatever other prompts show meanwhile"
        now += seconds
        assert known.of("m", now) is Ability.YES
    known.found("m")
    known.lost("m", now)
    assert known.of("m", now + LOST) is Ability.YES


def test_what_came_after_no_slice_shows_nothing() -> None:
    for cached in (0, 12):
        plan = of(50_000, proven=False)
        plan.sit(HERE)
        plan.judge(cached)
        assert plan.able is None
        assert not plan.losses


def test_what_is_cached_is_not_read_again() -> None:
    plan = of(50_000, cached=40_000)
    slices = read(plan, learned(fast, 8000), fast, cached=40_000)
    assert slices[0].tokens > 40_000
    assert plan.found == 40_000
    assert len(slices) <= 2


def test_what_is_cached_unexpectedly_is_passed_by_quickly() -> None:
    plan = of(200_000)
    slices = read(plan, learned(fast, 8000), fast, cached=195_000)
    assert len(slices) <= 8
    assert sum(one.seconds for one in slices) < 1


def test_what_the_cache_should_have_and_has_not_is_read_in_slices_too() -> None:
    plan = of(100_000, cached=10_000)
    slices = read(plan, learned(fast, 8000), fast)
    assert slices[0].cached == 0
    assert plan.found == 0
    assert max(one.seconds for one in slices[1:]) < 2 * ALONE


def test_on_another_replica_it_begins_again_but_not_for_ever() -> None:
    plan, rate = of(50_000), learned(fast, 8000)
    for number in range(MOVES + 1):
        plan.sit(Seat(f"m:{number}", 1))
        near = plan.next(rate, 0.0)
        assert near is not None
        assert near < 8000 * DENSITY, "nothing is read there yet"
        plan.note(Slice(near, near // DENSITY, 0, 1.0))
    plan.sit(Seat(f"m:{MOVES + 1}", 1))
    assert plan.next(rate, 0.0) is None


def test_what_ended_between_two_slices_gets_the_whole_prompt_next() -> None:
    """Else each of its lives could end by a slice that nobody is blamed for."""
    plan, rate = of(50_000), learned(fast, 8000)
    read(plan, rate, fast)
    plan.sit(HERE._replace(generation=HERE.generation + 1))
    assert plan.next(rate, 0.0) is None
    assert (plan.read, plan.able) == (0, True)


def test_the_same_instance_is_no_other() -> None:
    plan, rate = of(50_000), learned(fast, 8000)
    read(plan, rate, fast)
    at = plan.at
    plan.sit(HERE)
    assert plan.at == at
    plan.sit(THERE)
    assert (plan.at, plan.read, plan.found) == (0, 0, None)


def test_one_that_was_given_up_is_sent_as_it_is() -> None:
    plan = of(50_000)
    plan.give_up()
    assert plan.next(learned(fast, 8000), 0.0) is None
    assert plan.able, "that says nothing of the model"


def test_short_prompts_cost_nothing() -> None:
    rate = learned(fast, 8000)
    assert not worth_counting(MIN_CHARS - 1, 0, rate.seconds, known=True)
    assert not worth_counting(9000, 0, rate.seconds, known=True)
    assert worth_counting(60_000, 0, rate.seconds, known=True)
    assert not worth_counting(60_000, 55_000, rate.seconds, known=True), "the most of it is cached"
    assert worth_counting(60_000, 0, ReadingRate().seconds, known=False)
    assert is_long(round(LONG * 5500), 0, rate.seconds, known=True)
    assert not is_long(round(LONG * 5500), 5000, rate.seconds, known=True)
    assert is_long(LONG_UNKNOWN, 0, ReadingRate().seconds, known=False)


@given(
    tokens=st.integers(1, 2_000_000),
    cached=st.integers(0, 2_000_000),
    speed=st.floats(1.0, 1e6),
    bend=st.floats(0.0, 1e-3),
    waited=st.floats(0.0, 100.0),
    proven=st.booleans(),
    loses=st.booleans(),
    known=st.booleans(),
)
def test_slices_go_forward_and_end(
    *, tokens: int, cached: int, speed: float, bend: float, waited: float, proven: bool, loses: bool, known: bool
) -> None:
    def took(upto: int, since: int) -> float:
        return (upto - since) / speed + bend * (upto**2 - since**2) / speed

    plan = Slicing(tokens * DENSITY, tokens, min(cached, tokens), proven=proven)
    rate = learned(took, 1000, 8000) if known else ReadingRate()
    plan.sit(HERE)
    last = 0
    for _ in range(50):
        near = plan.next(rate, waited)
        if near is None:
            return
        assert last < near <= plan.chars - END
        read_now = max(near // DENSITY, 1)
        found = 0 if loses else min(read_now - 1, plan.read)
        rate.note(read_now, found, took(read_now, found))
        plan.note(Slice(near, read_now, found, took(read_now, found)))
        assert plan.target <= tokens
        last = near
    assert tokens > 50 * LEAST

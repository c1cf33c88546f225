"""Turns among classes of requests: by weight, with ageing, so that no class is starved."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from backends.admission.fair_queue import AGEING, PASSED_OVER, WEIGHTS, FairQueue
from backends.domain.priority import Priority

Item = tuple[Priority, int]
INTERACTIVE, AGENT, BACKGROUND = Priority
TURNS = sum(WEIGHTS.values())


def queue(**counts: int) -> FairQueue[Item]:
    filled = FairQueue[Item]()
    for name, count in counts.items():
        priority = Priority.of(name)
        for number in range(count):
            filled.join((priority, number), priority, 0.0)
    return filled


def serve(line: FairQueue[Item], now: float = 0.0) -> Item:
    item = line.heads(now)[0]
    line.served(item, item[0], now)
    return item


def classes(line: FairQueue[Item], turns: int) -> list[Priority]:
    return [serve(line)[0] for _ in range(turns)]


def test_turns_are_shared_by_weight() -> None:
    served = classes(queue(interactive=100, agent=100, background=100), 2 * TURNS)
    assert {p: served.count(p) for p in Priority} == {p: 2 * weight for p, weight in WEIGHTS.items()}


def test_a_person_who_comes_into_a_flood_is_next() -> None:
    line = queue(background=50)
    classes(line, 7)
    line.join((INTERACTIVE, 0), INTERACTIVE, 1.0)
    assert serve(line, 1.0) == (INTERACTIVE, 0)


def test_a_class_that_was_away_has_saved_nothing_up() -> None:
    line = queue(agent=100)
    classes(line, 50)
    for number in range(100):
        line.join((INTERACTIVE, number), INTERACTIVE, 1.0)
    assert classes(line, 10).count(AGENT) >= 1


def test_where_slots_become_free_slowly_a_class_that_waits_long_is_next() -> None:
    """One turn in seventeen by weight would be eight minutes away."""
    line = queue(interactive=100, background=100)
    served = [serve(line, 30.0 * turn)[0] for turn in range(1, 41)]
    at = [turn for turn, priority in enumerate(served) if priority is BACKGROUND]
    gaps = {later - earlier for earlier, later in itertools.pairwise(at)}
    assert gaps == {PASSED_OVER + 1}, "and not more often: weights hold as far as they can"


def test_where_they_become_free_quickly_the_weights_hold() -> None:
    line = queue(interactive=200, background=200)
    served = [serve(line, AGEING / 100 * turn)[0] for turn in range(170)]
    assert served.count(BACKGROUND) == 10


def test_the_last_of_the_least_urgent_makes_room() -> None:
    line = queue(interactive=1, agent=2, background=2)
    assert line.last_below(INTERACTIVE) == line.last_below(AGENT) == (BACKGROUND, 1)
    assert line.last_below(BACKGROUND) is None
    assert queue(agent=2).last_below(AGENT) is None
    assert FairQueue[Item]().last_below(INTERACTIVE) is None


def test_one_that_leaves_costs_no_turn() -> None:
    line = queue(agent=2, background=1)
    line.leave((AGENT, 0), AGENT)
    line.leave((AGENT, 0), AGENT)
    assert (AGENT, 0) not in line
    assert (len(line), line.of_class(AGENT), line.of_class(INTERACTIVE)) == (2, 1, 0)
    assert classes(line, 2) == [AGENT, BACKGROUND]
    assert line.heads(0.0) == []


STEPS = st.lists(
    st.tuples(st.sampled_from([*Priority, "serve", "serve", "serve"]), st.floats(0.0, 8.0)), min_size=1, max_size=150
)


@given(STEPS)
def test_the_order_foretold_is_the_order_kept(steps: list[tuple[Priority | str, float]]) -> None:
    """And nobody is overtaken within a class, nobody is lost."""
    line, now, came = FairQueue[Item](), 0.0, 0
    served: list[Item] = []
    for step, pause in steps:
        now += pause
        if isinstance(step, Priority):
            line.join((step, came), step, now)
            came += 1
        elif len(line):
            served.append(serve(line, now))
    foretold = list(line.order(now))
    assert sorted(foretold) == sorted(line)
    rest = [serve(line, now) for _ in range(len(line))]
    assert rest == foretold
    for priority in Priority:
        numbers = [number for p, number in served + rest if p is priority]
        assert numbers == sorted(numbers)
    assert len(served) + len(rest) == came


@given(
    st.sampled_from([0.01, 0.5, 3.0, 30.0]),
    st.lists(st.sampled_from(list(Priority)), min_size=1, max_size=3),
    st.integers(0, 40),
)
def test_no_class_is_starved(pause: float, crowd: list[Priority], head_start: int) -> None:
    """Whatever the others do, it is served within the turns of its weight, or soon after it has aged."""
    for waiting in Priority:
        line = queue(**{priority.label: 400 for priority in crowd if priority is not waiting})
        now = 0.0
        for _ in range(head_start if len(line) else 0):
            now += pause
            serve(line, now)
        line.join((waiting, 0), waiting, now)
        turns = 0
        while (waiting, 0) in line:
            now += pause
            serve(line, now)
            turns += 1
        by_weight = TURNS / WEIGHTS[waiting] + len(Priority)
        aged = max(AGEING / pause, PASSED_OVER) + 2 * len(Priority)
        assert turns <= min(by_weight, aged)


def test_one_that_was_set_aside_stays_first_of_its_class_and_has_no_turn_of_another() -> None:
    line = queue(interactive=2, background=3)
    for number in range(2):
        line.set_aside((BACKGROUND, number), BACKGROUND)
    assert len(line) == 5
    assert line.of_class(BACKGROUND) == 3
    assert list(line.aside) == [(BACKGROUND, 0), (BACKGROUND, 1)]
    assert line.heads(0.0) == [(INTERACTIVE, 0), (BACKGROUND, 2)]
    assert list(line.order(0.0)) == [*((INTERACTIVE, n) for n in range(2)), *((BACKGROUND, n) for n in range(3))]
    assert line.last_below(INTERACTIVE) == (BACKGROUND, 2)
    line.leave((BACKGROUND, 2), BACKGROUND)
    assert line.heads(0.0) == [(INTERACTIVE, 0)]
    assert line.last_below(INTERACTIVE) == (BACKGROUND, 1)
    line.served((BACKGROUND, 0), BACKGROUND, 0.0)
    line.leave((BACKGROUND, 1), BACKGROUND)
    assert (line.any_aside, line.of_class(BACKGROUND), len(line)) == (False, 0, 2)

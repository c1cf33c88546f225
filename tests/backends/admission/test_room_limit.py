"""The limit that running out of memory teaches."""

from hypothesis import given
from hypothesis import strategies as st

from backends.admission.room_limit import PERIOD, SHARE_STEP, RoomLimit

WITHIN = round(1 / SHARE_STEP) + 1  # periods


def answers(limit: RoomLimit, room: int | None, periods: int, since: float = 0.0) -> None:
    for period in range(1, periods + 1):
        limit.answered(room, since + period * (PERIOD + 1.0))


def test_what_the_share_allows_holds_until_memory_runs_out() -> None:
    limit = RoomLimit()
    assert limit.of(1000) == 1000
    assert limit.of(None) is None
    limit.answered(1000, 1e9)
    assert limit.of(1000) == 1000


def test_down_by_a_factor_and_up_in_steps() -> None:
    limit = RoomLimit()
    limit.ran_out(1000, now=0.0)
    assert limit.of(1000) == 700
    limit.ran_out(1000, now=1.0)
    assert limit.of(1000) == 490, "of what the limit was, if that is less"
    grown = []
    for period in range(1, 30):
        for second in range(10):
            limit.answered(1000, period * PERIOD + 1 + second)
        grown.append(limit.of(1000))
    assert grown[:3] == [525, 560, 595], "one step for each period, however many are answered"
    assert grown[-1] == 1000
    assert limit.of(1200) == 1200, "it is forgotten once it does not bind"


def test_nothing_grows_without_answers() -> None:
    limit = RoomLimit()
    limit.ran_out(1000, now=0.0)
    assert limit.of(1000) == limit.of(900) == 700


def test_it_is_not_forgotten_while_the_share_is_small() -> None:
    """Other programs may take memory for a while."""
    limit = RoomLimit()
    limit.ran_out(1000, now=0.0)
    assert limit.of(600) == 600
    assert limit.of(1000) == 700
    limit.answered(1000, PERIOD)
    limit.answered(600, 2 * PERIOD)
    assert limit.of(600) == 600
    assert limit.of(1000) == 800


def test_it_is_the_only_limit_where_no_share_is_known() -> None:
    limit = RoomLimit()
    limit.ran_out(1000, now=0.0)
    assert limit.of(None) == 700
    answers(limit, None, 100)
    assert (limit.of(None) or 0) > 1000


def test_a_crowd_of_short_requests_does_not_bind_for_days() -> None:
    """What it needed is no measure of the steps: there may be a thousand times as much."""
    limit = RoomLimit()
    for _ in range(10):
        limit.ran_out(1 << 20, now=0.0)
    answers(limit, 1 << 30, WITHIN)
    assert limit.of(1 << 30) == 1 << 30


@given(
    room=st.integers(1, 1 << 40),
    steps=st.lists(st.one_of(st.integers(0, 1 << 41), st.floats(0.0, 5 * PERIOD)), max_size=60),
)
def test_whatever_happens_it_is_never_nothing_nor_more_than_the_share_and_recovers(
    room: int, steps: list[int | float]
) -> None:
    """``steps``: bytes of a batch that ran out of memory, or seconds until an answer."""
    limit, now = RoomLimit(), 0.0
    for step in steps:
        before = limit.of(room) or 0
        if isinstance(step, int):
            limit.ran_out(step, now)
        else:
            now += step
            limit.answered(room, now)
        after = limit.of(room) or 0
        assert 1 <= after <= room
        assert after >= before or isinstance(step, int), "an answer takes nothing away"
    answers(limit, room, WITHIN, since=now)
    assert (limit.limit, limit.of(room)) == (None, room)

"""The limit that running out of memory teaches."""

from backends.admission.room_limit import PERIOD, RoomLimit


def test_what_the_share_allows_holds_until_memory_runs_out() -> None:
    limit = RoomLimit()
    assert limit.of(1000) == 1000
    assert limit.of(None) is None
    limit.answered(1e9)
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
            limit.answered(period * PERIOD + 1 + second)
        grown.append(limit.of(1000))
    assert grown[:3] == [525, 560, 595], "one step for each period, however many are answered"
    assert grown[-1] == 1000
    assert limit.of(1200) == 1200, "it is forgotten once it does not bind"


def test_nothing_grows_without_answers() -> None:
    limit = RoomLimit()
    limit.ran_out(1000, now=0.0)
    assert limit.of(1000) == limit.of(900) == 700
    assert limit.of(600) == 600, "the share may be less"


def test_it_is_the_only_limit_where_no_share_is_known() -> None:
    limit = RoomLimit()
    limit.ran_out(1000, now=0.0)
    assert limit.of(None) == 700
    for period in range(1, 100):
        limit.answered(period * PERIOD)
    assert (limit.of(None) or 0) > 1000

"""Slots that are kept for more urgent requests, as long as some come."""

import pytest

from backends.admission.slot_shares import EXPECTED, HELD_UP, RECENT, SlotShares
from backends.domain.priority import Priority

INTERACTIVE, AGENT, BACKGROUND = Priority


@pytest.mark.parametrize(
    ("seen", "ago", "asks", "most"),
    [
        (INTERACTIVE, 1.0, BACKGROUND, 1),
        (INTERACTIVE, 1.0, AGENT, 24),
        (INTERACTIVE, 1.0, INTERACTIVE, 32),
        (AGENT, 1.0, BACKGROUND, 1),
        (AGENT, 1.0, AGENT, 32),
        (BACKGROUND, 1.0, INTERACTIVE, 32),
        (INTERACTIVE, RECENT, BACKGROUND, 24),
        (INTERACTIVE, RECENT, AGENT, 32),
        (INTERACTIVE, EXPECTED, BACKGROUND, 32),
    ],
)
def test_share_of_a_class(seen: Priority, ago: float, asks: Priority, most: int) -> None:
    shares = SlotShares()
    shares.note(seen, 5.0)
    assert shares.most(asks, 32, 5.0 + ago) == most


def test_background_is_gathered_while_others_come() -> None:
    shares = SlotShares()
    assert not shares.gathers(BACKGROUND, 0.0)
    shares.note(AGENT, 0.0)
    assert shares.gathers(BACKGROUND, 1.0)
    assert not shares.gathers(BACKGROUND, RECENT)
    shares.note(INTERACTIVE, 0.0)
    assert not shares.gathers(AGENT, 1.0), "each has a conversation cached somewhere"


def test_where_nobody_more_urgent_comes_all_slots_are_used() -> None:
    assert SlotShares().most(BACKGROUND, 8, 0.0) == 8


def test_background_begins_when_nobody_more_urgent_is_there_or_after_some_time() -> None:
    shares = SlotShares()
    shares.note(INTERACTIVE, 0.0)
    assert shares.may_begin(BACKGROUND, 0.0, beside=3), "the first one"
    shares.begins(BACKGROUND, 0.0)
    assert not shares.may_begin(BACKGROUND, 1.0, beside=1)
    assert shares.may_begin(BACKGROUND, 1.0, beside=0)
    assert shares.may_begin(AGENT, 1.0, beside=1)
    assert shares.may_begin(BACKGROUND, HELD_UP, beside=1)
    assert shares.may_begin(BACKGROUND, RECENT, beside=1)


@pytest.mark.parametrize("slots", [1, 2, 7])
def test_each_class_has_one_slot_at_least(slots: int) -> None:
    """Otherwise it would starve."""
    shares = SlotShares()
    shares.note(INTERACTIVE, 0.0)
    assert shares.most(BACKGROUND, slots, 0.0) == 1

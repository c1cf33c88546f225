"""A batch that grows beyond its memory: who is stopped, in which order, and who never."""

import pytest

from backends.admission.batch import Member, peak
from backends.admission.growth import NEAR, Growing, Stop, to_stop
from backends.memory.kv_cost import KvCost

COST = KvCost(per_token=1000, layers=16)


def growing(key: str, stop: Stop, *, written: int = 2000, admitted: float = 0.0) -> Growing[str]:
    return Growing(key, Member(100, 8000, 100, written, decoding=True), stop, admitted)


def need(*batch: Growing[str]) -> int:
    """As it is soon."""
    written = [each.member.written for each in batch]
    return peak(COST, [Member(100, each + NEAR, 100, each, decoding=True) for each in written])


def test_as_long_as_it_fits_nobody_is_stopped() -> None:
    batch = [growing(str(stop), stop) for stop in Stop]
    assert to_stop(COST, batch, need(*batch), error=0.0) == []


def test_what_counts_is_what_it_needs_soon_not_at_its_likely_end() -> None:
    batch = [growing("a", Stop.AGAIN, written=100), growing("b", Stop.AGAIN, written=100)]
    assert to_stop(COST, batch, 2_000_000, error=0.0) == []
    assert peak(COST, [each.member for each in batch]) > 16_000_000


def test_first_those_without_content_then_those_that_can_be_replayed_and_the_others_last() -> None:
    lost, replay, again = growing("lost", Stop.LOST), growing("replay", Stop.REPLAY), growing("again", Stop.AGAIN)
    ends = growing("ends", Stop.NEVER)
    batch = [lost, again, ends, replay]
    assert to_stop(COST, batch, need(lost, replay, ends), error=0.0) == ["again"]
    assert to_stop(COST, batch, need(lost, ends), error=0.0) == ["again", "replay"]
    other = growing("other", Stop.LOST, admitted=1.0)
    assert to_stop(COST, [*batch, other], need(lost, ends), error=0.0) == ["again", "replay", "other"]
    assert to_stop(COST, [*batch, other], 1, error=0.0) == ["again", "replay", "other"], "one stays"


def test_of_a_kind_the_latest_first() -> None:
    batch = [growing(str(at), Stop.AGAIN, admitted=at) for at in (3.0, 1.0, 2.0)]
    assert to_stop(COST, batch, need(batch[0]), error=0.0) == ["3.0", "2.0"]


@pytest.mark.parametrize("stop", list(Stop))
def test_never_everybody(stop: Stop) -> None:
    batch = [growing(str(index), stop, admitted=index) for index in range(5)]
    assert len(to_stop(COST, batch, 1, error=0.0)) == (0 if stop is Stop.NEVER else 4)
    assert to_stop(COST, batch[:1], 1, error=0.0) == []


def test_an_answer_is_lost_only_where_the_prediction_cannot_be_wrong() -> None:
    batch = [growing("a", Stop.LOST), growing("b", Stop.LOST, admitted=1.0)]
    assert to_stop(COST, batch, int(need(*batch) / 1.1), error=0.15) == []
    assert to_stop(COST, batch, int(need(*batch) / 1.2), error=0.15) == ["b"]

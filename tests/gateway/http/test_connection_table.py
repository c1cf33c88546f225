"""Who gives way, and how many may come in."""

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from gateway.http.connection_table import (
    DESCRIPTORS_KEPT,
    MAX_EXCESS,
    MIN_CONNECTIONS,
    MIN_WAIT,
    SPARE_CONNECTIONS,
    ConnectionTable,
    Place,
    limit_of,
)


@dataclass(eq=False)
class Connection:
    evicted: bool = False

    def evict(self) -> None:
        assert not self.evicted
        self.evicted = True


def entered(
    table: ConnectionTable, *, works: bool = False, local: bool = True, now: float = 0.0
) -> tuple[Connection, Place]:
    connection = Connection()
    place = table.enter(connection, local=local, now=now)
    if works:
        table.works(connection)
    return connection, place


def test_up_to_the_limit_nobody_gives_way() -> None:
    table = ConnectionTable(3)
    first = [entered(table) for _ in range(3)]
    assert [place for _, place in first] == [Place.ADMITTED] * 3
    assert not any(connection.evicted for connection, _ in first)
    table.leave(first[0][0])
    assert entered(table)[1] is Place.ADMITTED
    assert not any(connection.evicted for connection, _ in first)


def test_who_waits_longest_gives_way() -> None:
    table = ConnectionTable(3)
    (a, _), (b, _), (c, _) = (entered(table) for _ in range(3))
    table.works(a)
    table.waits(a, 1.0)  # answered just now
    assert entered(table, works=True, now=MIN_WAIT)[1] is Place.ADMITTED
    assert (a.evicted, b.evicted, c.evicted) == (False, True, False)
    table.works(c)
    assert entered(table, works=True, now=1.0 + MIN_WAIT)[1] is Place.ADMITTED
    assert (a.evicted, c.evicted) == (True, False)
    assert entered(table, now=9.0)[1] is Place.EXCESS
    assert not c.evicted


def test_those_that_have_just_come_stay() -> None:
    table = ConnectionTable(2)
    (first, _), (second, _) = entered(table, now=0.0), entered(table, now=0.5)
    assert entered(table, now=MIN_WAIT - 0.01)[1] is Place.EXCESS
    assert entered(table, now=MIN_WAIT)[1] is Place.ADMITTED
    assert (first.evicted, second.evicted) == (True, False)


def test_one_whose_last_answer_was_sent_gives_way_first_and_at_once() -> None:
    table = ConnectionTable(2)
    (idle, _), (finished, _) = entered(table), entered(table, works=True)
    table.finishes(finished, 10.0)
    assert entered(table, now=10.0)[1] is Place.ADMITTED
    assert (idle.evicted, finished.evicted) == (False, True)


def test_excess_gives_way_to_this_machine_only() -> None:
    table = ConnectionTable(1, max_excess=2)
    entered(table, works=True)
    (first, _), (second, _) = entered(table), entered(table, local=False)
    assert entered(table, local=False)[1] is Place.REFUSED
    assert not first.evicted
    assert entered(table)[1] is Place.EXCESS
    assert (first.evicted, second.evicted) == (True, False)


def test_excess_that_was_answered_gives_way_too() -> None:
    table = ConnectionTable(1, max_excess=1)
    entered(table, works=True)
    finished, _ = entered(table, works=True)
    assert entered(table)[1] is Place.REFUSED, "one that is being answered stays"
    table.finishes(finished, 0.0)
    assert entered(table, local=False)[1] is Place.REFUSED
    assert entered(table)[1] is Place.EXCESS
    assert finished.evicted


def test_one_that_was_refused_leaves_no_trace() -> None:
    table = ConnectionTable(1, max_excess=0)
    entered(table, works=True)
    refused, place = entered(table, local=False)
    assert place is Place.REFUSED
    table.waits(refused, 0.0)
    table.leave(refused)
    assert len(table) == 1


@given(
    st.lists(
        st.tuples(st.sampled_from(["enter", "works", "waits", "finishes", "leave"]), st.integers(0, 9), st.booleans())
    )
)
def test_there_are_never_more_than_the_bounds(steps: list[tuple[str, int, bool]]) -> None:
    table, there = ConnectionTable(3, max_excess=2), list[Connection]()
    working: set[Connection] = set()
    for now, (what, which, local) in enumerate(steps):
        if what == "enter":
            connection, place = entered(table, local=local, now=now)
            there += [connection] if place is not Place.REFUSED else []
        elif there:
            one = there[which % len(there)]
            getattr(table, what)(one, *([float(now)] if what in ("waits", "finishes") else []))
            (working.add if what == "works" else working.discard)(one)
            there = [other for other in there if what != "leave" or other is not one]
        assert not any(one.evicted for one in working)
        there = [one for one in there if not one.evicted]
        assert len(table) == len(there) <= 5


def test_the_limit_leaves_room_for_idle_connections() -> None:
    assert limit_of(2048, descriptors=65536, upstream=64, replicas=8) == 2048 + SPARE_CONNECTIONS


def test_the_limit_follows_the_descriptors() -> None:
    limit = limit_of(2048, descriptors=256, upstream=8, replicas=1)
    assert limit + 8 + DESCRIPTORS_KEPT + MAX_EXCESS // 2 < 256
    assert limit > 128
    many = limit_of(2048, descriptors=256, upstream=100_000, replicas=1)
    assert many > 64, "backends that could take any number do not take the clients' place"
    assert limit_of(2048, descriptors=64, upstream=8, replicas=20) == MIN_CONNECTIONS

"""Long prompts and all others take turns on one replica: nothing is read beside a long one, and nobody starves."""

import heapq
import math
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from backends.admission.reading_turns import JOINERS, LIMIT, LONGEST_SHARE, SHARE, Batch, ReadingTurns

LONG_READS = Batch(longs=1, long_since=100.0, long_left=4.0)
IDLE = Batch()


def test_nothing_is_admitted_beside_a_long_prompt_that_is_read() -> None:
    turns = ReadingTurns()
    assert not turns.admits(LONG_READS, 101.0, came=99.0)
    assert not turns.admits_long(LONG_READS, 101.0)
    assert turns.wait(LONG_READS, 101.0) == 4.0


def test_a_long_one_waits_for_prompts_that_are_read_but_not_for_answers() -> None:
    turns = ReadingTurns()
    assert turns.admits_long(IDLE, 0.0)
    assert turns.admits_long(Batch(decoding=3), 0.0)
    assert not turns.admits_long(Batch(reading=1, reading_left=0.5), 0.0)
    assert turns.wait(Batch(reading=1, reading_left=0.5), 0.0) == 0.5


def test_who_comes_after_a_long_one_waits_for_its_turn() -> None:
    turns = ReadingTurns()
    assert turns.admits(Batch(reading=2), 5.0, came=4.0, long_came=4.5)
    assert not turns.admits(Batch(reading=2), 5.0, came=5.0, long_came=4.5)


def test_after_a_turn_all_who_have_come_are_admitted_before_the_next() -> None:
    turns = ReadingTurns()
    turns.ended(began=10.0, now=12.0)
    assert turns.admits(IDLE, 12.0, came=11.9, long_came=10.5)
    assert not turns.admits_long(IDLE, 12.0, others_came=11.9)
    assert not turns.admits(Batch(reading=1), 12.1, came=12.05, long_came=10.5), "it has come too late for this turn"
    assert turns.admits_long(IDLE, 12.1, others_came=12.05), "all who had come are served"
    assert not turns.admits(IDLE, 12.0 + 2.0 * SHARE, came=11.9, long_came=10.5), "its share of time is over"


def test_answers_have_their_share_of_time() -> None:
    turns = ReadingTurns()
    turns.ended(began=10.0, now=12.0)
    answers = Batch(decoding=2)
    ends = 12.0 + 2.0 * SHARE
    assert not turns.admits_long(answers, ends - 0.01)
    assert turns.changes_at(answers, 12.0) == ends
    assert turns.admits_long(answers, ends)
    assert turns.admits_long(IDLE, 12.01), "there is no answer to wait for"
    turns.ended(began=0.0, now=1000.0)
    assert turns.share_ends == 1000.0 + LONGEST_SHARE


def test_what_takes_too_long_does_not_keep_all_others_out_for_ever() -> None:
    turns = ReadingTurns()
    assert turns.changes_at(LONG_READS, 101.0) == 100.0 + LIMIT
    for reading in range(JOINERS + 2):
        batch = Batch(reading=reading, longs=1, long_since=100.0, long_left=60.0)
        assert turns.admits(batch, 100.0 + LIMIT, came=101.0) == (reading < JOINERS)
        assert not turns.admits_long(batch, 100.0 + LIMIT)


# -- a replica that reads and writes -----------------------------------------------------------------------------------


@dataclass(order=True)
class Event:
    at: float
    number: int
    what: str = field(compare=False)
    who: "Asks" = field(compare=False)


@dataclass(eq=False)
class Asks:
    """One request: when it comes, and how long its reading and its answer take."""

    came: float
    reads: float
    writes: float
    long: bool
    admitted: float = math.nan
    read: float = math.nan


class Simulated:
    """One replica with as many slots as are needed, and its queue."""

    def __init__(self, asked: list[Asks]) -> None:
        self.turns, self.now, self.number = ReadingTurns(), 0.0, 0
        self.waiting: list[Asks] = []
        self.reading: set[Asks] = set()
        self.writing: set[Asks] = set()
        self.events: list[Event] = []
        for one in asked:
            self.later(one.came, "comes", one)

    def later(self, at: float, what: str, who: Asks) -> None:
        self.number += 1
        heapq.heappush(self.events, Event(at, self.number, what, who))

    def batch(self) -> Batch:
        longs = [one for one in self.reading if one.long]
        since = min((one.admitted for one in longs), default=math.inf)
        return Batch(len(self.reading) - len(longs), 0.0, len(longs), since, 0.0, len(self.writing))

    def admits(self, one: Asks) -> bool:
        longs = min((other.came for other in self.waiting if other.long and other is not one), default=math.inf)
        others = min((other.came for other in self.waiting if not other.long), default=math.inf)
        if one.long:
            return self.turns.admits_long(self.batch(), self.now, others_came=others)
        return self.turns.admits(self.batch(), self.now, came=one.came, long_came=longs)

    def dispatch(self) -> None:
        for one in [*self.waiting, *self.waiting]:
            if one in self.waiting and self.admits(one):
                self.waiting.remove(one)
                joins_long = any(other.long for other in self.reading)
                assert not joins_long or self.now >= self.batch().long_since + LIMIT
                assert not (one.long and self.reading), "a long prompt is read alone"
                one.admitted = self.now
                self.reading.add(one)
                self.later(self.now + one.reads, "read", one)
        at = self.turns.changes_at(self.batch(), self.now)
        if self.waiting and at is not None:
            self.later(at, "alarm", self.waiting[0])

    def run(self) -> None:
        while self.events:
            event = heapq.heappop(self.events)
            self.now, one = max(self.now, event.at), event.who
            if event.what == "comes":
                self.waiting.append(one)
            elif event.what == "read":
                self.reading.discard(one)
                self.writing.add(one)
                one.read = self.now
                if one.long:
                    self.turns.ended(one.admitted, self.now)
                self.later(self.now + one.writes, "ends", one)
            elif event.what == "ends":
                self.writing.discard(one)
            self.dispatch()
        assert not self.waiting, "nobody starves"


SHORT_READ, LONG_READ = 0.5, 8.0  # at most
REQUESTS = st.lists(
    st.tuples(st.floats(0.0, 20.0), st.floats(0.01, 1.0), st.floats(0.0, 10.0), st.booleans()), min_size=1, max_size=40
)


@settings(deadline=None, max_examples=50)
@given(REQUESTS)
def test_nobody_starves_and_each_wait_is_bounded(requests: list[tuple[float, float, float, bool]]) -> None:
    asked = [
        Asks(came, share * (LONG_READ if long else SHORT_READ), writes, long) for came, share, writes, long in requests
    ]
    Simulated(asked).run()
    longs = sum(one.long for one in asked)
    for one in asked:
        waited = one.admitted - one.came
        before = sum(other.long and other.came <= one.came for other in asked)
        if one.long:  # for those that came before it, each with a turn of the others after it
            assert waited <= (before + 1) * (LONG_READ + LONGEST_SHARE + 2 * SHORT_READ) + 0.1
        else:  # for one turn, or for two: one that was about to begin when it came, and its end
            assert waited <= 2 * LONG_READ + LONGEST_SHARE + 2 * SHORT_READ + 0.1
    assert longs == 0 or any(one.long and not math.isnan(one.read) for one in asked)

"""The memory gate of one replica: what it knows of the requests in flight, and what running out of memory teaches."""

import random
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.admission.batch import Member, peak
from backends.admission.growth import Stop
from backends.admission.inflight import InFlight
from backends.admission.lease import Lease
from backends.admission.limiter import ConcurrencyLimiter
from backends.admission.memory_gate import MemoryGate, member
from backends.diagnosis.suspects import RequestProgress
from backends.domain.inflight_limit import InflightLimit
from backends.domain.report import EngineReport
from backends.domain.work import Work
from backends.memory.kv_cost import KvCost
from backends.upstream.exchange import ExchangeError, Fault, Request
from tests.backends.admission.test_pool import Life, Replica

COST = KvCost(per_token=1000, layers=16, step=256)
WINDOWED = KvCost(per_token=1000, windowed=3000, window=1024, windows=8, layers=16, step=256)


class Gate(MemoryGate):
    def __init__(self, room: int | None, cost: KvCost | None = COST) -> None:
        self.now = 0.0
        self.flight = InFlight()
        self.told_by_engine: EngineReport | None = None
        super().__init__(
            self.flight,
            cost=lambda: cost,
            room=lambda: room,
            clock=lambda: self.now,
            report=lambda: self.told_by_engine,
        )

    def admit(self, work: Work, progress: RequestProgress | None = None, pieces: int = 0) -> Lease:
        lease = Lease(Replica(), Life(), 0.0)
        lease.work, lease.progress = work, progress or RequestProgress(work.prompt_tokens)
        lease.open(Request("POST", "/")).pieces = pieces
        self.flight.add(lease)
        return lease


def test_the_first_always_fits_and_the_next_as_long_as_the_batch_does() -> None:
    gate = Gate(10_000_000)
    assert gate.fits(Work(1_000_000, 10, 10))
    gate.admit(Work(4000, 100, 100))
    assert gate.fits(Work(100, 100, 100))
    assert not gate.fits(Work(6000, 100, 100))
    assert gate.shortage(Work(100, 100, 100)) is None
    short = gate.shortage(Work(6000, 100, 100))
    assert short is not None
    assert (short.members, short.room) == (2, 10_000_000)
    assert short.need == peak(COST, [Member(4000, 100), Member(6000, 100)])


def test_the_likely_answer_counts_not_the_allowed_one() -> None:
    gate = Gate(10_000_000)
    gate.admit(Work(1000, 100_000, 200))
    assert gate.fits(Work(1000, 100_000, 200))
    assert not gate.fits(Work(1000, 100_000, 100_000))


def test_nothing_known_everything_fits() -> None:
    for gate in (Gate(None), Gate(1, cost=None)):
        gate.admit(Work(1_000_000))
        assert gate.fits(Work(1_000_000))


def test_an_answer_that_gets_longer_than_was_likely() -> None:
    gate = Gate(None)
    written = RequestProgress(100, decoding=True)
    assert member(gate.admit(Work(100, 8000, 200), written, pieces=150)).likely == 200
    grown = member(gate.admit(Work(100, 8000, 200), written, pieces=1000))
    assert (grown.written, grown.decoding) == (1000, True)
    assert 1200 < grown.likely < 1400
    assert member(gate.admit(Work(100, 1010, 200), written, pieces=1000)).likely == 1010
    assert member(gate.admit(Work(100, 0, 0), written, pieces=1000)).end > 1100


def test_after_a_crowd_ran_out_of_memory_less_fits_and_then_more_again() -> None:
    gate = Gate(14_000_000)
    for _ in range(2):
        gate.admit(Work(2000, 10, 10))
    assert gate.fits(Work(2000, 10, 10))
    gate.ran_out()
    assert not gate.fits(Work(2000, 10, 10))
    assert (gate.room or 0) < (gate.need or 0)
    for _ in range(100):
        gate.now += 60.0
        gate.answered()
    assert gate.room == 14_000_000


def test_one_that_was_alone_teaches_nothing_of_crowds() -> None:
    gate = Gate(10_000_000)
    gate.admit(Work(2000, 10, 10))
    gate.ran_out()
    assert gate.room == 10_000_000


def test_a_crowd_of_unknown_room() -> None:
    gate = Gate(None)
    for _ in range(4):
        gate.admit(Work(2000, 10, 10))
    gate.ran_out()
    assert not gate.fits(Work(2000, 10, 10))


def test_the_longest_prompt_that_fits_alone() -> None:
    gate = Gate(None)
    assert gate.prompt_bound(None) is None
    bound = gate.prompt_bound(10_000_000)
    assert bound is not None
    assert peak(COST, [Member(bound.tokens, 1)]) <= 11_500_000 < peak(COST, [Member(bound.tokens + 256, 1)])
    assert gate.prompt_bound(5_000_000) == bound, "other programs may take memory for a while"
    assert gate.prompt_bound(0) == bound
    assert Gate(None, cost=None).prompt_bound(10) is None


def test_a_batch_that_grows_is_stopped_but_not_what_nobody_said_how_to_stop() -> None:
    gate = Gate(6_000_000)
    written = RequestProgress(100, decoding=True)
    leases = [gate.admit(Work(100, 8000, 200), written, pieces=500) for _ in range(4)]
    assert gate.growing(gate.room) == []
    for lease in leases:
        lease.exchange.pieces = 2000  # type: ignore[union-attr]
    assert gate.growing(gate.room) == [], "the gateway's own"
    leases[2].stop = leases[3].stop = lambda: Stop.AGAIN
    assert set(gate.growing(gate.room)) == {leases[2]} or set(gate.growing(gate.room)) == {leases[3]}, "one stays"
    leases[0].stop = lambda: Stop.REPLAY
    assert set(gate.growing(gate.room)) == set(leases[2:])
    for lease in leases[2:]:
        lease.abort(ExchangeError(Fault.CROWDED, "its batch grows"))
    assert gate.growing(gate.room) == [], "they have not left the batch yet, but will"


@given(
    st.lists(
        st.tuples(st.sampled_from(["come", "come", "come", "begin", "end", "out"]), st.integers(0, 2000)), max_size=120
    )
)
@settings(max_examples=50, deadline=None)
def test_with_the_limit_of_the_engine_whatever_happens(steps: list[tuple[str, int]]) -> None:
    """As one replica with ``max_inflight: auto``: never more than the engine takes at once, never beyond the memory,
    one always; and all of it again some time after memory has run out."""
    room = 50_000_000
    gate = Gate(room)
    limiter = ConcurrencyLimiter(lambda: InflightLimit(32, "", unread=8), lambda: 0.0, lambda: None)
    limiter.inflight = gate.flight
    for step, number in steps:
        leases = sorted(gate.flight.leases, key=lambda lease: lease.admitted)
        work = Work(number, 2 * number, number)
        gate.now += 1.0
        if step == "come":
            may = limiter.free and gate.fits(work)
            assert may or leases, "an idle replica takes whatever comes"
            if may:
                gate.admit(work).admitted = gate.now
        elif step == "out":
            gate.ran_out()
            for lease in leases:
                gate.flight.discard(lease)
        elif leases:
            lease = leases[number % len(leases)]
            lease.report(RequestProgress(lease.work.prompt_tokens, prompt_read=True))
            if step == "end":
                gate.flight.discard(lease)
                gate.answered()
        unread = sum(not lease.progress.begun for lease in gate.flight.leases)
        assert len(gate.flight) <= 32
        assert unread <= 8
        assert 1 <= (gate.room or 0) <= room
        assert step != "come" or len(gate.flight) < 2 or (gate.need or 0) <= room
    for _ in range(121):
        gate.now += 31.0
        gate.answered()
    assert gate.room == room


@pytest.mark.parametrize("cost", [COST, KvCost(per_token=1000, layers=16, activations=20_000), WINDOWED])
@pytest.mark.parametrize("hit", [0.0, 0.9])
def test_who_was_admitted_is_not_stopped_at_once(cost: KvCost, hit: float) -> None:
    """``hit``: share of a prompt that is in the prompt cache, at most."""
    chance = random.Random(5)
    for _ in range(15):
        gate = Gate(chance.randrange(10_000_000, 200_000_000), cost)
        for _ in range(20):
            tokens, answer = chance.randrange(1, 8000), chance.randrange(1, 1000)
            cached = int(chance.random() * hit * tokens)
            if gate.fits(Work(tokens, answer, answer), partial(int, cached)):
                lease = gate.admit(Work(tokens, answer, answer), RequestProgress(tokens))
                lease.cached, lease.stop = cached, lambda: Stop.AGAIN
                assert gate.growing(gate.room) == []
            elif (lease := chance.choice(list(gate.flight.leases))).progress.begun:
                gate.flight.discard(lease)
            else:
                lease.report(RequestProgress(lease.prompt_tokens, decoding=True, read=lease.prompt_tokens))


def report(*, reading: int = 0, decoding: int = 0, longest: int = 0) -> EngineReport:
    return EngineReport(0, 0, 0, reading=reading, decoding=decoding, longest=longest)


def test_what_the_engine_holds_beyond_what_is_known_takes_room() -> None:
    gate = Gate(10_000_000)
    gate.admit(Work(1000, 100, 100))
    assert gate.fits(Work(1000, 100, 100))
    gate.told_by_engine = report(decoding=2, longest=4000)
    assert not gate.fits(Work(1000, 100, 100)), "one that was given up is still at work"
    assert gate.doubted
    gate.told_by_engine = report(reading=1, longest=1000)
    assert gate.fits(Work(1000, 100, 100))


def test_an_answer_that_grows_unseen_is_stopped_before_it_is_too_long() -> None:
    gate = Gate(6_000_000)
    written = RequestProgress(100, decoding=True)
    leases = [gate.admit(Work(100, 8000, 200), written, pieces=3) for _ in range(2)]
    for lease in leases:
        lease.stop = lambda: Stop.AGAIN
    gate.told_by_engine = report(decoding=2, longest=110)
    assert gate.growing(gate.room) == []
    gate.told_by_engine = report(decoding=2, longest=3000)
    assert len(gate.growing(gate.room)) == 1
    assert gate.soon(6_000_000) is not None
    assert gate.soon(60_000_000) is None

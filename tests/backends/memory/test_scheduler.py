"""Who may be loaded, and who has to go: with tenants that do as they are told, and a clock that the test moves."""

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.domain.failure import Aftermath, Cause, Reason
from backends.domain.spec import BackendSpec, Launch
from backends.domain.state import State
from backends.memory.eviction import (
    MIN_RELEASE,
    MIN_RESIDENCY,
    MIN_WAIT_TO_EVICT_BUSY,
    MIN_WAIT_TO_REFUSE,
    RELEASE_PATIENCE,
    Claim,
    Evict,
    Grant,
    Holding,
    Memory,
    Refuse,
    Release,
    Released,
    Wait,
    Withdraw,
    decide,
)
from backends.memory.learned_sizes import high_water_marks, idle_sizes
from backends.memory.occupancy import LONGEST_WAIT, Holder, Occupancies, Occupancy, Place
from backends.memory.past_lives import PastLives
from backends.memory.reclaim import PATIENCE, Lingering
from backends.memory.scheduler import MemoryScheduler
from backends.memory.share import Appetite
from backends.memory.shares import Shares
from backends.process.learned import Learned

GB = 10**9


class Tenant:
    """``evict`` leaves as a process does: not at once, but when the test lets it."""

    def __init__(self, house: "House", name: str, size: int | None, *, pinned: bool, index: int = 0) -> None:
        self.launch = Launch((name,))
        self.past = PastLives()
        self.pid: int | None = None
        self.spec = BackendSpec(f"{name}:{index}", name, index, "m", self.launch, on_demand=not pinned, memory=size)
        self.state = State.STOPPED
        self.clients = self.inflight = 0
        self.demand = 1
        self.failing = False
        self.recovers = self.drained_by_a_person = False
        self.memory = self.pooled = self.cached = 0
        self.working_set: int | None = None
        self.used_at = self.ready_at = 0.0
        self.waits_for = ""
        self._house = house
        self.entering: asyncio.Task[str] | None = None

    @property
    def id(self) -> str:
        return self.spec.id

    @property
    def wanted(self) -> bool:
        return self.state is not State.STOPPING and (self.spec.pinned or self.recovers or self.demand > 0)

    @property
    def pressing(self) -> bool:
        return self.spec.pinned or self.demand > 0

    @property
    def evicting(self) -> bool:
        return self.state is State.DRAINING and not self.drained_by_a_person

    def evict(self) -> None:
        self.state = State.DRAINING
        self._house.evicted.append(self.id)
        self.emptied()

    def emptied(self) -> None:
        if not self.clients and self.state is State.DRAINING:
            self.state = State.STOPPING
            self._house.leaving.append(self.id)

    def keep(self) -> None:
        if self.state is State.DRAINING:
            self.state = State.READY

    def release(self) -> None:
        """At once, as mlx does; it is measured when the test lets it."""
        self._house.released.append(self.id)
        self.pooled = 0

    def enter(self) -> "asyncio.Task[str]":
        """What it is told; "" = it may be loaded."""
        self.state = State.STARTING
        self.entering = asyncio.ensure_future(self._told())
        return self.entering

    def _waits(self, what: str) -> None:
        self.state, self.waits_for = State.WAITING_FOR_MEMORY, what

    async def _told(self) -> str:
        refused = await self._house.scheduler.enter(self, self._waits)
        if refused is None:
            self.state = State.STARTING
            return ""
        assert refused.aftermath is Aftermath.NOT_LAUNCHED
        assert (refused.reason is Reason.NO_MEMORY) == (refused.cause is Cause.LOAD_FAILURE)
        return refused.message

    def ready(self) -> None:
        self.state = State.READY
        self.demand = 0
        self.used_at = self.ready_at = self._house.now
        self._house.scheduler.changed()

    def gone(self) -> None:
        self.state = State.UNLOADED
        self._house.scheduler.left(self.id)

    async def load(self) -> None:
        assert await self.enter() == ""
        self.ready()


class House:
    def __init__(
        self,
        budget: int | None,
        *,
        available: Callable[[], int] = lambda: 0,
        estimates: dict[str, Callable[[], int | None]] | None = None,
        peaks: Learned[int] | None = None,
        occupancies: Occupancies = lambda _place, _own: None,
        shares: Shares | None = None,
    ) -> None:
        self.now = 1000.0
        self.evicted: list[str] = []
        self.released: list[str] = []
        self.leaving: list[str] = []
        self.scheduler = MemoryScheduler(
            clock=lambda: self.now,
            available=available,
            budget=budget,
            estimates=estimates,
            peaks=peaks,
            occupancies=occupancies,
            shares=shares,
        )

    def resident(self, name: str, size: int | None = GB, *, pinned: bool = False, index: int = 0) -> Tenant:
        one = Tenant(self, name, size, pinned=pinned, index=index)
        self.scheduler.join(one)
        return one


async def steps(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def look(house: House) -> None:
    """Those that wait look again."""
    house.scheduler.changed()
    await steps()


async def test_the_least_recently_used_that_is_idle_goes_and_is_gone_before_the_next_begins() -> None:
    house = House(3 * GB)
    a, b, c, d = (house.resident(name) for name in "abcd")
    for one in (a, b, c):
        await one.load()
        house.now += 1
    a.used_at = house.now
    task = d.enter()
    await look(house)
    assert house.leaving == ["b:0"]
    await look(house)
    assert house.leaving == ["b:0"], "one at a time"
    assert not task.done(), "its process is still there"
    b.gone()
    assert await task == ""


async def test_nobody_goes_who_has_requests_in_flight_or_in_line() -> None:
    house = House(2 * GB)
    a, b, c = (house.resident(name) for name in "abc")
    await a.load()
    await b.load()
    a.clients, b.demand = 1, 1
    c.enter()
    await look(house)
    assert house.leaving == []
    assert c.waits_for == "waits for other models to be unloaded"
    a.clients = 0
    await look(house)
    assert house.leaving == ["a:0"]
    a.gone()
    assert await c.entering == ""  # type: ignore[misc]
    assert c.state is State.STARTING


async def test_a_busy_one_takes_no_more_requests_when_others_have_waited_long_enough() -> None:
    house = House(GB)
    a, b = house.resident("a"), house.resident("b")
    await a.load()
    a.clients = 1
    task = b.enter()
    await look(house)
    house.now += MIN_WAIT_TO_EVICT_BUSY - 0.1
    await look(house)
    assert house.evicted == []
    house.now += 0.2
    await look(house)
    assert (house.evicted, house.leaving) == (["a:0"], [])
    a.clients, a.demand = 0, 3  # requests wait for it to come back
    a.emptied()
    await look(house)
    assert house.leaving == ["a:0"]
    a.gone()
    assert await task == ""


async def test_a_busy_one_has_its_time() -> None:
    house = House(GB)
    a, b = house.resident("a"), house.resident("b")
    await a.load()
    a.clients = 1
    b.enter()
    await look(house)
    house.now += MIN_WAIT_TO_EVICT_BUSY + 1
    a.ready_at = house.now - MIN_RESIDENCY + 0.5
    await look(house)
    assert house.evicted == []
    house.now += 0.6
    await look(house)
    assert house.evicted == ["a:0"]
    b.state = State.STOPPING
    await look(house)
    assert a.state is State.READY, "no other waits any more"


async def test_what_can_never_fit_is_told_at_once_with_the_numbers_and_nobody_goes_for_it() -> None:
    house = House(3 * 2**30)
    a, pinned = house.resident("a", 2**30), house.resident("p", 2**30, pinned=True)
    await a.load()
    await pinned.load()
    big = house.resident("big", 5 * 2**29)
    said = await asyncio.wait_for(big.enter(), 0.1)
    assert "big:0 needs about 2.5 GiB, and 1.0 GiB of the budget of 3.0 GiB are left" in said
    assert "a:0 1.0 GiB, p:0 1.0 GiB" in said
    assert house.leaving == []


async def test_one_that_has_to_stay_makes_others_go_but_is_never_asked_to() -> None:
    house = House(2 * GB)
    pinned, a, b = house.resident("p", pinned=True), house.resident("a"), house.resident("q", pinned=True)
    pinned.demand = 0
    await pinned.load()
    await a.load()
    task = b.enter()
    await look(house)
    assert house.leaving == ["a:0"]
    a.gone()
    assert await task == ""
    b.ready()
    a.demand = 1
    assert "needs about" in await a.enter()


async def test_no_second_replica_and_no_model_that_only_fails_makes_others_go() -> None:
    house = House(2 * GB)
    a, b, second, unlucky = house.resident("a"), house.resident("b"), house.resident("a", index=1), house.resident("u")
    await a.load()
    await b.load()
    assert "a:1 needs about" in await second.enter()
    unlucky.failing = True
    assert "u:0 needs about" in await unlucky.enter()
    assert house.leaving == []


async def test_one_loads_at_a_time_unless_there_is_room_for_twice_as_much() -> None:
    house = House(4 * GB)
    a, b, c, d = (house.resident(name) for name in "abcd")
    assert await a.enter() == ""
    assert await b.enter() == "", "3 GB are free, and it needs 1"
    assert await c.enter() == "", "2 GB are free, and it needs 1"
    task = d.enter()
    await look(house)
    assert not task.done()
    assert d.waits_for == "waits for its turn to load"
    a.ready()
    b.ready()
    await look(house)
    assert not task.done()
    c.ready()
    assert await task == ""


async def test_they_load_in_the_order_in_which_they_came() -> None:
    house = House(2 * GB)
    a, b, c = (house.resident(name) for name in "abc")
    await a.load()
    a.clients = 1
    large = house.resident("l", 2 * GB)
    order = [large.enter(), b.enter(), c.enter()]
    await look(house)
    assert not any(task.done() for task in order), "b would fit, but it is not its turn"
    a.clients = 0
    await look(house)
    a.gone()
    assert await order[0] == ""
    assert not order[1].done()


async def test_a_load_that_nobody_waits_for_any_more_is_given_up() -> None:
    house = House(GB)
    a, b = house.resident("a"), house.resident("b")
    await a.load()
    a.clients = 1
    task = b.enter()
    await look(house)
    b.demand = 0
    await look(house)
    assert "no request waits for it" in await task
    c = house.resident("c")
    c.enter()
    await look(house)
    c.state = State.STOPPING
    await look(house)
    assert "told to stop" in await c.entering  # type: ignore[misc]


async def test_a_load_in_progress_that_nobody_waits_for_any_more_makes_room_for_the_next() -> None:
    house = House(GB)
    a, b = house.resident("a"), house.resident("b")
    assert await a.enter() == ""
    task = b.enter()
    await look(house)
    assert (house.leaving, b.waits_for) == ([], "waits for its turn to load")
    a.demand = 0
    await look(house)
    assert house.leaving == ["a:0"]
    await look(house)
    assert house.leaving == ["a:0"], "one at a time"
    assert not task.done(), "its process is still there"
    a.gone()
    assert await task == ""


async def test_a_load_that_nobody_waits_for_goes_on_unless_another_is_needed_now() -> None:
    house = House(GB)
    a, b = house.resident("a"), house.resident("b")
    assert await a.enter() == ""
    a.demand = b.demand = 0
    b.recovers = True
    task = b.enter()
    await look(house)
    assert house.leaving == []
    a.gone()
    assert await task == ""


async def test_what_is_needed_now_loads_before_what_is_not() -> None:
    house = House(GB)
    a, spare, b = (house.resident(name) for name in "asb")
    assert await a.enter() == ""
    spare.demand, spare.recovers = 0, True
    order = [spare.enter(), b.enter()]
    await look(house)
    a.gone()
    assert await order[1] == ""
    assert not order[0].done()
    assert not house.scheduler.has_room(house.resident("c", 0)), "others wait"
    b.gone()
    assert await order[0] == ""


async def test_room_is_what_can_be_had_without_an_eviction() -> None:
    house = House(2 * GB)
    a, b, c = (house.resident(name) for name in "abc")
    await a.load()
    assert house.scheduler.has_room(b)
    await b.load()
    assert not house.scheduler.has_room(c)
    assert house.leaving == []


async def test_what_the_machine_can_give_is_measured_again_before_it_is_refused() -> None:
    free = [GB // 2]
    house = House(None, available=lambda: free[0])
    a = house.resident("a")
    task = a.enter()
    await look(house)
    assert not task.done()
    free[0] = 2 * GB
    await look(house)
    assert await task == ""
    a.memory = GB // 4
    assert house.scheduler.free() == 2 * GB - 3 * GB // 4, "what it has not taken yet is its own all the same"
    b = house.resident("b", 3 * GB)
    task = b.enter()
    house.now += MIN_WAIT_TO_REFUSE
    await look(house)
    a.ready()
    await look(house)
    house.now += MIN_WAIT_TO_REFUSE
    await look(house)
    assert "of what the machine can give now are left" in await task


async def test_one_that_takes_more_than_it_should_counts_with_what_it_takes() -> None:
    house = House(3 * GB)
    a = house.resident("a")
    await a.load()
    a.memory = 2 * GB
    assert house.scheduler.free() == GB
    a.gone()
    assert house.scheduler.free() == 3 * GB


@pytest.mark.parametrize(
    ("says", "seen", "estimated", "counts"),
    [(5, 3, 2, 5), (None, 3, 2, 3), (None, None, 2, 2), (None, None, None, 0)],
)
def test_what_the_operator_says_beats_what_was_seen_and_that_the_estimate(
    says: int | None, seen: int | None, estimated: int | None, counts: int
) -> None:
    peaks = high_water_marks()
    house = House(GB, estimates={"a": lambda: estimated}, peaks=peaks)
    a = house.resident("a", says)
    if seen is not None:
        peaks.note(a.launch, seen)
    assert house.scheduler.needs(a)[0] == counts
    assert house.scheduler.needs(house.resident("unheard of", None))[0] == 0


async def test_one_that_took_more_once_than_there_is_today_is_let_in_where_the_estimate_fits() -> None:
    peaks = high_water_marks()
    house = House(3 * GB, estimates={"a": lambda: 2 * GB}, peaks=peaks)
    a, b = house.resident("a", None), house.resident("b")
    peaks.note(a.launch, 4 * GB)
    await b.load()
    assert await a.enter() == ""
    assert house.leaving == [], "2 GB were left"
    a.gone()
    b.gone()
    pinned = house.resident("p", pinned=True)
    await pinned.load()
    a.demand = 1
    assert await a.enter() == "", "2 GB are left"
    a.gone()
    other = house.resident("q", pinned=True)
    await other.load()
    a.demand = 1
    assert "a:0 needs about 3.7 GiB" in await a.enter()


async def test_what_a_person_drains_for_hours_holds_up_no_eviction() -> None:
    house = House(2 * GB)
    a, z, x = (house.resident(name) for name in "azx")
    await a.load()
    await z.load()
    a.clients = z.clients = 1
    z.state, z.drained_by_a_person = State.DRAINING, True
    x.enter()
    await look(house)
    house.now += MIN_WAIT_TO_EVICT_BUSY + 1
    await look(house)
    assert house.evicted == ["a:0"]


async def test_what_can_never_fit_is_told_at_once_also_while_another_leaves() -> None:
    house = House(2 * GB)
    a, huge, small = house.resident("a"), house.resident("h", 3 * GB), house.resident("s", GB // 2)
    await a.load()
    a.clients = 1
    a.evict()
    assert "h:0 needs about" in await asyncio.wait_for(huge.enter(), 0.1)
    assert await asyncio.wait_for(small.enter(), 0.1) == ""


async def test_memory_that_comes_back_late_is_waited_for() -> None:
    free = [0]
    house = House(None, available=lambda: free[0])
    free[0] = 2 * GB
    a, b = house.resident("a", 2 * GB), house.resident("b", 2 * GB)
    await a.load()
    a.memory, free[0] = 2 * GB, 0
    a.clients = 1
    task = b.enter()
    await look(house)
    house.now += MIN_WAIT_TO_EVICT_BUSY + 1
    await look(house)
    assert house.evicted == ["a:0"]
    a.clients, a.memory = 0, 0
    a.emptied()
    a.gone()
    await look(house)
    assert not task.done(), "the process is gone, and the system has not said so yet"
    free[0] = 2 * GB
    await look(house)
    assert await task == ""


async def test_a_model_that_comes_back_without_a_request_evicts_no_other() -> None:
    house = House(GB)
    a, b = house.resident("a"), house.resident("b")
    await b.load()
    a.demand, a.recovers = 0, True
    assert "no request waits" in await asyncio.wait_for(a.enter(), 0.1)
    assert house.evicted == []
    b.state = State.STOPPING
    b.gone()
    assert await asyncio.wait_for(a.enter(), 0.1) == "", "there is memory for it"


async def test_one_that_is_about_to_leave_is_waited_for_before_another_is_told_to() -> None:
    house = House(2 * GB)
    a, b, c = (house.resident(name) for name in "abc")
    await a.load()
    await b.load()
    a.clients = 1
    a.evict()
    a.clients = 0  # what is in flight is the gateway's own test
    c.enter()
    await look(house)
    assert house.evicted == ["a:0"]


async def test_only_what_the_scheduler_evicted_is_kept() -> None:
    house = House(3 * GB)
    a, b = house.resident("a"), house.resident("b")
    await a.load()
    a.state = State.DRAINING  # to be recycled
    await b.load()
    assert a.state is State.DRAINING


# -- the decision, for any values --------------------------------------------------------------------------------------

SIZES = st.integers(0, 8)
holding = st.builds(
    Holding,
    id=st.uuids().map(str),
    model=st.sampled_from("abcd"),
    charge=SIZES,
    state=st.sampled_from([State.STARTING, State.WAITING_FOR_MEMORY, State.READY, State.DRAINING, State.STOPPING]),
    evictable=st.booleans(),
    evicting=st.booleans(),
    inflight=st.integers(0, 2),
    demand=st.booleans(),
    used_at=st.floats(0, 100),
    ready_at=st.floats(0, 100),
    spare=st.sampled_from([0, MIN_RELEASE - 1, MIN_RELEASE, 3 * MIN_RELEASE]),
)
claim = st.builds(
    Claim,
    id=st.just("m:0"),
    model=st.sampled_from("abcd"),
    pinned=st.booleans(),
    need=SIZES,
    least=SIZES,
    waited=st.floats(0, 20),
    wanted=st.booleans(),
    pressing=st.booleans(),
    failing=st.booleans(),
).filter(lambda one: one.least <= one.need)


released = st.builds(Released, first=st.floats(0, 5), last=st.floats(0, 5), promised=st.integers(0, 5 * MIN_RELEASE))
memory = st.builds(
    Memory,
    free=SIZES,
    budget=st.sampled_from([None, 100]),
    settled=st.floats(0, 10),
    released=st.none() | released,
)


@given(claim, st.lists(holding, max_size=5), memory, st.booleans())
def test_what_every_decision_keeps(one: Claim, holdings: list[Holding], memory: Memory, its_turn: bool) -> None:
    free = memory.free
    decision = decide(one, holdings, memory, its_turn=its_turn, now=100.0)
    loading = any(other.state in (State.STARTING, State.WAITING_FOR_MEMORY) for other in holdings)
    match decision:
        case Withdraw():
            assert not (one.wanted and one.pressing)
        case Grant(size=size):
            assert one.least <= size <= free, "what is granted is there"
            assert size in (one.need, one.least)
            assert its_turn or 2 * size <= free, "no claim is overtaken for memory that it could use"
            assert not loading or 2 * size <= free
        case Evict(id=victim):
            other = next(other for other in holdings if other.id == victim)
            assert other.evictable
            assert other.model != one.model
            assert one.pressing
            assert not one.failing
            assert its_turn
            assert all(each.state is not State.STOPPING for each in holdings if each.evictable), "one at a time"
            if other.state is not State.READY:
                assert other.state in (State.STARTING, State.WAITING_FOR_MEMORY)
                assert not other.pressing, "a load that no request waits for"
                return
            assert not loading, "what a load will take is counted first"
            if other.inflight or other.demand:
                assert one.waited >= MIN_WAIT_TO_EVICT_BUSY
                assert 100.0 - other.ready_at >= MIN_RESIDENCY
            assert memory.released is not None or not _spare(holdings), "it is released first"
            waited = memory.released is not None and memory.released.first >= RELEASE_PATIENCE
            assert waited or _spare(holdings) < one.least - free, "nobody goes where it would have been enough"
        case Release(ids=ids):
            assert one.pressing
            assert its_turn
            assert not loading
            assert one.least > free
            assert set(ids) == {other.id for other in holdings if other.spare >= MIN_RELEASE}
            assert memory.released is None or memory.released.first < RELEASE_PATIENCE, "it ends"
        case Refuse(message=message):
            going = sum(other.charge for other in holdings if other.evictable and other.model != one.model)
            assert one.least > free
            assert one.need > free + going or one.failing or _same_model(one, holdings)
            assert memory.released is not None or not _spare(holdings), "it is released first"
            assert "m:0 needs about" in message
        case Wait(what=what):
            assert what.startswith("waits for")


def _spare(holdings: list[Holding]) -> int:
    return sum(other.spare for other in holdings if other.spare >= MIN_RELEASE)


def _same_model(one: Claim, holdings: list[Holding]) -> bool:
    return any(other.model == one.model for other in holdings)


# -- memory that is released, or not back yet --------------------------------------------------------------------------


async def test_a_pool_is_released_and_nobody_is_unloaded_for_it() -> None:
    house = House(3 * GB)
    a, pinned, b = house.resident("a"), house.resident("p", pinned=True), house.resident("b")
    await a.load()
    await pinned.load()
    pinned.memory, pinned.pooled = 2 * GB, GB
    task = b.enter()
    await look(house)
    assert house.released == ["p:0"]
    assert b.waits_for == "waits for other models to release memory that they do not use"
    house.now += 1  # it is not measured yet, and the pool is empty already
    await look(house)
    assert not task.done()
    pinned.memory = GB
    await look(house)
    assert await task == ""
    assert house.evicted == []


async def test_a_pool_that_does_not_show_is_waited_for_no_longer_than_that() -> None:
    """The process hangs, or the buffers are in use again."""
    house = House(2 * GB)
    a, pinned, b = (house.resident(name, GB // 2, pinned=name == "p") for name in "apb")
    await a.load()
    await pinned.load()
    pinned.memory, pinned.pooled = 3 * GB // 2, GB
    b.enter()
    await look(house)
    for _ in range(9):
        pinned.pooled = GB
        assert house.evicted == []
        house.now += 0.35
        await look(house)
    assert len(house.released) > 1, "what a prompt cache gave back is in the pool first"
    assert house.evicted == ["a:0"]


async def test_a_pool_that_is_not_enough_is_released_too_and_does_not_delay() -> None:
    house = House(2 * GB)
    a, b = house.resident("a"), house.resident("b", 2 * GB)
    await a.load()
    a.memory, a.pooled = GB + (100 << 20), 100 << 20
    b.enter()
    await look(house)
    assert (house.released, house.evicted) == (["a:0"], [])
    await look(house)
    assert house.evicted == ["a:0"]


async def test_a_load_is_not_refused_for_what_a_pinned_model_can_spare() -> None:
    house = House(2 * GB)
    pinned, b = house.resident("p", pinned=True), house.resident("b")
    await pinned.load()
    pinned.memory, pinned.pooled = 2 * GB, GB
    task = b.enter()
    await look(house)
    pinned.memory = GB
    await look(house)
    assert await task == ""


async def test_memory_of_a_process_that_has_ended_is_held_until_the_machine_has_it_back() -> None:
    free = 10 * GB
    house = House(3 * GB, available=lambda: free)
    a, b = house.resident("a", 2 * GB), house.resident("b", 2 * GB)
    await a.load()
    free = GB
    house.scheduler.left(a.id, Lingering(needed=2 * GB, size=2 * GB, until=house.now + PATIENCE))
    task = b.enter()
    await look(house)
    assert b.waits_for == "waits for other models to be unloaded"
    free = 3 * GB
    await look(house)
    assert await task == ""


async def test_memory_that_does_not_come_back_is_given_up_and_does_not_keep_its_own_replica() -> None:
    house = House(3 * GB, available=lambda: GB)
    a, b = house.resident("a", 2 * GB), house.resident("b", 2 * GB)
    house.scheduler.left(a.id, Lingering(needed=2 * GB, size=2 * GB, until=house.now + PATIENCE))
    assert house.scheduler.has_room(a), "its launch waits for it, and says so"
    task = b.enter()
    await look(house)
    assert not task.done()
    house.now += PATIENCE
    await look(house)
    assert await task == ""


def sharing(budget: int | None, *, available: Callable[[], int] = lambda: 0) -> Shares:
    """Of models that need 1 GB each."""
    wants = Appetite(base=GB // 2, sequence=GB // 2, token=1e5)
    return Shares(
        total=100 * GB,
        available=available,
        budget=budget,
        appetites=dict.fromkeys("abp", lambda: wants),
        peaks=high_water_marks(),
        bases=idle_sizes(),
    )


async def test_who_waits_has_a_share_and_what_others_have_cached_beyond_theirs_is_given_back() -> None:
    house = House(10 * GB, shares=sharing(10 * GB))
    pinned, b = house.resident("p", None, pinned=True), house.resident("b", None)
    await pinned.load()
    alone = house.scheduler.share(pinned)
    assert alone.total == 9 * GB, "1 GB is left free for the other"
    pinned.memory, pinned.cached = 10 * GB, 9 * GB
    task = b.enter()
    await look(house)
    assert house.released == ["p:0"]
    both = house.scheduler.share(pinned)
    assert (both.total, house.scheduler.share(b).total) == (5 * GB, 5 * GB)
    assert both.prompt_cache < alone.prompt_cache
    pinned.memory, pinned.cached = 5 * GB, 4 * GB
    await look(house)
    assert await task == ""


async def test_shares_count_what_processes_have_told_and_what_is_not_known() -> None:
    shares = sharing(None, available=lambda: 20 * GB)
    house = House(None, available=lambda: 20 * GB, shares=shares)
    a, command = house.resident("a", None, pinned=True), house.resident("x", 2 * GB)
    await a.load()
    assert house.scheduler.share(a).total == 10 * GB, "a tenth of the machine is left"
    await command.load()
    assert house.scheduler.share(a).total == 8 * GB
    a.working_set = 6 * GB
    assert house.scheduler.share(a).total == 4 * GB
    shares.bases.note(a.launch, GB // 4)
    assert house.scheduler.needs(a) == (3 * GB // 4, 3 * GB // 4)
    assert house.scheduler.share(a).base == GB // 4


async def test_a_gpu_with_its_own_memory_is_what_is_shared() -> None:
    seen = Occupancy(Place.DEVICE, total=8 * GB, available=4 * GB, own={7: 2 * GB})
    shares = sharing(None, available=lambda: 90 * GB)
    house = House(None, shares=shares, occupancies=lambda place, _own: seen if place is Place.DEVICE else None)
    a = house.resident("a", None, pinned=True)
    await house.scheduler.look_at_device()
    assert house.scheduler.share(a).total == 6 * GB


# -- memory that others hold -------------------------------------------------------------------------------------------


class Machine:
    """``available`` of ``total`` bytes, of which a process that is not ours holds ``others``."""

    def __init__(self, available: int, others: int, *, total: int = 32 * GB, place: Place = Place.MACHINE) -> None:
        self.available, self.others, self.total, self.place = available, others, total, place
        self.own: dict[int, int] = {}
        self.looks: list[tuple[Place, frozenset[int]]] = []
        self.readable = True

    def look(self, place: Place, own: frozenset[int]) -> Occupancy | None:
        self.looks.append((place, own))
        holder = Holder(4711, "hog", self.others) if self.others else None
        found = Occupancy(place, self.total, self.available, self.others, holder, self.own)
        return found if place is self.place and self.readable else None

    def house(self, budget: int | None, **more: Any) -> House:
        return House(budget, available=lambda: self.available, occupancies=self.look, **more)


def out_of_memory(tenant: Tenant, place: Place = Place.MACHINE) -> Tenant:
    tenant.past.ran_out = place
    return tenant


async def seconds(house: House, count: float) -> None:
    """The next look is due, and made."""
    house.now += count
    house.scheduler.changed()
    await steps(20)
    while looking := [look for look in house.scheduler._looking.values() if not look.done()]:
        await asyncio.wait(looking)
    await steps(20)


TOLD = "waits for memory: 954 MiB available, needs 5.6 GiB; PID 4711 (hog) holds 23.3 GiB"


@pytest.mark.parametrize("budget", [30 * GB, None])
@pytest.mark.parametrize("pinned", [False, True])
async def test_after_an_out_of_memory_it_waits_until_others_give_it_back_and_then_loads_at_once(
    budget: int | None, pinned: bool
) -> None:
    machine = Machine(GB, 25 * GB)
    house = machine.house(budget)
    a = out_of_memory(house.resident("a", 6 * GB, pinned=pinned))
    task = a.enter()
    for _ in range(5):
        await seconds(house, 100.0)
    assert not task.done()
    assert (a.state, a.waits_for) == (State.WAITING_FOR_MEMORY, TOLD)
    machine.available, machine.others = 7 * GB, 19 * GB
    house.scheduler.changed()
    assert await task == ""


async def test_a_wrong_estimate_does_not_keep_it_waiting_for_ever() -> None:
    machine = Machine(GB, 25 * GB)
    house = machine.house(30 * GB)
    task = out_of_memory(house.resident("a", 6 * GB)).enter()
    await seconds(house, 0.0)
    await seconds(house, LONGEST_WAIT - 1)
    assert not task.done()
    await seconds(house, 1)
    assert await task == ""


@pytest.mark.parametrize(("others", "need"), [(2 * GB, 6 * GB), (25 * GB, 33 * GB)])
async def test_what_nobody_else_holds_is_not_waited_for_long(others: int, need: int) -> None:
    """Or what the machine has not got."""
    house = Machine(GB, others).house(40 * GB)
    task = out_of_memory(house.resident("a", need)).enter()
    await seconds(house, 0.0)
    await seconds(house, PATIENCE - 1)
    assert not task.done()
    await seconds(house, 1)
    assert await task == ""


async def test_where_the_machine_is_the_budget_it_is_then_refused_as_a_first_start_would_be() -> None:
    house = Machine(GB, 2 * GB).house(None)
    task = out_of_memory(house.resident("a", 6 * GB)).enter()
    await seconds(house, PATIENCE)
    await seconds(house, PATIENCE)
    assert "needs about 5.6 GiB" in await task


async def test_what_was_enough_for_a_life_that_answered_is_not_waited_for() -> None:
    house = Machine(5 * GB, 25 * GB).house(30 * GB)
    a = out_of_memory(house.resident("a", 8 * GB))
    a.past.enough[Place.MACHINE] = 5 * GB
    assert await a.enter() == ""


async def test_a_configured_budget_is_not_doubted_without_an_out_of_memory() -> None:
    machine = Machine(GB, 25 * GB)
    assert await machine.house(30 * GB).resident("a", 6 * GB, pinned=True).enter() == ""
    assert machine.looks == []


async def test_nothing_waits_for_a_memory_that_cannot_be_read() -> None:
    machine = Machine(GB, 25 * GB)
    machine.readable = False
    assert await out_of_memory(machine.house(30 * GB).resident("a", 6 * GB)).enter() == ""


async def test_a_first_start_of_a_pinned_one_waits_and_a_request_for_another_is_told_at_once() -> None:
    machine = Machine(GB, 25 * GB)
    house = machine.house(None)
    a, b = house.resident("a", 6 * GB, pinned=True), house.resident("b", 6 * GB)
    waiting, refused = a.enter(), b.enter()
    await seconds(house, MIN_WAIT_TO_REFUSE)
    await seconds(house, MIN_WAIT_TO_REFUSE)
    assert "(loaded: nothing; PID 4711 (hog) holds 23.3 GiB)" in await refused
    assert a.waits_for == TOLD
    machine.available, machine.others = 7 * GB, 19 * GB
    house.scheduler.changed()
    assert await waiting == ""


async def test_it_keeps_nobody_waiting_who_fits() -> None:
    machine = Machine(3 * GB, 25 * GB)
    house = machine.house(30 * GB)
    big = out_of_memory(house.resident("big", 6 * GB, pinned=True))
    task = big.enter()
    await seconds(house, 0.0)
    small = house.resident("small", 2 * GB)
    assert house.scheduler.has_room(small)
    assert await small.enter() == ""
    assert not task.done()
    task.cancel()


async def test_an_idle_model_of_ours_goes_for_it() -> None:
    machine = Machine(5 * GB, 20 * GB)
    house = machine.house(30 * GB)
    idle, a = house.resident("idle", 2 * GB), house.resident("a", 6 * GB)
    await idle.load()
    idle.memory = 2 * GB
    task = out_of_memory(a).enter()
    await seconds(house, 0.0)
    assert house.leaving == ["idle:0"]
    machine.available += 2 * GB
    idle.gone()
    assert await task == ""


async def test_a_load_that_began_beside_it_on_the_gpu_is_counted() -> None:
    machine = Machine(8 * GB, 70 * GB, total=80 * GB, place=Place.DEVICE)
    house = machine.house(100 * GB)
    loading, a = house.resident("loading", 4 * GB, pinned=True), house.resident("a", 6 * GB)
    assert await loading.enter() == ""
    a.past.on_device = True
    task = a.enter()
    await seconds(house, 0.0)
    assert a.waits_for == "waits for its turn to load"
    loading.ready()
    machine.available = 4 * GB
    await seconds(house, 5.0)
    assert a.waits_for == (
        "waits for memory: 3.7 GiB available on the GPU, needs 5.6 GiB; PID 4711 (hog) holds 65.2 GiB"
    )
    assert {place for place, _ in machine.looks} == {Place.DEVICE}
    machine.available = 6 * GB
    await seconds(house, 5.0)
    assert await task == ""


@pytest.mark.parametrize(
    ("alive", "own", "before", "crowded"),
    [
        (False, None, None, True),
        (True, GB, None, True),  # 2 of 6 GB are there
        (True, 60 * GB, None, False),  # it holds the rest itself
        (True, None, 3 * GB, True),  # what it holds is not listed, but it began with too little
        (True, None, 60 * GB, False),
        (True, None, None, False),  # not known: not said
    ],
)
async def test_who_is_to_blame(alive: bool, own: int | None, before: int | None, crowded: bool) -> None:
    machine = Machine(GB, 70 * GB, total=80 * GB, place=Place.DEVICE)
    a = machine.house(100 * GB).resident("a", 6 * GB)
    a.pid = 5
    machine.own = {} if own is None else {5: own}
    if before is not None:
        a.past.before[Place.DEVICE] = before
    told = await a._house.scheduler.crowded_out(a, Place.DEVICE, alive=alive)
    assert ("PID 4711 (hog) holds 65.2 GiB" in told) is crowded
    assert machine.looks == [(Place.DEVICE, frozenset({5}))]
    assert await a._house.scheduler.crowded_out(a, Place.MACHINE, alive=alive) == "", "it cannot be read"


async def test_beside_another_of_ours_that_is_not_listed_nobody_is_blamed() -> None:
    machine = Machine(GB, 70 * GB, total=80 * GB, place=Place.DEVICE)
    house = machine.house(100 * GB)
    a, sibling = house.resident("a", 6 * GB), house.resident("b", 6 * GB)
    a.pid, a.past.before[Place.DEVICE] = 5, 3 * GB
    assert await house.scheduler.crowded_out(a, Place.DEVICE, alive=True)
    sibling.pid = 6
    assert await house.scheduler.crowded_out(a, Place.DEVICE, alive=True) == ""


@pytest.mark.parametrize(
    ("says", "estimated", "had", "needs"),
    [(5 * GB, 9 * GB, 7 * GB, 5 * GB), (None, 9 * GB, 7 * GB, 9 * GB), (None, None, 7 * GB, 7 * GB)],
)
async def test_what_it_took_of_main_memory_says_nothing_of_the_gpu(
    says: int | None, estimated: int | None, had: int, needs: int
) -> None:
    machine = Machine(needs - 1, 70 * GB, total=80 * GB, place=Place.DEVICE)
    peaks = high_water_marks()
    house = machine.house(100 * GB, estimates={"a": lambda: estimated}, peaks=peaks)
    a = house.resident("a", says)
    a.past.on_device, a.past.device_size = True, had
    peaks.note(a.launch, GB)
    task = a.enter()
    await seconds(house, 0.0)
    assert "on the GPU, needs" in a.waits_for
    machine.available = needs
    await seconds(house, 5.0)
    assert await task == ""
    assert house.scheduler.free() == 100 * GB - (says or GB), "the budget is of main memory"


async def test_what_a_sibling_holds_is_not_waited_for() -> None:
    """It keeps it: the start is tried at once."""
    machine = Machine(3 * GB, 0, total=80 * GB, place=Place.DEVICE)
    machine.own = {6: 70 * GB}
    house = machine.house(100 * GB)
    sibling, a = house.resident("a", 6 * GB, pinned=True), house.resident("a", 6 * GB, pinned=True, index=1)
    await sibling.load()
    a.past.on_device = True
    assert await a.enter() == ""


async def test_a_look_that_hangs_is_not_waited_for_and_not_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("backends.memory.scheduler.LOOK_TIMEOUT", 0.01)
    looks, over = [], threading.Event()

    def hang(place: Place, own: frozenset[int]) -> None:
        looks.append((place, own))
        over.wait(30.0)

    house = House(GB, occupancies=hang)
    assert [await house.scheduler.look(Place.DEVICE) for _ in range(3)] == [None] * 3
    assert len(looks) == 1
    over.set()


async def test_what_is_in_flight_on_the_others() -> None:
    house = House(2 * GB)
    a, b, c = (house.resident(name) for name in "abc")
    a.inflight, b.inflight, c.inflight = 1, 2, 4
    assert [house.scheduler.beside(one) for one in (a, b, c)] == [6, 5, 3]

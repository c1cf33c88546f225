"""Slots and the line for them: who is chosen, who waits, and that no slot is ever lost or given twice."""

import asyncio
import random
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from backends.admission.excluded import NOTHING, Excluded
from backends.admission.inflight import InFlight
from backends.admission.lease import Lease
from backends.admission.memory_gate import Shortage
from backends.admission.pool import Pool
from backends.admission.selection import LOAD_GAP
from backends.admission.slot_request import Isolation, SlotRequest
from backends.diagnosis.engine import EngineIdentity
from backends.diagnosis.suspects import RequestProgress
from backends.domain.engine import Engine
from backends.domain.failure import Aftermath, CallFailure, Cause, Failure
from backends.domain.inflight_limit import InflightLimit
from backends.domain.place import Place
from backends.domain.priority import Priority
from backends.domain.prompt_bound import PromptBound
from backends.domain.refusal import Refusal, Why
from backends.domain.report import EngineReport
from backends.domain.snapshot import Seat, Snapshot
from backends.domain.spec import BackendSpec, Launch
from backends.domain.state import State
from backends.domain.work import Work
from backends.upstream.exchange import Dialer, Exchange, ExchangeError, Fault, Head, Offer, Request, Watcher

FOREVER = 3600.0


class Call:
    """An exchange that only remembers."""

    def __init__(self) -> None:
        self.last_heard = 5.0
        self.pieces = 0
        self.waiting_since = 1.0
        self.working = False
        self.local_port = 0
        self.aborted: ExchangeError | None = None
        self.closed = False
        self.watcher: Watcher | None = None

    async def start(self) -> Head:
        return Head(200, ())

    async def read(self, _offer: Offer | None = None) -> bytes:
        return b""

    def abort(self, error: ExchangeError) -> None:
        self.aborted = error

    def abandon(self, watcher: Watcher) -> None:
        self.watcher = watcher

    def over(self) -> None:
        """The backend closes the connection."""
        assert self.watcher is not None
        self.watcher.over()

    def close(self) -> None:
        self.closed = True


class Life:
    def __init__(self, generation: int = 1) -> None:
        self.generation = generation
        self.dialer: Dialer = self
        self.identity = EngineIdentity(BackendSpec("m:0", "m", 0, "default_model", Launch(())))
        self.asked: list[Request] = []

    def open(self, request: Request) -> Exchange:
        self.asked.append(request)
        return Call()

    async def aclose(self) -> None:
        pass

    async def diagnose(self, error: ExchangeError, lease: Lease) -> CallFailure:
        return CallFailure(Failure(Cause.KILLED, Aftermath.EXITED, error.detail, generation=self.generation))

    async def dropped_call(self, *, since: float, within: float) -> bool:
        return False


class Replica:
    """As far as the pool sees one: slots, a state, and word of each change."""

    def __init__(self, index: int = 0, *, limit: int = 1, state: State = State.READY) -> None:
        self.spec = BackendSpec(f"m:{index}", "m", index, "default_model", Launch(()), max_inflight=limit)
        self.on_change: Callable[[], None] = lambda: None
        self.demand = 0
        self.accompanied = False
        self.state = state
        self.responsive = True
        self.eta: float | None = None
        self.eta_known = True
        self.unloaded = self.loading_on_demand = self.recently_denied = False
        self.generation = 1
        self.report: EngineReport | None = None
        self.loads = self.looks = 0
        self.flight = InFlight()
        self.slots = limit
        self.unread: int | None = None
        self.most = 0
        self.now: Callable[[], float] = lambda: 0.0
        self.room = 1 << 60  # tokens

    @property
    def id(self) -> str:
        return self.spec.id

    @property
    def inflight(self) -> int:
        return len(self.flight)

    @property
    def is_up_or_starting(self) -> bool:
        return self.state in (State.READY, State.STARTING)

    @property
    def recovers(self) -> bool:
        return self.is_up_or_starting or self.state is State.BACKOFF

    def set_demand(self, queued: int, *, accompanied: bool) -> None:
        self.demand, self.accompanied = queued, accompanied

    def look_again(self) -> None:
        self.looks += 1

    def load(self) -> None:
        assert self.demand > 0, "a load is granted for the requests in line"
        self.unloaded, self.state = False, State.STARTING
        self.loads += 1

    @property
    def limit(self) -> InflightLimit:
        return InflightLimit(self.slots, "as configured", self.unread)

    def has_slot(self) -> bool:
        unread = self.unread is None or self.flight.unread < self.unread
        return self.state is State.READY and self.inflight < self.slots and unread and not self.flight.anybody_alone

    def fits(self, request: SlotRequest, share: float = 1.0) -> bool:
        """A rectangle of prompts."""
        batch = [lease.work.prompt_tokens for lease in self.flight.leases]
        return not batch or (len(batch) + 1) * max(*batch, request.work.prompt_tokens) <= share * self.room

    prompt_bound: PromptBound | None = None

    def shortage(self, request: SlotRequest) -> Shortage | None:
        return None if self.fits(request) else Shortage(self.inflight + 1, self.room + 1, self.room)

    def admit(self) -> Lease:
        assert self.has_slot()
        lease = Lease(self, Life(self.generation), self.now())
        self.flight.add(lease)
        self.most = max(self.most, self.inflight)
        return lease

    @property
    def engine(self) -> Engine:
        return self.spec.engine

    @property
    def abandoned(self) -> int:
        return self.flight.abandoned_count

    def over(self, lease: Lease) -> None:
        self.flight.over(lease)
        self.on_change()

    def released(self, lease: Lease) -> None:
        self.flight.discard(lease)
        self.on_change()

    def become(self, state: State) -> None:
        self.state = state
        self.on_change()

    def snapshot(self) -> Snapshot:
        shown = Snapshot(self.id, "m", self.state, None, None, self.inflight, 0, self.generation, 0.0, self.eta)
        return replace(shown, eta_known=self.eta_known, recovers=self.recovers)


def pool(*replicas: Replica, max_queue: int = 10, queue_timeout: float = FOREVER) -> Pool:
    return Pool(replicas, max_queue=max_queue, queue_timeout=queue_timeout)


def hasty(*replicas: Replica) -> Pool:
    """Its reservations lapse at once, and soon come again."""
    return Pool(replicas, max_queue=10, queue_timeout=FOREVER, reservations=(0.02, 0.02), pause=0.02)


def kept_free(p: Pool) -> set[str]:
    tickets = [*p._queue.alone, *p._queue.unbatchable]
    return {name for ticket in tickets for name in ticket.reserved}


def tried(*backends: str, generation: int = 1) -> Excluded:
    return Excluded(seats=frozenset(Seat(backend, generation) for backend in backends))


def refused(outcome: Lease | Refusal) -> Refusal:
    assert isinstance(outcome, Refusal)
    return outcome


def leased(outcome: Lease | Refusal) -> Lease:
    assert isinstance(outcome, Lease)
    return outcome


async def settle() -> None:
    """Let every task run until it waits for something from outside."""
    for _ in range(5):
        await asyncio.sleep(0)


async def in_line_for(p: Pool, request: SlotRequest) -> "asyncio.Task[Lease | Refusal]":
    task = asyncio.ensure_future(p.acquire(request))
    before = p.queued
    await settle()
    assert p.queued == before + 1
    return task


async def in_line(p: Pool, exclude: str = "", *, alone: bool = False) -> "asyncio.Task[Lease | Refusal]":
    isolation = Isolation.ALONE if alone else Isolation.SHARED
    request = SlotRequest(exclude=tried(exclude) if exclude else NOTHING, isolation=isolation)
    task = asyncio.ensure_future(p.acquire(request))
    before = p.queued
    await settle()
    assert p.queued == before + 1
    return task


# -- choosing --------------------------------------------------------------------------------------------------------


async def test_the_least_busy_is_chosen() -> None:
    a, b, c = replicas = [Replica(i, limit=8) for i in range(3)]
    p = pool(*replicas)
    for replica, load in ((a, 3), (b, 1), (c, 2)):
        for _ in range(load):
            replica.admit()
    assert leased(await p.acquire()).spec.id == "m:1"
    chosen = [leased(await p.acquire()).spec.id for _ in range(2)]
    assert sorted(chosen) == ["m:1", "m:2"]
    assert [r.inflight for r in (a, b, c)] == [3, 3, 3]


async def test_a_lease_knows_what_of_its_prompt_was_thought_to_be_cached() -> None:
    p = pool(Replica(limit=2))
    held = {Seat("m:0", 1): 70, Seat("m:1", 1): 90}
    assert leased(await p.acquire(SlotRequest(held=held))).cached == 70
    assert leased(await p.acquire()).cached == 0


async def test_a_prompt_that_was_read_makes_room_for_the_next_one() -> None:
    """Where a replica takes only so many prompts at a time, beside the answers that it writes."""
    one = Replica(limit=4)
    one.unread = 1
    p = pool(one)
    first = leased(await p.acquire())
    second, third = [await in_line(p) for _ in range(2)]
    first.report(RequestProgress(10, prompt_read=True))
    await settle()
    assert (second.done(), third.done()) == (True, False)
    leased(second.result()).report(RequestProgress(10, decoding=True))
    assert leased(await third).in_flight
    assert p.width == 4


@pytest.mark.parametrize("count", [1, 2, 3, 5])
async def test_equals_take_turns(count: int) -> None:
    p = pool(*[Replica(i) for i in range(count)])
    chosen = []
    for _ in range(3 * count):
        lease = leased(await p.acquire())
        chosen.append(lease.spec.id)
        lease.release()
    assert {chosen.count(f"m:{i}") for i in range(count)} == {3}
    assert chosen[:count] == chosen[count : 2 * count]


async def test_one_that_misses_its_health_checks_only_for_want_of_another() -> None:
    a, b = Replica(0, limit=2), Replica(1, limit=2)
    a.responsive = False
    p = pool(a, b)
    assert [leased(await p.acquire()).spec.id for _ in range(3)] == ["m:1", "m:1", "m:0"]


@pytest.mark.parametrize("state", [s for s in State if s is not State.READY])
async def test_only_who_is_ready_is_chosen(state: State) -> None:
    p = pool(Replica(0, state=state), Replica(1))
    assert leased(await p.acquire()).spec.id == "m:1"
    assert p.ready()
    assert not p.ready(tried("m:1"))


async def test_a_failover_never_returns_to_where_it_was() -> None:
    p = pool(Replica(0, limit=9), Replica(1, limit=1))
    assert leased(await p.acquire(SlotRequest(exclude=tried("m:0")))).spec.id == "m:1"
    assert await p.acquire(SlotRequest(exclude=tried("m:0", "m:1"))) == Refusal(Why.UNAVAILABLE, patience=FOREVER)


# -- the line --------------------------------------------------------------------------------------------------------


async def test_first_come_first_served() -> None:
    replica = Replica()
    p = pool(replica)
    held = leased(await p.acquire())
    tasks = [await in_line(p) for _ in range(4)]
    for n, task in enumerate(tasks):
        held.release()
        await settle()
        assert [t.done() for t in tasks] == [True] * (n + 1) + [False] * (3 - n)
        held = leased(await task)
    assert replica.most == 1


async def test_a_newcomer_does_not_overtake_the_line() -> None:
    replica = Replica()
    p = pool(replica)
    held = leased(await p.acquire())
    first = await in_line(p)
    held.release()  # granted to ``first``, which has not run yet
    second = asyncio.ensure_future(p.acquire())
    await settle()
    assert first.done()
    assert not second.done()
    leased(await first).release()
    leased(await second)


async def test_a_failover_is_served_before_the_line() -> None:
    a, b = Replica(0), Replica(1)
    p = pool(a, b)
    held = [leased(await p.acquire()), leased(await p.acquire())]
    waiting = await in_line(p)
    moved = await in_line(p, exclude="m:0")
    next(lease for lease in held if lease.spec.id == "m:1").release()
    await settle()
    assert moved.done()
    assert not waiting.done()
    assert leased(await moved).spec.id == "m:1"
    next(lease for lease in held if lease.spec.id == "m:0").release()
    assert leased(await waiting).spec.id == "m:0"


async def test_one_in_line_who_cannot_use_a_slot_leaves_it_to_the_next() -> None:
    a, b = Replica(0), Replica(1)
    p = pool(a, b)
    held = [leased(await p.acquire()), leased(await p.acquire())]
    moved = await in_line(p, exclude="m:0")
    waiting = await in_line(p)
    next(lease for lease in held if lease.spec.id == "m:0").release()
    await settle()
    assert not moved.done()
    assert leased(await waiting).spec.id == "m:0"
    moved.cancel()
    await settle()


async def test_a_newcomer_takes_a_slot_that_nobody_in_line_can_use() -> None:
    a, b = Replica(0), Replica(1)
    p = pool(a, b)
    b.admit()
    moved = await in_line(p, exclude="m:0")
    assert leased(await p.acquire()).spec.id == "m:0"
    assert not moved.done()
    moved.cancel()
    await settle()


async def test_the_line_is_bounded_but_not_for_failovers() -> None:
    a, b = Replica(0), Replica(1)
    p = pool(a, b, max_queue=2)
    for _ in range(2):
        leased(await p.acquire())
    tasks = [await in_line(p) for _ in range(2)]
    assert await p.acquire() == Refusal(Why.QUEUE_FULL, queued=2)
    tasks.append(await in_line(p, exclude="m:0"))
    assert p.queued == 3
    for task in tasks:
        task.cancel()
    await settle()
    assert p.queued == 0


async def test_no_line_at_all() -> None:
    p = pool(Replica(), max_queue=0)
    leased(await p.acquire())
    assert await p.acquire() == Refusal(Why.QUEUE_FULL)


@pytest.mark.parametrize(("state", "why"), [(State.READY, Why.QUEUE_TIMEOUT), (State.STARTING, Why.LOADING)], ids=str)
async def test_waiting_too_long(state: State, why: Why) -> None:
    replica = Replica()
    p = pool(replica, queue_timeout=0.01)
    leased(await p.acquire())
    replica.state = state
    assert await p.acquire() == Refusal(why, waited=0.01)
    assert p.queued == 0


async def test_a_deadline_sooner_than_the_timeout_is_kept() -> None:
    p = pool(Replica(), queue_timeout=FOREVER)
    leased(await p.acquire())
    assert await p.acquire(SlotRequest(within=0.01)) == Refusal(Why.QUEUE_TIMEOUT, waited=0.01)
    p = pool(Replica(), queue_timeout=0.01)
    leased(await p.acquire())
    assert await p.acquire(SlotRequest(within=FOREVER)) == Refusal(Why.QUEUE_TIMEOUT, waited=0.01)


async def test_a_model_that_loads_is_waited_for() -> None:
    replica = Replica(state=State.STARTING, limit=2)
    p = pool(replica)
    tasks = [await in_line(p) for _ in range(3)]
    replica.become(State.READY)
    await settle()
    assert [task.done() for task in tasks] == [True, True, False]
    tasks[2].cancel()
    await settle()


@pytest.mark.parametrize("state", [State.FAILED, State.STOPPED, State.UNREACHABLE])
async def test_all_in_line_are_told_at_once_when_nothing_is_coming(state: State) -> None:
    a, b = Replica(0), Replica(1)
    p = pool(a, b)
    for _ in range(2):
        leased(await p.acquire())
    tasks = [await in_line(p) for _ in range(3)]
    a.become(state)
    await settle()
    assert not any(task.done() for task in tasks)
    b.become(state)
    outcomes = [await task for task in tasks]
    assert [o.why for o in outcomes if isinstance(o, Refusal)] == [Why.UNAVAILABLE] * 3
    assert await p.acquire() == Refusal(Why.UNAVAILABLE, patience=FOREVER)


async def test_a_failover_with_nowhere_left_to_go_is_told_and_the_others_wait_on() -> None:
    a, b = Replica(0), Replica(1)
    p = pool(a, b)
    for _ in range(2):
        leased(await p.acquire())
    waiting = await in_line(p)
    moved = await in_line(p, exclude="m:0")
    b.become(State.FAILED)
    outcome = await moved
    assert isinstance(outcome, Refusal)
    assert (outcome.why, outcome.queued) == (Why.UNAVAILABLE, 1)
    assert not waiting.done()
    waiting.cancel()
    await settle()


# -- leaving the line ------------------------------------------------------------------------------------------------


async def test_who_leaves_the_line_is_out_of_it() -> None:
    replica = Replica()
    p = pool(replica)
    held = leased(await p.acquire())
    gone, waiting = await in_line(p), await in_line(p)
    gone.cancel()
    await settle()
    assert p.queued == 1
    held.release()
    assert leased(await waiting).spec.id == "m:0"


async def test_a_grant_and_a_cancel_in_the_same_tick_lose_no_slot() -> None:
    replica = Replica()
    p = pool(replica)
    held = leased(await p.acquire())
    gone, waiting = await in_line(p), await in_line(p)
    held.release()
    assert replica.inflight == 1, "granted"
    gone.cancel()
    await settle()
    assert gone.cancelled()
    assert leased(await waiting).spec.id == "m:0"
    assert replica.inflight == 1


async def test_a_cancel_and_a_grant_in_the_same_tick_lose_no_slot() -> None:
    replica = Replica()
    p = pool(replica)
    held = leased(await p.acquire())
    gone, waiting = await in_line(p), await in_line(p)
    gone.cancel()
    held.release()
    await settle()
    assert gone.cancelled()
    assert leased(await waiting).spec.id == "m:0"
    assert (replica.inflight, p.queued) == (1, 0)


async def test_a_refusal_and_a_cancel_in_the_same_tick() -> None:
    replica = Replica(state=State.STARTING)
    p = pool(replica)
    gone = await in_line(p)
    replica.become(State.FAILED)
    gone.cancel()
    await settle()
    assert gone.cancelled()
    assert p.queued == 0


async def test_a_cancel_and_the_timeout_in_the_same_tick() -> None:
    p = pool(Replica(state=State.STARTING))
    gone = await in_line(p)
    gone.cancel()
    (ticket,) = p._queue.others
    p._expire(ticket, 1.0)
    await settle()
    assert gone.cancelled()
    assert p.queued == 0


async def test_an_alarm_of_somebody_served_says_nothing() -> None:
    replica = Replica()
    p = pool(replica)
    held = leased(await p.acquire())
    task = await in_line(p)
    (ticket,) = p._queue.others
    held.release()
    p._expire(ticket, 1.0)
    assert leased(await task).spec.id == "m:0"


# -- who has to be alone ---------------------------------------------------------------------------------------------


async def test_it_gets_an_idle_replica_and_keeps_it_to_itself() -> None:
    p = pool(Replica(0, limit=2), Replica(1, limit=2))
    busy = leased(await p.acquire())
    alone = leased(await p.acquire(SlotRequest(isolation=Isolation.ALONE)))
    assert alone.spec.id != busy.spec.id
    assert leased(await p.acquire()).spec.id == busy.spec.id
    waiting = await in_line(p)
    alone.release()
    assert leased(await waiting).spec.id == alone.spec.id


async def test_without_one_it_waits_for_the_first_to_empty_which_takes_nobody_else() -> None:
    p = pool(Replica(0, limit=4), Replica(1, limit=4))
    held = [leased(await p.acquire()) for _ in range(3)]
    fuller = next(r for r in p.backends if r.inflight == 2).id
    alone = await in_line(p, alone=True)
    assert [leased(await p.acquire()).spec.id for _ in range(2)] == [fuller, fuller]
    other = await in_line(p)
    next(lease for lease in held if lease.spec.id != fuller).release()
    lease = leased(await alone)
    assert lease.spec.id != fuller
    await settle()
    assert not other.done()
    lease.release()
    assert leased(await other).spec.id == lease.spec.id


async def test_a_replica_that_was_kept_free_serves_the_others_once_the_client_has_left() -> None:
    p = pool(Replica(0, limit=2))
    leased(await p.acquire())
    alone, other = await in_line(p, alone=True), await in_line(p)
    alone.cancel()
    assert leased(await other).spec.id == "m:0"


async def test_its_reservation_lapses_and_comes_again_while_it_waits() -> None:
    p = hasty(Replica(0, limit=9))
    stream = leased(await p.acquire())
    alone, other = await in_line(p, alone=True), await in_line(p)
    held = leased(await other)
    assert leased(await p.acquire()).spec.id == "m:0", "nor is it kept free again at once"
    assert not alone.done(), "it waits for as long as its patience lasts"
    changed = asyncio.Event()
    p.subscribe(changed.set)
    while not kept_free(p):
        await changed.wait()
        changed.clear()
    late = await in_line(p)
    assert not late.done()
    stream.release()
    held.release()
    late.cancel()
    alone.cancel()
    await settle()


async def test_when_the_replica_that_empties_for_it_goes_another_does() -> None:
    a, b = Replica(0, limit=2), Replica(1, limit=2)
    p = pool(a, b)
    held = [leased(await p.acquire()) for _ in range(2)]
    alone = await in_line(p, alone=True)
    (kept,) = kept_free(p)
    next(r for r in (a, b) if r.id == kept).become(State.BACKOFF)
    other = next(lease for lease in held if lease.spec.id != kept)
    assert kept_free(p) == {other.spec.id}
    other.release()
    assert leased(await alone).spec.id == other.spec.id


# -- who is suspected of a shortage of memory --------------------------------------------------------------------------


async def suspect(p: Pool, size: int) -> "asyncio.Task[Lease | Refusal]":
    task = asyncio.ensure_future(
        p.acquire(SlotRequest(exclude=tried("m:0", generation=0), isolation=Isolation.APART, work=Work(size)))
    )
    await settle()
    return task


async def test_bystanders_come_first_and_then_the_suspects_one_by_one_the_smallest_first() -> None:
    only = Replica(limit=8, state=State.BACKOFF)
    only.eta = 1.0
    p = pool(only)
    suspects = {size: await suspect(p, size) for size in (900, 700, 800)}
    lone = await in_line(p, exclude="m:0", alone=True)
    bystanders = [await in_line(p, exclude="m:0") for _ in range(3)]
    newcomer = await in_line(p)
    back_again(only)
    first = [leased(await task) for task in bystanders]
    await settle()
    assert not any(task.done() for task in (*suspects.values(), lone, newcomer))
    late = leased(await p.acquire(SlotRequest(exclude=tried("m:0"))))
    for lease in (*first, late):
        lease.release()
    leased(await lone).release()
    for size in (700, 800, 900):
        lease = leased(await suspects.pop(size))
        await settle()
        assert not any(task.done() for task in (*suspects.values(), newcomer))
        assert only.inflight == 1
        lease.release()
    leased(await newcomer)


async def test_a_suspect_has_the_memory_of_all_replicas_that_share_it() -> None:
    a, b, far = Replica(0, limit=4), Replica(1, limit=4), Replica(2, limit=4)
    far.spec = replace(far.spec, memory_host="far")
    p = pool(a, b, far)
    held = [leased(await p.acquire()) for _ in range(3)]
    one, two = await suspect(p, 10), await suspect(p, 20)
    assert kept_free(p) <= {"m:0", "m:1", "m:2"}
    next(lease for lease in held if lease.spec.id == "m:0").release()
    await settle()
    assert not one.done(), "the other one works beside it"
    next(lease for lease in held if lease.spec.id == "m:1").release()
    lease = leased(await one)
    assert lease.spec.id in ("m:0", "m:1")
    others = [leased(await p.acquire()) for _ in range(3)]
    assert {other.spec.id for other in others} == {"m:2"}, "its sibling takes nobody meanwhile"
    await settle()
    assert not two.done()
    lease.abandoned = True
    lease.release()
    await settle()
    assert not two.done(), "its client has left, and the backend works on it"
    lease.over()
    assert leased(await two).spec.id in ("m:0", "m:1")


@pytest.mark.parametrize("state", [State.STOPPING, State.DRAINING])
async def test_what_a_process_that_is_being_ended_holds_is_no_free_memory(state: State) -> None:
    a, b = Replica(0, limit=4), Replica(1, limit=4)
    p = pool(a, b)
    a.state = state
    task = await suspect(p, 10)
    assert not task.done()
    a.become(State.BACKOFF)
    assert leased(await task).spec.id == "m:1"


async def test_others_that_must_be_alone_need_only_their_replica() -> None:
    p = pool(Replica(0, limit=4), Replica(1, limit=4))
    leases = [leased(await p.acquire(SlotRequest(isolation=Isolation.ALONE))) for _ in range(2)]
    assert {lease.spec.id for lease in leases} == {"m:0", "m:1"}


# -- what cannot share a batch -----------------------------------------------------------------------------------------


async def waiting_alone(p: Pool) -> "asyncio.Task[Lease | Refusal]":
    task = asyncio.ensure_future(p.acquire(SlotRequest(unbatchable=True)))
    await settle()
    return task


async def test_what_cannot_be_batched_gets_an_idle_replica_and_holds_it_alone() -> None:
    a, b = Replica(0, limit=4), Replica(1, limit=4)
    p = pool(a, b)
    busy = leased(await p.acquire())
    lease = leased(await p.acquire(SlotRequest(unbatchable=True)))
    assert lease.spec.id != busy.spec.id
    assert (lease.unbatchable, lease.alone) == (True, False)
    assert [leased(await p.acquire()).spec.id for _ in range(3)] == [busy.spec.id] * 3
    lease.release()
    assert leased(await p.acquire()).spec.id == lease.spec.id


async def test_it_waits_in_our_line_behind_a_stream_and_nobody_is_put_behind_it() -> None:
    only = Replica(limit=4)
    p = pool(only)
    stream = leased(await p.acquire())
    alone, other = await waiting_alone(p), await in_line(p)
    assert not alone.done()
    assert not other.done(), "the replica empties for the one that came first"
    stream.release()
    lease = leased(await alone)
    await settle()
    assert not other.done(), "it would wait in the server, silently"
    lease.release()
    assert leased(await other).spec.id == "m:0"


async def test_its_reservation_lapses_where_a_long_stream_does_not_end() -> None:
    p = hasty(Replica(limit=4))
    stream = leased(await p.acquire())
    alone, other = await waiting_alone(p), await in_line(p)
    assert not other.done()
    held = leased(await other)
    second = leased(await p.acquire())
    assert not alone.done(), "it goes on waiting"
    for lease in (stream, held, second):
        lease.release()
    assert leased(await alone).unbatchable


async def test_reservations_in_vain_do_not_follow_each_other() -> None:
    p = pool(Replica(limit=4))
    leased(await p.acquire())
    for _ in range(3):
        impatient = await waiting_alone(p)
        impatient.cancel()
        await settle()
    again = await waiting_alone(p)
    assert leased(await p.acquire()).spec.id == "m:0", "others are not kept waiting all the time"
    again.cancel()


async def test_many_of_them_do_not_keep_the_others_out() -> None:
    only = Replica(limit=4)
    p = pool(only)
    first = leased(await p.acquire(SlotRequest(unbatchable=True)))
    second = await waiting_alone(p)
    other = await in_line(p)
    third = await waiting_alone(p)
    first.release()
    lease = leased(await second)
    lease.release()
    plain = leased(await other)
    await settle()
    assert not third.done(), "each in the order of its arrival"
    plain.release()
    assert leased(await third).unbatchable


async def test_it_is_not_sent_to_a_replica_on_which_an_abandoned_request_goes_on() -> None:
    only = Replica(limit=4)
    p = pool(only)
    lease = leased(await p.acquire())
    lease.open(Request("POST", "/"))
    lease.abandoned = True
    lease.release()
    alone = await waiting_alone(p)
    plain = leased(await p.acquire())
    assert not alone.done()
    plain.release()
    lease.over()
    assert leased(await alone).unbatchable


async def test_a_replica_is_kept_free_no_longer_once_a_request_on_it_is_abandoned() -> None:
    p = pool(Replica(limit=4))
    lease = leased(await p.acquire())
    alone, plain = await waiting_alone(p), await in_line(p)
    assert not plain.done()
    lease.abandoned = True
    lease.release()
    assert leased(await plain).spec.id == "m:0", "nobody knows for how long it goes on"
    assert not alone.done()
    alone.cancel()


async def test_another_engine_takes_it_like_any_other() -> None:
    replica = Replica(limit=2)
    replica.spec = replace(replica.spec, engine=Engine.OTHER)
    p = pool(replica)
    leased(await p.acquire())
    assert not leased(await p.acquire(SlotRequest(unbatchable=True))).unbatchable


async def test_its_refusal_says_why_it_waited() -> None:
    p = pool(Replica(limit=2), queue_timeout=0.01)
    leased(await p.acquire())
    outcome = await p.acquire(SlotRequest(unbatchable=True))
    assert refused(outcome) == Refusal(Why.QUEUE_TIMEOUT, waited=0.01, unbatchable=True)


# -- any order of events ---------------------------------------------------------------------------------------------

BECOMES = {
    "down": State.FAILED,
    "away": State.BACKOFF,
    "late": State.BACKOFF,
    "up": State.READY,
    "load": State.STARTING,
    "next": State.READY,
}


async def test_who_need_not_be_alone_any_more_lets_the_line_in() -> None:
    only = Replica(limit=2)
    p = pool(only)
    lease = leased(await p.acquire(SlotRequest(isolation=Isolation.ALONE)))
    waiting = await in_line(p)
    lease.allow_others()
    assert leased(await waiting).spec.id == only.id
    assert only.inflight == 2
    lease.allow_others()  # once more changes nothing
    lease.release()
    assert only.inflight == 1


ASKS = ("acquire", "alone", "apart", "seeded", "failover")
STEPS = (*ASKS, "release", "leave", "over", "cancel", "down", "away", "late", "up", "load", "next")


# A failover waits for a replica that is kept free for a request, which gives it up, or is served elsewhere.
GIVEN_UP = [("acquire", n) for n in (0, 0, 0, 0, 1)] + [("alone", 0), ("leave", 4)]
GIVEN_UP += [("acquire", n) for n in (0, 0, 0, 0, 0, 0, 0, 1)]
GIVEN_UP += [("seeded", 0), ("release", 0), ("cancel", 2), ("failover", 1), ("leave", 0)]
SERVED = [("acquire", n) for n in (0, 0, 0, 0, 0, 0, 0, 0, 0, 1)]
SERVED += [("seeded", 0), ("release", 0), ("release", 0), ("down", 0), ("release", 1), ("apart", 0), ("release", 0)]
SERVED += [("down", 1), ("failover", 7), ("up", 0)]


@settings(deadline=None, max_examples=150)
@given(
    limits=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    max_queue=st.integers(0, 4),
    steps=st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 2**16)), min_size=20, max_size=80),
)
@example(limits=[1, 1, 2], max_queue=2, steps=GIVEN_UP)
@example(limits=[1, 1, 2], max_queue=2, steps=SERVED)
def test_no_slot_is_lost_or_given_twice(limits: list[int], max_queue: int, steps: list[tuple[str, int]]) -> None:
    asyncio.run(_storm(limits, max_queue, steps))


async def _storm(limits: list[int], max_queue: int, steps: list[tuple[str, int]]) -> None:
    replicas = [Replica(i, limit=limit) for i, limit in enumerate(limits)]
    p = pool(*replicas, max_queue=max_queue)
    tasks: list[asyncio.Task[Lease | Refusal]] = []
    held: list[Lease] = []
    left: list[Lease] = []
    for step, seed in steps:
        chance = random.Random(seed)
        replica = chance.choice(replicas)
        match step:
            case "acquire" | "alone" | "apart" | "seeded" | "failover":
                tasks.append(asyncio.ensure_future(_acquire(p, step, replica.id, chance.choice(list(Priority)))))
            case "release" | "leave" | "over":
                _end(step, held, left, chance)
            case "cancel" if tasks:
                chance.choice(tasks).cancel()
            case "down" | "away" | "late" | "up" | "load" | "next":
                _change(replica, step)
        if seed % 2:  # else more of it happens at the same moment
            await settle()
        tasks, held = _collect(tasks, held)
        assert all(r.most <= r.slots for r in replicas)
        # Company of a life that ended while it was there is none.
        assert all(_kept_apart(_present(r)) for r in replicas)
        if any(lease.in_flight for lease in p._eligibility._apart.values()):
            assert sum(r.inflight for r in replicas) == 1
        _assert_nobody_is_forgotten(p)
    await settle()
    tasks, held = _collect(tasks, held)
    assert p.queued == len(tasks), "whoever has no answer stands in line"
    assert sum(r.inflight for r in replicas) == len(held) + len(left)
    if not any(r.recovers for r in replicas):
        assert not tasks
    for task in tasks:
        task.cancel()
    for lease in held:
        lease.release()
    for lease in left:
        lease.over()
    await settle()
    assert p.queued == 0
    assert all(r.inflight == 0 for r in replicas)


def _acquire(p: Pool, how: str, where: str, priority: Priority) -> Coroutine[Any, Any, Lease | Refusal]:
    exclude = tried(where) if how == "failover" else NOTHING
    isolation = {"apart": Isolation.APART, "alone": Isolation.ALONE}.get(how, Isolation.SHARED)
    request = SlotRequest(exclude=exclude, isolation=isolation, unbatchable=how == "seeded", work=Work(1))
    return p.acquire(request._replace(priority=priority))


def _end(how: str, held: list[Lease], left: list[Lease], chance: random.Random) -> None:
    """One of those held is released, or its client leaves; or one whose client has left is over."""
    leases = left if how == "over" else held
    if not leases:
        return
    lease = leases.pop(chance.randrange(len(leases)))
    if how == "leave":
        lease.abandoned = True
        left.append(lease)
    if how == "over":
        lease.over()
    else:
        lease.release()


def _change(replica: Replica, how: str) -> None:
    """``late``: back only after everybody's patience; ``next``: the next instance is ready."""
    replica.eta = 2 * FOREVER if how == "late" else None
    replica.generation += how == "next"
    replica.become(BECOMES[how])


def _present(replica: Replica) -> list[Lease]:
    """What is in flight on the present instance."""
    return [*replica.flight.of(replica.generation), *replica.flight.abandoned(replica.generation)]


def _assert_nobody_is_forgotten(p: Pool) -> None:
    """Nobody is in line for whom a replica is free, or none will ever be."""
    q, now = p._queue, asyncio.get_running_loop().time()
    for ticket in (*q.alone, *q.unbatchable, *q.again, *q.others):
        is_free = p._eligibility._free(ticket, now)
        assert ticket.future.done() or (not is_free and p._dispatcher._is_to_wait(ticket))


def _kept_apart(leases: list[Lease]) -> bool:
    return len(leases) <= 1 or not any(lease.alone or lease.unbatchable for lease in leases)


def _collect(
    tasks: list["asyncio.Task[Lease | Refusal]"], held: list[Lease]
) -> tuple[list["asyncio.Task[Lease | Refusal]"], list[Lease]]:
    outcomes = [task.result() for task in tasks if task.done() and not task.cancelled()]
    held.extend(outcome for outcome in outcomes if isinstance(outcome, Lease))
    return [task for task in tasks if not task.done()], held


# -- leases ----------------------------------------------------------------------------------------------------------


async def test_a_slot_is_given_back_once() -> None:
    replica = Replica(limit=2)
    changes: list[int] = []
    replica.on_change = lambda: changes.append(replica.inflight)
    first, second = replica.admit(), replica.admit()
    for _ in range(3):
        first.release()
    assert changes == [1]
    second.release()
    assert changes == [1, 0]


async def test_a_lease_opens_on_its_own_life_and_asks_it_what_happened() -> None:
    life = Life(generation=4)
    lease = Lease(Replica(), life, 3.0)
    assert (lease.generation, lease.admitted, lease.last_byte_at) == (4, 3.0, 0.0)
    lease.abort(ExchangeError(Fault.DIED, "nothing is open yet, so nothing happens"))
    request = Request("POST", "/v1/completions")
    exchange = lease.open(request)
    assert life.asked == [request]
    assert lease.exchange is exchange
    assert lease.last_byte_at == 5.0
    failure = await lease.diagnose(ExchangeError(Fault.RESET, "reset by peer"))
    assert (failure.verdict.cause, failure.verdict.message, failure.verdict.generation) == (
        Cause.KILLED,
        "reset by peer",
        4,
    )


async def test_the_supervisor_reaches_the_calls_of_one_life_only() -> None:
    flight, owner = InFlight(), Replica()
    leases = [Lease(owner, Life(generation), 0.0) for generation in (1, 1, 2)]
    for lease in leases:
        flight.add(lease)
    calls = [lease.open(Request("GET", "/")) for lease in leases]
    assert (len(flight), len(flight.of(1)), len(flight.of(3))) == (3, 2, 0)
    error = ExchangeError(Fault.DIED, "exited")
    flight.abort(1, error)
    assert [call.aborted for call in calls if isinstance(call, Call)] == [error, error, None]


async def test_for_how_long_a_life_has_kept_somebody_waiting() -> None:
    flight, owner = InFlight(), Replica()
    assert flight.quiet(1, 0.5) == (0, 0.0)
    old, new, other = (Lease(owner, Life(n), at) for n, at in ((1, 1.0), (1, 500.0), (2, 99.0)))
    flight.add(old)
    assert flight.quiet(1, 2.0) == (0, 0.0), "nothing was asked yet"
    call = old.open(Request("GET", "/"))  # last heard at 5.0
    assert flight.quiet(1, 20.0) == (1, 15.0)
    flight.add(new)
    new.open(Request("GET", "/"))
    assert flight.quiet(1, 520.0) == (2, 515.0), "an arrival is no sign of life"
    flight.discard(old)
    assert flight.quiet(1, 530.0) == (1, 525.0), "what was heard for a request that has ended still counts"
    flight.discard(new)
    assert flight.quiet(1, 540.0) == (0, 0.0)
    flight.add(other)
    assert flight.quiet(1, 550.0) == (0, 0.0)
    assert call.last_heard == 5.0


async def test_a_client_that_does_not_read_is_no_silence_of_the_backend() -> None:
    flight, lease = InFlight(), Lease(Replica(), Life(1), 1.0)
    flight.add(lease)
    call = Call()
    lease.exchange = call
    assert (flight.quiet(1, 30.0), lease.silence(30.0)) == ((1, 25.0), 25.0)
    call.waiting_since = 0.0  # the relay is stuck in sending, and does not read
    assert (flight.quiet(1, 90.0), lease.silence(90.0)) == ((0, 0.0), 0.0)
    call.waiting_since = 100.0  # it reads again
    assert (flight.quiet(1, 103.0), lease.silence(103.0)) == ((1, 13.0), 3.0)


# -- asleep ------------------------------------------------------------------------------------------------------------


def unloaded(index: int = 0) -> Replica:
    one = Replica(index, state=State.UNLOADED)
    one.unloaded = True
    return one


async def test_a_request_loads_all_that_are_unloaded_and_waits() -> None:
    one, two = unloaded(), unloaded(1)
    p = pool(one, two)
    assert p.unloaded()
    assert not p.may_answer()
    waiting = asyncio.ensure_future(p.acquire())
    await asyncio.sleep(0)
    assert (one.loads, two.loads) == (1, 1)
    assert one.demand == p.queued == 1
    one.become(State.READY)
    leased(await waiting).release()
    assert not p.unloaded()


async def test_a_load_that_fails_answers_all_who_wait_at_once() -> None:
    one = unloaded()
    p = pool(one)
    waiting = [asyncio.ensure_future(p.acquire()) for _ in range(3)]
    await asyncio.sleep(0)
    one.become(State.FAILED)
    assert [refused(await each).why for each in waiting] == [Why.UNAVAILABLE] * 3


async def test_a_replica_that_was_denied_memory_is_asked_again_by_the_next_request() -> None:
    one = unloaded()
    p = pool(one)
    for count in (1, 2):
        waiting = asyncio.ensure_future(p.acquire())
        await asyncio.sleep(0)
        one.unloaded, one.recently_denied = True, True
        one.become(State.UNLOADED)
        assert refused(await waiting).why is Why.UNAVAILABLE
        assert one.loads == count


async def test_where_another_serves_a_replica_that_was_denied_memory_stays_unloaded() -> None:
    busy, other = Replica(), unloaded(1)
    other.recently_denied = True
    p = pool(busy, other)
    held = leased(await p.acquire())
    waiting = asyncio.ensure_future(p.acquire())
    await asyncio.sleep(0)
    assert other.loads == 0
    held.release()
    leased(await waiting).release()


async def test_all_are_told_to_load_before_a_request_is_refused() -> None:
    class BackingOff(Replica):
        def load(self) -> None:
            self.unloaded = False
            self.become(State.BACKOFF)

    first, second = BackingOff(0, state=State.UNLOADED), unloaded(1)
    first.unloaded = True
    p = pool(first, second)
    waiting = asyncio.ensure_future(p.acquire())
    await settle()
    assert second.loads == 1
    second.become(State.READY)
    assert leased(await waiting).spec.id == "m:1"


async def test_replicas_that_are_excluded_are_not_loaded() -> None:
    one = unloaded()
    p = pool(one)
    barred = Excluded(backends=frozenset({"m:0"}))
    assert not p.unloaded(barred)
    assert refused(await p.acquire(SlotRequest(exclude=barred))).why is Why.UNAVAILABLE
    assert one.loads == 0
    assert p.unloaded(tried("m:0")), "its next instance is another one"


async def test_a_long_line_costs_a_change_no_more_than_a_short_one() -> None:
    """Counted in looks at the replicas: a line of 1024 took 20 ms for each request that ended."""
    looks = 0

    class Counted(Replica):
        def has_slot(self) -> bool:
            nonlocal looks
            looks += 1
            return super().has_slot()

    replica = Counted(limit=1)
    p = pool(replica, max_queue=2000)
    held = leased(await p.acquire())
    tasks = [asyncio.ensure_future(p.acquire()) for _ in range(1024)]
    await settle()
    assert p.queued == 1024
    looks = 0
    p.dispatch()
    assert looks <= 2, "no slot is free"
    held.release()
    assert looks <= 6, "one was, and one request has it"
    looks = 0
    replica.become(State.BACKOFF)
    assert p.queued == 1023
    assert looks <= 2 * 1024
    looks = 0
    replica.become(State.FAILED)
    assert p.queued == 0
    assert looks <= 2 * 1024
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


# -- a replica of one's own --------------------------------------------------------------------------------------------


async def test_the_preferred_replica_is_taken_unless_it_has_much_more_to_do() -> None:
    one, two = Replica(limit=8), Replica(1, limit=8)
    p = pool(one, two)
    own = Seat("m:1", 1)
    held = [leased(await p.acquire(SlotRequest(prefer=own))) for _ in range(LOAD_GAP + 1)]
    assert {lease.spec.id for lease in held} == {"m:1"}
    assert leased(await p.acquire(SlotRequest(prefer=own))).spec.id == "m:0", "that would be one too many"


async def test_a_new_life_of_it_has_nothing_of_the_conversation() -> None:
    one, two = Replica(limit=8), Replica(1, limit=8)
    p = pool(one, two)
    two.generation = 2
    told = {leased(await p.acquire(SlotRequest(prefer=Seat("m:1", 1)))).spec.id for _ in range(2)}
    assert told == {"m:0", "m:1"}


@pytest.mark.parametrize("lost", ["excluded", "unresponsive", "down"])
async def test_one_that_cannot_take_it_is_not_waited_for(lost: str) -> None:
    one, two = Replica(limit=8), Replica(1, limit=8)
    p = pool(one, two)
    if lost == "unresponsive":
        two.responsive = False
    if lost == "down":
        two.become(State.BACKOFF)
    exclude = tried("m:1") if lost == "excluded" else NOTHING
    for _ in range(3):
        assert leased(await p.acquire(SlotRequest(prefer=Seat("m:1", 1), exclude=exclude))).spec.id == "m:0"


# -- who observes it ---------------------------------------------------------------------------------------------------


async def test_observers_hear_of_requests_that_come_and_end_and_of_replicas_that_change() -> None:
    replica = Replica()
    pool = Pool([replica], max_queue=1, queue_timeout=60.0)
    heard: list[tuple[int, int]] = []
    leave = pool.subscribe(lambda: heard.append((replica.inflight, pool.queued)))
    lease = await pool.acquire()
    assert isinstance(lease, Lease)
    waiting = asyncio.ensure_future(pool.acquire())
    await asyncio.sleep(0)
    assert heard == [(1, 0), (1, 1)]
    lease.release()
    assert heard[2:] == [(1, 0)], "the slot went to the one that waited"
    second = await waiting
    assert isinstance(second, Lease)
    second.release()
    replica.become(State.DRAINING)
    leave()
    replica.become(State.READY)
    assert heard[3:] == [(0, 0), (0, 0)]


# -- a replica that comes back -----------------------------------------------------------------------------------------


def back_again(replica: Replica) -> None:
    replica.generation += 1
    replica.become(State.READY)


@pytest.mark.parametrize("state", [State.BACKOFF, State.STARTING])
async def test_the_only_replica_is_waited_for(state: State) -> None:
    only = Replica(state=state)
    only.eta = 5.0
    p = pool(only)
    waiting = await in_line(p)
    only.become(State.STARTING)
    await settle()
    assert not waiting.done()
    back_again(only)
    assert leased(await waiting).generation == 2


async def test_a_failover_waits_for_the_next_instance_and_for_no_other() -> None:
    only = Replica()
    p = pool(only)
    assert refused(await p.acquire(SlotRequest(exclude=tried("m:0")))).why is Why.UNAVAILABLE, (
        "it is as ready as it was"
    )
    only.state = State.BACKOFF
    waiting = await in_line(p, exclude="m:0")
    back_again(only)
    assert leased(await waiting).generation == 2
    barred = Excluded(backends=frozenset({"m:0"}))
    assert refused(await p.acquire(SlotRequest(exclude=barred))).why is Why.UNAVAILABLE


async def test_what_is_back_too_late_is_not_waited_for() -> None:
    only = Replica(state=State.BACKOFF)
    p = pool(only, queue_timeout=60.0)
    only.eta = 61.0
    assert refused(await p.acquire()) == Refusal(Why.UNAVAILABLE, patience=60.0)
    only.eta = 50.0
    assert refused(await p.acquire(SlotRequest(within=40.0))) == Refusal(Why.UNAVAILABLE, patience=40.0)
    only.flight.reading.note(1000, 0, 20.0)
    slow = await p.acquire(SlotRequest(work=Work(1000)))
    assert refused(slow).why is Why.UNAVAILABLE, "it would have to read the prompt, too"
    await in_line(p)


async def test_how_long_a_first_start_takes_is_not_known() -> None:
    only = Replica(state=State.STARTING)
    only.eta, only.eta_known = 61.0, False
    p = pool(only, queue_timeout=60.0)
    await in_line(p)
    only.eta_known = True
    assert refused(await p.acquire()).why is Why.UNAVAILABLE
    only.loading_on_demand = True
    await in_line(p)


async def test_a_start_that_fails_again_may_end_the_wait() -> None:
    only = Replica(state=State.STARTING)
    only.eta = 3.0
    p = pool(only, queue_timeout=10.0)
    waiting = [await in_line(p), await in_line(p, exclude="m:0"), await in_line(p, alone=True)]
    only.eta = 30.0
    only.become(State.STARTING)
    await settle()
    assert p.queued == 3, "a start takes as long as it takes"
    only.become(State.BACKOFF)
    assert {refused(await one).why for one in waiting} == {Why.UNAVAILABLE}


async def test_the_line_is_served_in_its_order_by_who_is_back() -> None:
    only = Replica(state=State.BACKOFF, limit=1)
    only.eta = 1.0
    p = pool(only)
    first, second, moved = await in_line(p), await in_line(p), await in_line(p, exclude="m:0")
    back_again(only)
    lease = leased(await moved)
    assert p.queued == 2
    lease.release()
    leased(await first).release()
    leased(await second).release()


async def test_waiting_is_told_while_it_lasts() -> None:
    only, told = Replica(limit=1), list[str]()

    @contextmanager
    def waiting(place: Callable[[], Place]) -> Iterator[None]:
        assert place() == Place(before=0), "the first of them"
        told.append("begins")
        yield
        told.append("ends")

    p = pool(only)
    held = leased(await p.acquire(waiting=waiting))
    assert not told
    task = asyncio.ensure_future(p.acquire(waiting=waiting))
    await settle()
    assert told == ["begins"]
    held.release()
    leased(await task)
    assert told == ["begins", "ends"]

"""Requests whose batch would not fit: where they go, how long others go before them, and what they are told."""

import asyncio
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.admission.dispatcher import MOST_LARGE
from backends.admission.lease import Lease
from backends.admission.pool import Pool
from backends.admission.reservations import PASSED
from backends.admission.slot_request import SlotRequest
from backends.admission.slot_shares import EXPECTED
from backends.admission.ticket_queue import HELD_BACK
from backends.domain.place import Place, WaitsFor
from backends.domain.priority import Priority
from backends.domain.refusal import Refusal, Why
from backends.domain.work import Work
from tests.backends.admission.test_classes import clock_ahead
from tests.backends.admission.test_pool import Replica, leased, pool, refused, settle, tried

Task = asyncio.Task[Lease | Refusal]


def asks(tokens: int) -> SlotRequest:
    return SlotRequest(work=Work(tokens))


async def queued(p: Pool, tokens: int) -> Task:
    before, task = p.queued, asyncio.ensure_future(p.acquire(asks(tokens)))
    await settle()
    assert p.queued == before + 1
    return task


def roomy(*rooms: int, limit: int = 8) -> list[Replica]:
    replicas = [Replica(index, limit=limit) for index in range(len(rooms))]
    for replica, room in zip(replicas, rooms, strict=True):
        replica.room = room
    return replicas


async def test_the_batch_with_it_counts_not_the_request() -> None:
    (replica,) = roomy(100)
    p = pool(replica)
    short = [leased(await p.acquire(asks(1))) for _ in range(4)]
    long = await queued(p, 30)  # five times thirty
    for lease in short[:2]:
        lease.release()
    await settle()
    assert leased(await long).work.prompt_tokens == 30


async def test_it_goes_to_another_replica_where_it_fits() -> None:
    a, b = roomy(100, 100)
    p = pool(a, b)
    first = leased(await p.acquire(asks(60)))
    assert leased(await p.acquire(asks(60))).spec.id != first.spec.id


async def test_an_idle_replica_takes_whatever_comes() -> None:
    (replica,) = roomy(100)
    assert isinstance(await pool(replica).acquire(asks(1000)), Lease)


async def test_smaller_ones_go_before_it_and_then_the_replica_is_kept_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    (replica,) = roomy(100)
    p = pool(replica)
    monkeypatch.setattr("backends.admission.reservations.PASSED", 0.02)
    first = leased(await p.acquire(asks(10)))
    long = await queued(p, 90)
    second = leased(await p.acquire(asks(10)))
    await asyncio.sleep(0.03)
    first.release()  # the next time that the queue is looked at
    await settle()
    late = await queued(p, 10)
    assert not long.done()
    second.release()
    await settle()
    leased(await long).release()
    leased(await late)


async def test_it_does_not_keep_others_out_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    (replica,) = roomy(100)
    p = Pool([replica], max_queue=10, queue_timeout=60.0, reservations=(0.02, 0.02), pause=0.5)
    monkeypatch.setattr("backends.admission.reservations.PASSED", 0.0)
    leased(await p.acquire(asks(10)))
    long = await queued(p, 90)
    p.dispatch()
    late = await queued(p, 10)
    leased(await late)  # the reservation has lapsed
    leased(await p.acquire(asks(10)))
    long.cancel()


async def test_those_that_wait_for_memory_are_served_in_their_order() -> None:
    (replica,) = roomy(100)
    p = pool(replica)
    first = leased(await p.acquire(asks(10)))
    waiting = [await queued(p, 90), await queued(p, 80), await queued(p, 70)]
    for task in waiting:
        first.release()
        await settle()
        first = leased(await task)
        assert sum(other.done() for other in waiting) == waiting.index(task) + 1


async def test_a_crowd_that_waits_for_memory_is_looked_at_a_few_at_a_time() -> None:
    (replica,) = roomy(100, limit=32)
    p = pool(replica, max_queue=100)
    looks: list[SlotRequest] = []
    fits = replica.fits
    lease = leased(await p.acquire(asks(10)))
    tasks = [await queued(p, 90) for _ in range(60)]

    def looked(request: SlotRequest, share: float = 1.0) -> bool:
        looks.append(request)
        return fits(request, share)

    p.dispatch()
    replica.fits = looked  # type: ignore[method-assign]
    p.dispatch()
    assert len(looks) < 20
    for task in tasks:
        task.cancel()
    lease.release()
    await settle()
    assert p.queued == 0


async def test_a_request_that_was_tried_before_waits_for_memory_too() -> None:
    a, b = roomy(100, 100)
    p = pool(a, b)
    leases = [leased(await p.acquire(asks(60))) for _ in range(2)]
    task = asyncio.ensure_future(p.acquire(asks(60)._replace(exclude=tried("m:0"))))
    await settle()
    assert not task.done()
    next(lease for lease in leases if lease.spec.id == "m:1").release()
    assert leased(await task).spec.id == "m:1"


async def test_it_is_told_what_it_waits_for() -> None:
    (replica,) = roomy(100)
    p = pool(replica)
    leased(await p.acquire(asks(10)))
    told: list[Callable[[], Place]] = []

    def waiting(place: Callable[[], Place]) -> AbstractContextManager[None]:
        told.append(place)
        return nullcontext()

    task = asyncio.ensure_future(p.acquire(asks(90), waiting=waiting))
    await settle()
    place = told[0]()
    assert place.waits_for is WaitsFor.MEMORY
    assert "the batch of 2 would need" in place.numbers
    task.cancel()


async def test_it_waits_no_longer_than_it_may() -> None:
    (replica,) = roomy(100)
    p = pool(replica, queue_timeout=0.02)
    leased(await p.acquire(asks(10)))
    assert refused(await p.acquire(asks(90))).why is Why.QUEUE_TIMEOUT
    assert p.queued == 0


# -- by class ----------------------------------------------------------------------------------------------------------


async def of_class(p: Pool, priority: Priority, tokens: int, count: int = 1) -> list[Task]:
    request = asks(tokens)._replace(priority=priority)
    tasks = [asyncio.ensure_future(p.acquire(request)) for _ in range(count)]
    await settle()
    return tasks


async def waits_behind_a_crowd(p: Pool, tokens: int) -> tuple[Task, Task]:
    """One of the crowd, and a person; they wait for memory, the crowd is more than is looked at in one go."""
    crowd = await of_class(p, Priority.BACKGROUND, 90, 2 * MOST_LARGE)
    p.dispatch()
    (person,) = await of_class(p, Priority.INTERACTIVE, tokens)
    p.dispatch()
    assert p.queued == len(crowd) + 1
    return crowd[0], person


async def test_a_person_is_served_before_a_crowd_that_waits_for_memory() -> None:
    (replica,) = roomy(100)
    p = pool(replica, max_queue=100)
    held = leased(await p.acquire(asks(60)))
    first, person = await waits_behind_a_crowd(p, 80)
    held.release()
    await settle()
    assert (first.done(), person.done()) == (False, True)


async def test_a_person_is_looked_at_however_many_others_wait_for_memory() -> None:
    (replica,) = roomy(100)
    p = pool(replica, max_queue=100)
    large, _small = [leased(await p.acquire(asks(tokens))) for tokens in (40, 10)]
    _, person = await waits_behind_a_crowd(p, 30)
    large.release()
    await settle()
    assert person.done(), "it fits beside the small one; those of the crowd do not"


async def test_a_crowd_that_waits_for_memory_keeps_no_replica_from_a_person() -> None:
    (replica,) = roomy(100)
    p = pool(replica, max_queue=100)
    held = leased(await p.acquire(asks(10)))
    crowd = await of_class(p, Priority.BACKGROUND, 95, 3)
    with clock_ahead(PASSED + 1.0):
        p.dispatch()
        (person,) = await of_class(p, Priority.INTERACTIVE, 5)
        assert person.done()
    leased(person.result()).release()
    with clock_ahead(PASSED + HELD_BACK[Priority.BACKGROUND]):
        p.dispatch()
        (late,) = await of_class(p, Priority.INTERACTIVE, 5)
        assert not late.done(), "but is not put off for ever"
        held.release()
        await settle()
        assert crowd[0].done()


async def test_a_person_makes_room_in_a_queue_full_of_a_crowd_that_waits_for_memory() -> None:
    (replica,) = roomy(100)
    p = pool(replica, max_queue=5)
    leased(await p.acquire(asks(60)))
    crowd = await of_class(p, Priority.BACKGROUND, 90, 5)
    p.dispatch()
    (person,) = await of_class(p, Priority.INTERACTIVE, 80)
    assert not person.done()
    assert [task.done() for task in crowd] == [False] * 4 + [True]
    assert refused(crowd[-1].result()).why is Why.DISPLACED


async def test_agents_leave_memory_for_a_person_who_comes() -> None:
    """A quarter, as of the slots; one of them may always be in flight."""
    (replica,) = roomy(100, limit=32)
    p = pool(replica, max_queue=100)
    leased(await p.acquire(asks(1))).release()  # a person was here
    agents = await of_class(p, Priority.AGENT, 10, 20)
    assert sum(task.done() for task in agents) == 7
    assert next(iter(p._queue.others)).short_since is None, "no replica is to be kept free for it"
    people = await of_class(p, Priority.INTERACTIVE, 10, 5)
    assert [task.done() for task in people] == [True] * 3 + [False] * 2
    with clock_ahead(EXPECTED):
        for task in people[:3]:
            leased(task.result()).release()
    await settle()
    assert replica.inflight == 10, "all of the memory, once no person is expected"


async def test_one_of_a_class_may_have_all_memory() -> None:
    (replica,) = roomy(100, limit=32)
    p = pool(replica, max_queue=100)
    leased(await p.acquire(asks(40)))
    first, second = await of_class(p, Priority.AGENT, 45, 2)
    assert (first.done(), second.done()) == (True, False)


async def test_who_waits_for_memory_that_is_kept_for_others_is_told_so() -> None:
    (replica,) = roomy(100, limit=32)
    p = pool(replica, max_queue=100)
    leased(await p.acquire(asks(1))).release()
    await of_class(p, Priority.AGENT, 10, 7)
    told: list[Callable[[], Place]] = []

    def waiting(place: Callable[[], Place]) -> AbstractContextManager[None]:
        told.append(place)
        return nullcontext()

    task = asyncio.ensure_future(p.acquire(asks(10)._replace(priority=Priority.AGENT), waiting=waiting))
    await settle()
    assert told[0]().waits_for is WaitsFor.MORE_URGENT
    task.cancel()


async def test_a_crowd_that_waits_for_memory_has_its_turns() -> None:
    """Also where persons who wait for memory come faster than memory is freed."""
    (replica,) = roomy(100)
    p = pool(replica, max_queue=100)
    held = leased(await p.acquire(asks(60)))
    crowd = await of_class(p, Priority.BACKGROUND, 90)
    people = await of_class(p, Priority.INTERACTIVE, 80, 30)
    p.dispatch()
    for turn in range(1, 20):
        with clock_ahead(10.0 * turn):
            held.release()
            await settle()
            (held,) = replica.flight.leases
            people += await of_class(p, Priority.INTERACTIVE, 80)
            if held.priority is Priority.BACKGROUND:
                break
    assert crowd[0].done()
    assert 3 < turn < 10


@given(
    st.lists(
        st.tuples(st.sampled_from(["come", "come", "end", "leave"]), st.sampled_from(Priority), st.integers(1, 120)),
        max_size=60,
    )
)
@settings(max_examples=60, deadline=None)
def test_whatever_comes_and_goes_the_batch_fits_and_nobody_is_forgotten(
    steps: list[tuple[str, Priority, int]],
) -> None:
    asyncio.run(_storm(steps))


async def _storm(steps: list[tuple[str, Priority, int]]) -> None:
    replicas = roomy(100, 60)
    p = pool(*replicas, max_queue=100)
    tasks: list[Task] = []
    for step, priority, number in steps:
        if step == "come":
            tasks += await of_class(p, priority, number)
        elif step == "end":
            end(replicas, number)
        elif tasks:
            tasks[number % len(tasks)].cancel()
        await settle()
        assert all(each.inflight < 2 or rectangle(each) <= each.room for each in replicas)
    for _ in tasks:
        end(replicas, 0)
        end(replicas, 0)
        await settle()
    assert p.queued == 0
    assert all(task.done() for task in tasks)


def rectangle(replica: Replica) -> int:
    batch = [lease.work.prompt_tokens for lease in replica.flight.leases]
    return len(batch) * max(batch)


def end(replicas: list[Replica], number: int) -> None:
    leases = [lease for replica in replicas for lease in replica.flight.leases]
    if leases:
        leases[number % len(leases)].release()

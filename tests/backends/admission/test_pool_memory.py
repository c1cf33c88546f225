"""Requests whose batch would not fit: where they go, how long others go before them, and what they are told."""

import asyncio
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest

from backends.admission.lease import Lease
from backends.admission.pool import Pool
from backends.admission.slot_request import SlotRequest
from backends.domain.place import Place, WaitsFor
from backends.domain.refusal import Refusal, Why
from backends.domain.work import Work
from tests.backends.admission.test_pool import Replica, leased, pool, refused, settle, tried


def asks(tokens: int) -> SlotRequest:
    return SlotRequest(work=Work(tokens))


async def queued(p: Pool, tokens: int) -> "asyncio.Task[Lease | Refusal]":
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

    def looked(request: SlotRequest) -> bool:
        looks.append(request)
        return fits(request)

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

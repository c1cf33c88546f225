"""A crowd that nobody waits for, and a person: who gets the slots, who waits, and what each is told."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest

from backends.admission.lease import Lease
from backends.admission.pool import Pool
from backends.admission.slot_request import SlotRequest
from backends.admission.slot_shares import HELD_UP, RECENT
from backends.admission.ticket_queue import HELD_BACK
from backends.domain.engine import Engine
from backends.domain.place import Place, WaitsFor
from backends.domain.priority import Priority
from backends.domain.refusal import Refusal, Why
from tests.backends.admission.test_pool import Replica, kept_free, leased, pool, refused, settle, tried

INTERACTIVE, AGENT, BACKGROUND = Priority
Task = asyncio.Task[Lease | Refusal]


@contextmanager
def clock_ahead(seconds: float) -> Iterator[None]:
    """The time of the event loop, as if so many seconds had passed."""
    loop = asyncio.get_running_loop()
    true = loop.time
    loop.time = lambda: true() + seconds  # type: ignore[method-assign]
    try:
        yield
    finally:
        loop.time = true  # type: ignore[method-assign]


async def come(p: Pool, priority: Priority, count: int = 1, *, unbatchable: bool = False) -> list[Task]:
    request = SlotRequest(priority=priority, unbatchable=unbatchable)
    tasks = [asyncio.ensure_future(p.acquire(request)) for _ in range(count)]
    await settle()
    return tasks


def granted(tasks: Sequence[Task]) -> list[Lease]:
    return [leased(task.result()) for task in tasks if task.done()]


async def person_was_here(p: Pool) -> None:
    leased(await p.acquire()).release()


async def test_a_person_does_not_wait_behind_a_crowd() -> None:
    p = pool(Replica(limit=1), max_queue=100)
    held = leased(await p.acquire())
    crowd = await come(p, BACKGROUND, 50)
    (person,) = await come(p, INTERACTIVE)
    held.release()
    await settle()
    assert person.done()
    assert not granted(crowd)


async def test_and_finds_a_slot_free() -> None:
    p = pool(Replica(0, limit=8), max_queue=100)
    await person_was_here(p)
    crowd = await come(p, BACKGROUND, 50)
    assert len(granted(crowd)) == 1
    people = await come(p, INTERACTIVE, 7)
    assert len(granted(people)) == 7, "all that is left"
    granted(crowd)[0].release()
    await settle()
    assert len(granted(crowd)) == 1, "its prompt would be read with theirs"
    for lease in granted(people):
        lease.release()
    await settle()
    assert len(granted(crowd)) == 2, "nobody else is there"


async def test_and_yet_it_is_not_starved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("backends.admission.dispatcher.HELD_UP", 0.02)
    p = pool(Replica(0, limit=8), max_queue=100)
    await person_was_here(p)
    (first,) = granted(await come(p, BACKGROUND))
    leased(await p.acquire())
    first.release()
    (held_up,) = await come(p, BACKGROUND)
    assert not held_up.done()
    with clock_ahead(HELD_UP):
        await asyncio.wait_for(held_up, 5.0)


async def test_where_nobody_else_comes_a_crowd_has_all_slots() -> None:
    p = pool(Replica(0, limit=8), Replica(1, limit=8), max_queue=100)
    assert len(granted(await come(p, BACKGROUND, 50))) == 16


async def test_some_time_later_it_has_most_of_them() -> None:
    p = pool(Replica(0, limit=8), max_queue=100)
    await person_was_here(p)
    with clock_ahead(RECENT):
        assert len(granted(await come(p, BACKGROUND, 50))) == 6


async def test_agents_leave_a_few_for_persons_and_most_to_no_background() -> None:
    p = pool(Replica(0, limit=8), max_queue=100)
    await person_was_here(p)
    agents = await come(p, AGENT, 20)
    assert len(granted(agents)) == 6
    background = await come(p, BACKGROUND, 2)
    assert not granted(background), "the agents wait for their share too"
    granted(agents)[0].release()
    await settle()
    assert len(granted(agents)) + len(granted(background)) == 7


async def test_a_crowd_is_kept_on_one_replica_while_persons_come() -> None:
    a, b = Replica(0, limit=64), Replica(1, limit=64)
    p = pool(a, b, max_queue=100)
    await person_was_here(p)
    crowd = granted(await come(p, BACKGROUND, 50))
    assert len(crowd) == 2
    assert len({lease.spec.id for lease in crowd}) == 1
    (person,) = granted(await come(p, INTERACTIVE))
    assert person.spec.id != crowd[0].spec.id


async def test_one_that_cannot_share_a_batch_takes_the_share_of_many() -> None:
    a, b = Replica(0, limit=8), Replica(1, limit=8)
    a.spec = b.spec = a.spec
    p = pool(a, b, max_queue=100)
    await person_was_here(p)
    assert len(granted(await come(p, BACKGROUND, 5, unbatchable=True))) == 1


async def test_one_that_cannot_share_a_batch_does_not_keep_a_replica_from_persons() -> None:
    only = Replica(limit=8)
    assert only.engine is Engine.MLX_LM
    p = pool(only)
    held = leased(await p.acquire())
    (seeded,) = await come(p, BACKGROUND, unbatchable=True)
    assert kept_free(p) == set()
    assert granted(await come(p, INTERACTIVE)), "no replica is kept free for it"
    with clock_ahead(HELD_BACK[BACKGROUND]):
        p.dispatch()
        assert kept_free(p) == {"m:0"}, "but not for ever"
    held.release()
    assert not seeded.done()


async def test_a_full_queue_makes_room_for_a_more_urgent_request() -> None:
    p = pool(Replica(limit=1), max_queue=3)
    held = leased(await p.acquire())
    crowd = await come(p, BACKGROUND, 3)
    assert refused((await come(p, BACKGROUND))[0].result()).why is Why.QUEUE_FULL
    (agent,) = await come(p, AGENT)
    assert refused(crowd.pop().result()).why is Why.DISPLACED, "the last that came"
    people = await come(p, INTERACTIVE, 3)
    assert [refused(task.result()).why for task in (*crowd, agent)] == [Why.DISPLACED] * 3
    assert refused((await come(p, INTERACTIVE))[0].result()).why is Why.QUEUE_FULL
    assert p.queued == 3
    held.release()
    await settle()
    assert people[0].done()


async def test_nobody_makes_room_twice_or_is_lost() -> None:
    p = pool(Replica(limit=1), max_queue=1)
    held = leased(await p.acquire())
    (seeded,) = await come(p, BACKGROUND, unbatchable=True)
    (person,) = await come(p, INTERACTIVE)
    assert refused(seeded.result()).why is Why.DISPLACED
    person.cancel()
    await settle()
    assert p.queued == 0
    held.release()
    leased(await p.acquire())


@pytest.mark.parametrize("asks", [AGENT, BACKGROUND])
async def test_a_failover_has_waited_its_turn(asks: Priority) -> None:
    a, b = Replica(0, limit=4), Replica(1, limit=4)
    p = pool(a, b, max_queue=100)
    await person_was_here(p)
    await come(p, BACKGROUND, 10)
    failover = SlotRequest(exclude=tried("m:0"), priority=asks)
    assert leased(await p.acquire(failover)).spec.id == "m:1"


# -- what is told ------------------------------------------------------------------------------------------------------


class Told:
    """One queued request, and where it stands."""

    def __init__(self, p: Pool, priority: Priority, *, unbatchable: bool = False) -> None:
        self.place: Callable[[], Place] = Place
        self.told = Place()
        request = SlotRequest(priority=priority, unbatchable=unbatchable)
        self.task = asyncio.ensure_future(p.acquire(request, waiting=self._waiting))

    @contextmanager
    def _waiting(self, place: Callable[[], Place]) -> Iterator[None]:
        self.place, self.told = place, place()
        yield


async def test_where_a_request_stands() -> None:
    p = pool(Replica(limit=1), max_queue=100)
    held = leased(await p.acquire())
    await come(p, BACKGROUND, 30)
    last = Told(p, BACKGROUND)
    await come(p, INTERACTIVE, 2)
    person = Told(p, INTERACTIVE)
    await settle()
    assert person.told == Place(before=2), "as it came"
    assert person.place() == Place(before=2)
    assert last.place().before == 33
    assert last.place().waits_for is WaitsFor.MORE_URGENT
    held.release()
    await settle()
    with clock_ahead(2.0):
        assert person.place().before == 1
        assert last.place().before == 32


async def test_the_time_to_go_is_learned_from_the_turns_of_its_class() -> None:
    p = pool(Replica(limit=1), max_queue=100)
    held = leased(await p.acquire())
    tasks = await come(p, INTERACTIVE, 3)
    last = Told(p, INTERACTIVE)
    await settle()
    assert last.place().eta is None, "nothing is known yet"
    with clock_ahead(4.0):
        held.release()
        await settle()
        eta = last.place().eta
        assert eta is not None
        assert 11.0 < eta < 13.0, "two before it, four seconds each, and its own turn"
    with clock_ahead(8.0):
        granted(tasks)[0].release()
        await settle()
        assert 7.0 < (last.place().eta or 0.0) < 9.0


async def test_one_that_needs_an_idle_replica_is_told_so() -> None:
    p = pool(Replica(limit=2))
    leased(await p.acquire())
    seeded = Told(p, INTERACTIVE, unbatchable=True)
    await settle()
    assert seeded.place() == Place(0, None, WaitsFor.IDLE)

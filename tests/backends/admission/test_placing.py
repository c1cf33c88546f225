"""Long prompts in the pool: alone while they are read, on a replica that the others keep away from."""

import asyncio
import gc
import random
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import replace
from functools import wraps

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.admission import pool as pool_module
from backends.admission.lease import Lease
from backends.admission.placing import DECISIONS, IN_SLICES, ArrivalRate
from backends.admission.pool import Pool
from backends.admission.reading_turns import JOINERS, LIMIT
from backends.admission.slot_request import ANY, SlotRequest
from backends.diagnosis.suspects import RequestProgress
from backends.domain.engine import Engine
from backends.domain.place import WaitsFor
from backends.domain.priority import Priority
from backends.domain.refusal import Refusal, Why
from backends.domain.snapshot import Seat
from backends.domain.state import State
from backends.domain.work import Work
from tests.backends.admission.test_pool import FOREVER, Replica, in_line_for, leased, pool, refused, settle

RATE = 1000.0  # tokens per second
LONG = SlotRequest(work=Work(5000))
SHORT = SlotRequest(work=Work(20, 10))


def replicas(count: int = 2, *, limit: int = 8, rate: float = RATE) -> list[Replica]:
    """They have shown how fast they read."""
    made = [Replica(index, limit=limit) for index in range(count)]
    for one in made:
        one.spec = replace(one.spec, engine=Engine.MLX_LM)
        one.now = asyncio.get_running_loop().time
        one.flight.reading.note(5000, 0, 5000 / rate)
    return made


def begin(lease: Lease) -> Lease:
    """The first token comes."""
    lease.report(RequestProgress(tokens=lease.work.prompt_tokens, decoding=True))
    return lease


async def get(p: Pool, request: SlotRequest = SHORT) -> Lease:
    return leased(await p.acquire(request))


async def test_nothing_is_admitted_beside_a_long_prompt_and_then_all_are() -> None:
    (only,) = replicas(1)
    p = pool(only)
    long = await get(p, LONG)
    waiting = [await in_line_for(p, SHORT) for _ in range(5)]
    assert only.inflight == 1
    assert {p._place(ticket).waits_for for ticket in p._queue.others} == {WaitsFor.TURN}
    begin(long)
    await settle()
    assert [task.done() for task in waiting] == [True] * 5


async def test_one_whose_client_leaves_lets_the_others_in() -> None:
    (only,) = replicas(1)
    p = pool(only)
    long = await get(p, LONG)
    waiting = await in_line_for(p, SHORT)
    long.abandoned = True
    long.release()
    await settle()
    assert not waiting.done(), "the engine reads on"
    long.over()
    assert leased(await waiting).spec.id == "m:0"


async def test_a_long_one_waits_for_what_is_read_and_no_newcomer_overtakes_it() -> None:
    (only,) = replicas(1)
    p = pool(only)
    first = await get(p)
    long = await in_line_for(p, LONG)
    late = await in_line_for(p, SHORT)
    begin(first)
    assert leased(await long).long
    await settle()
    assert not late.done()
    begin(long.result())  # type: ignore[arg-type]
    assert leased(await late).spec.id == "m:0"


async def test_who_keeps_others_out_and_leaves_lets_them_in() -> None:
    (only,) = replicas(1)
    p = pool(only)
    await get(p)
    long = await in_line_for(p, LONG)
    late = await in_line_for(p, SHORT)
    long.cancel()
    assert leased(await late).spec.id == "m:0"


async def test_the_others_go_elsewhere_while_it_is_read() -> None:
    a, b = replicas()
    p = pool(a, b)
    long = await get(p, LONG)
    others = {(await get(p)).spec.id for _ in range(4)}
    assert others == {"m:0", "m:1"} - {long.spec.id}


async def test_long_ones_gather_where_people_come_all_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = replicas()
    p = pool(a, b)
    for _ in range(100):
        begin(await get(p)).release()
    first = await get(p, LONG)
    second = await in_line_for(p, LONG)
    assert (await get(p)).spec.id != first.spec.id, "one is left for them"
    begin(first)
    first.release()
    assert leased(await second).spec.id == first.spec.id


async def test_where_nobody_else_comes_both_replicas_read() -> None:
    a, b = replicas()
    p = pool(a, b)
    assert {(await get(p, LONG)).spec.id for _ in range(2)} == {"m:0", "m:1"}


def continued(seat: Seat, tokens: int = 8000) -> SlotRequest:
    """A conversation that ``seat`` has in its prompt cache."""
    return SlotRequest(work=Work(tokens), prefer=seat, held={seat: tokens - 100})


@pytest.mark.parametrize(("rate", "waits"), [(RATE, True), (10 * RATE, False)])
async def test_a_conversation_waits_for_its_replica_where_reading_it_anew_takes_longer(
    rate: float, waits: bool
) -> None:
    p = pool(*replicas(rate=rate))
    first = await get(p, SlotRequest(work=Work(5000), long=True))
    first.reading, mine = 2.0, continued(first.seat)
    if not waits:
        assert (await get(p, mine)).seat != first.seat
        return
    task = await in_line_for(p, mine)
    decision, other = p.decisions[-1], "m:1" if first.spec.id == "m:0" else "m:0"
    assert (decision.choice.id, decision.joined) == (first.spec.id, False)
    assert (decision.tokens, decision.cached) == (8000, 7900)
    assert decision.choice.costs[other].read > decision.choice.costs[first.spec.id].total
    begin(first)
    assert leased(await task).seat == first.seat
    assert p.decisions[-1].joined


async def test_patience_for_a_better_replica_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "PATIENT", 0.02)
    p = pool(*replicas())
    first = await get(p, LONG)
    waiting = await in_line_for(p, continued(first.seat, 50_000))
    assert leased(await waiting).seat != first.seat


async def test_nobody_is_refused_for_waiting_by_choice() -> None:
    p = pool(*replicas(), max_queue=0)
    first = await get(p, LONG)
    assert (await get(p, continued(first.seat, 50_000))).seat != first.seat
    assert refused(await p.acquire(LONG)) == Refusal(Why.QUEUE_FULL)


async def test_a_few_join_what_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    (only,) = replicas(1)
    p = pool(only)
    long = await get(p, LONG)
    waiting = [await in_line_for(p, SHORT) for _ in range(JOINERS + 1)]
    long.admitted -= LIMIT
    p.dispatch()
    await settle()
    assert [task.done() for task in waiting] == [True] * JOINERS + [False]
    begin(leased(await waiting[0]))
    await settle()
    assert waiting[-1].done()


async def test_whether_another_replica_is_there_for_what_comes() -> None:
    a, b = replicas()
    p = pool(a, b)
    assert p.has_another("m:0")
    assert not pool(a).has_another("m:0")
    first = await get(p, LONG)
    other = "m:1" if first.spec.id == "m:0" else "m:0"
    assert p.has_another(first.spec.id)
    assert not p.has_another(other)
    begin(first)
    assert p.has_another(other)
    first.release()
    (a if other == "m:0" else b).become(State.BACKOFF)
    assert not p.has_another(first.spec.id)


async def test_engines_that_are_not_known_have_no_turns() -> None:
    (only,) = replicas(1)
    only.spec = replace(only.spec, engine=Engine.OTHER)
    p = pool(only)
    assert not (await get(p, LONG)).long
    assert not (await get(p, SlotRequest(work=Work(5000), long=True))).long


async def test_nothing_is_decided_where_no_rate_was_learned() -> None:
    a, b = Replica(0, limit=8), Replica(1, limit=8)
    p = pool(a, b)
    leases = [await get(p, request) for request in (LONG, SHORT, LONG, SHORT)]
    assert not any(lease.long for lease in leases)
    assert not p.decisions


async def test_the_decisions_that_are_kept_are_bounded() -> None:
    a, b = replicas(limit=200)
    p = pool(a, b)
    for _ in range(2 * DECISIONS):
        begin(await get(p, LONG))
    assert len(p.decisions) == DECISIONS


def test_arrivals_fade() -> None:
    rate = ArrivalRate()
    for at in range(100):
        rate.note(float(at))
    assert rate.per_second(99.0) == pytest.approx(1.0, rel=0.1)
    assert rate.per_second(200.0) < 0.1


async def test_a_long_line_of_long_ones_costs_a_change_no_more_than_a_short_one() -> None:
    """Counted in looks at what is in flight."""
    (only,) = replicas(1)
    looks = 0
    batch = only.flight.batch

    def counted(generation: int, now: float) -> object:
        nonlocal looks
        looks += 1
        return batch(generation, now)

    only.flight.batch = counted  # type: ignore[method-assign, assignment]
    p = pool(only, max_queue=2000)
    long = await get(p, LONG)
    tasks = [asyncio.ensure_future(p.acquire(LONG)) for _ in range(500)]
    await settle()
    looks = 0
    p.dispatch()
    assert looks < 200
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    long.release()


async def test_what_has_ended_is_let_go() -> None:
    """With one replica the cost model has nothing to choose, so that it looks at none of them."""
    (only,) = replicas(1)
    p = pool(only)
    for _ in range(20):
        begin(await get(p, LONG)).release()
    left = await get(p, LONG)
    left.abandoned = True
    left.release()
    left.over()
    gc.collect()
    assert [lease for lease in gc.get_objects() if isinstance(lease, Lease) and lease is not left] == []
    assert not p._placing.matters


class SimulatedTime(asyncio.SelectorEventLoop):
    """Its time stands still while something runs, and jumps to the next timer when nothing does."""

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0
        select = self._selector.select  # type: ignore[attr-defined]

        def wait(timeout: float | None) -> object:
            self._now += timeout or 0.0
            return select(0)

        self._selector.select = wait  # type: ignore[attr-defined]

    def time(self) -> float:
        return self._now


def in_simulated_time(test: Callable[[], Coroutine[None, None, None]]) -> Callable[[], None]:
    @wraps(test)
    def run() -> None:
        with asyncio.Runner(loop_factory=SimulatedTime) as runner:
            runner.run(test())

    return run


class Slices:
    """Prompts that are read in slices. ``order``: which had a turn; ``most``: of them at a time."""

    def __init__(self, p: Pool) -> None:
        self.pool = p
        self.order: list[str] = []
        self.most = 0
        self._begun: set[str] = set()
        self._turned = asyncio.Condition()

    async def turn(self, name: str, number: int) -> None:
        """Until it has had so many."""
        async with self._turned:
            await self._turned.wait_for(lambda: self.order.count(name) >= number)

    async def read(self, name: str, slices: int, meanwhile: Callable[[], object] = lambda: None) -> None:
        asked = SlotRequest(work=Work(2000), long=True)
        lease = await get(self.pool, asked)
        try:
            for _ in range(slices):
                self._begun.add(name)
                self.most = max(self.most, len(self._begun))
                self.order.append(name)
                self.pool.begins_slices(name, lease.spec.id)
                meanwhile()
                async with self._turned:
                    self._turned.notify_all()
                await asyncio.sleep(0.002)
                begin(lease).release()
                lease = await get(self.pool, asked._replace(goes_on=True, prefer=lease.seat))
        except asyncio.CancelledError:
            lease.release()
            raise
        finally:
            self._begun.discard(name)
            self.pool.ends_slices(name)
        self.order.append(name)
        await asyncio.sleep(0.002)
        begin(lease).release()


@in_simulated_time
async def test_the_next_begins_when_there_is_room_for_its_slices_and_those_that_have_begun_take_turns() -> None:
    scene = Slices(pool(*replicas(1)))
    await asyncio.gather(*(scene.read(name, 3) for name in "abcde"))
    assert scene.most == IN_SLICES == 2
    assert "".join(scene.order) == "abababacbdcdcdcedeee"


@in_simulated_time
async def test_a_newcomer_has_its_turn_between_two_slices_of_another_also_where_short_ones_wait() -> None:
    p = pool(*replicas(1))
    scene, shorts = Slices(p), list[asyncio.Task[None]]()

    async def short() -> None:
        lease = await get(p)
        await asyncio.sleep(0.001)
        begin(lease).release()

    def come() -> None:
        shorts.append(asyncio.ensure_future(short()))

    giant = asyncio.ensure_future(scene.read("a", 8, come))
    await settle()
    await asyncio.gather(giant, *(scene.read(name, 1) for name in "bc"))
    await asyncio.gather(*shorts)
    order = "".join(scene.order)
    assert order.rindex("c") < len(order) - 3, order
    assert "aaa" not in order[: order.rindex("c")], order
    assert len(shorts) == 8


async def test_one_that_leaves_between_its_slices_makes_room() -> None:
    p = pool(*replicas(1))
    scene = Slices(p)
    tasks = [asyncio.ensure_future(scene.read(name, 200)) for name in "ab"]
    await settle()
    third = asyncio.ensure_future(scene.read("c", 1))
    await asyncio.gather(*(scene.turn(name, 3) for name in "ab"))
    assert "c" not in scene.order
    assert [p.has_slices_beside("a", name) for name in ("m:0", "m:1")] == [True, False]
    for task in tasks:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
    await third


async def test_what_goes_on_is_neither_sent_away_nor_displaced_where_the_queue_is_full() -> None:
    (only,) = replicas(1)
    p = pool(only, max_queue=1)
    long = await get(p, LONG)
    waiting = await in_line_for(p, SHORT._replace(priority=Priority.BACKGROUND))
    assert refused(await p.acquire(LONG._replace(priority=Priority.BACKGROUND))) == Refusal(Why.QUEUE_FULL, queued=1)
    later = SlotRequest(work=Work(5000), long=True, goes_on=True, priority=Priority.BACKGROUND)
    goes_on = await in_line_for(p, later)
    urgent = asyncio.ensure_future(p.acquire(SHORT))
    await settle()
    assert refused(await waiting).why is Why.DISPLACED
    assert refused(await p.acquire(SHORT)).why is Why.QUEUE_FULL, "what goes on makes no room"
    begin(long).release()
    begin(leased(await urgent)).release()
    assert leased(await goes_on).long


STEPS = ("short", "long", "conversation", "begin", "release", "cancel", "away", "up", "wait")
WAIT = LIMIT / 100  # seconds at most; all of a run is less than LIMIT, after which a few join a long one


@settings(deadline=None, max_examples=60)
@given(
    limits=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    steps=st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 2**16)), min_size=10, max_size=60),
)
def test_whatever_happens_nothing_is_read_beside_a_long_one_and_nobody_is_forgotten(
    limits: list[int], steps: list[tuple[str, int]]
) -> None:
    with asyncio.Runner(loop_factory=SimulatedTime) as runner:
        runner.run(_storm(limits, steps))


async def _storm(limits: list[int], steps: list[tuple[str, int]]) -> None:
    made = replicas(len(limits))
    for one, limit in zip(made, limits, strict=True):
        one.slots = limit
    p = Pool(made, max_queue=100, queue_timeout=FOREVER)
    tasks: list[asyncio.Task[Lease | Refusal]] = []
    held: list[Lease] = []
    for step, seed in steps:
        chance = random.Random(seed)
        if step in ("short", "long", "conversation"):
            tasks.append(asyncio.ensure_future(p.acquire(_asked(step, chance.choice(made)))))
        elif step in ("away", "up"):
            _change(chance.choice(made), step)
        else:
            _happens(step, chance, tasks, held)
        await _pass(step, chance)
        tasks = _collect(tasks, held)
        for one in made:
            unread = [each for each in one.flight.of(one.generation) if not each.progress.begun]
            assert len(unread) <= 1 or not any(each.long for each in unread)
    for one in made:
        if one.state is not State.READY:
            _change(one, "up")
    for _ in range(1000):  # whoever waits is served as the others end, and have had their share of time
        await settle()
        tasks = _collect(tasks, held)
        if not (tasks or held):
            break
        await asyncio.sleep(0.0 if held else 0.01)
        while held:
            begin(held.pop()).release()
    assert p.queued == len(tasks) == 0
    assert all(not one.inflight for one in made)


async def _pass(step: str, chance: random.Random) -> None:
    if step == "wait":
        await asyncio.sleep(chance.random() * WAIT)
    elif chance.random() < 0.5:
        await settle()


def _happens(step: str, chance: random.Random, tasks: list["asyncio.Task[Lease | Refusal]"], held: list[Lease]) -> None:
    if step == "cancel" and tasks:
        chance.choice(tasks).cancel()
    elif step == "begin" and held:
        begin(chance.choice(held))
    elif step == "release" and held:
        held.pop(chance.randrange(len(held))).release()


def _change(replica: Replica, step: str) -> None:
    replica.generation += step == "up" and replica.state is not State.READY
    replica.become(State.BACKOFF if step == "away" else State.READY)


def _collect(tasks: list["asyncio.Task[Lease | Refusal]"], held: list[Lease]) -> list["asyncio.Task[Lease | Refusal]"]:
    held += [leased(task.result()) for task in tasks if task.done() and not task.cancelled()]
    return [task for task in tasks if not task.done()]


def _asked(kind: str, replica: Replica) -> SlotRequest:
    if kind == "long":
        return LONG
    if kind == "conversation":
        seat = Seat(replica.id, replica.generation)
        return SlotRequest(work=Work(5000), prefer=seat, held={seat: 4900})
    return ANY

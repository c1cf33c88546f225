"""The test of determinism: what it concludes from replicas of every kind, and that it stands in nobody's way."""

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from backends.admission.excluded import Excluded
from backends.admission.inflight import InFlight
from backends.admission.lease import Lease
from backends.admission.pool import Pool
from backends.admission.slot_request import SlotRequest
from backends.diagnosis.engine import EngineIdentity
from backends.domain.engine import Engine
from backends.domain.failure import Aftermath, CallFailure, Cause, Failure
from backends.domain.inflight_limit import InflightLimit
from backends.domain.prompt_bound import PromptBound
from backends.domain.report import EngineReport
from backends.domain.snapshot import Snapshot
from backends.domain.spec import BackendSpec, Launch
from backends.domain.state import State
from backends.upstream.exchange import Dialer, Exchange, ExchangeError, Fault, Head, Offer, Request, Watcher
from gateway.forward.determinism import MAX_FAILURES, PROMPTS, TOKENS, DeterminismTest
from gateway.stream.resume import Proof
from tests.lives import until

Json = dict[str, Any]
# The text for a prompt; "" = the stream just ends. May raise what breaks the exchange.
Says = Callable[["Replica", str, Json], str]


def as_asked(_: "Replica", prompt: str, body: Json) -> str:
    return f"{prompt} {body['temperature']}"


@dataclass(eq=False)
class Call:
    replica: "Replica"
    request: Request
    last_heard: float = 0.0
    pieces: int = 0
    waiting_since: float = 0.0
    working: bool = False
    local_port: int = 0
    closed: bool = False
    reads: int = 0

    @property
    def body(self) -> Json:
        body: Json = json.loads(self.request.body)
        return body

    async def start(self) -> Head:
        self.replica.calls.append(self)
        await asyncio.sleep(0)
        chat = self.request.path.startswith("/v1/chat")
        return Head(404 if chat and self.replica.no_chat else self.replica.status, ())

    async def read(self, _offer: Offer | None = None) -> bytes:
        self.reads += 1
        if self.reads > 1:
            return b""
        await self.replica.pace.wait()
        body = self.body
        prompt = body["prompt"] if "prompt" in body else body["messages"][0]["content"]
        text = self.replica.says(self.replica, prompt, body)
        if not text:
            return b""
        choice: Json = {"index": 0, "finish_reason": "length"}
        choice |= {"text": text} if "prompt" in body else {"delta": {"content": text}}
        return b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\ndata: [DONE]\n\n"

    def abort(self, error: ExchangeError) -> None:
        raise AssertionError(error)

    def abandon(self, watcher: Watcher) -> None:
        self.watcher = watcher

    def close(self) -> None:
        self.closed = True


@dataclass(eq=False)
class Replica:
    """Answers as ``says``; ``pace`` holds its answers back."""

    index: int
    says: Says = as_asked
    status: int = 200
    no_chat: bool = False
    state: State = State.READY
    responsive: bool = True
    slots: int = 8
    width: int = 8
    generation: int = 1
    report: EngineReport | None = None
    pace: asyncio.Event = field(default_factory=asyncio.Event)
    calls: list[Call] = field(default_factory=list)
    flight: InFlight = field(default_factory=InFlight)
    unloaded = loading_on_demand = recently_denied = False

    def set_demand(self, queued: int, *, accompanied: bool) -> None:
        pass

    def look_again(self) -> None:
        raise AssertionError("no request of a client was refused")

    def load(self) -> None:
        raise AssertionError("a self-test loads no model")

    def __post_init__(self) -> None:
        self.on_change: Callable[[], None] = lambda: None
        self.spec = BackendSpec(f"m:{self.index}", "m", self.index, "default_model", Launch(()))
        self.dialer: Dialer = self
        self.identity = EngineIdentity(self.spec)
        self.pace.set()

    @property
    def id(self) -> str:
        return self.spec.id

    @property
    def inflight(self) -> int:
        return len(self.flight)

    @property
    def is_up_or_starting(self) -> bool:
        return self.state is State.READY

    @property
    def recovers(self) -> bool:
        return self.is_up_or_starting

    @property
    def limit(self) -> InflightLimit:
        return InflightLimit(self.width, "as configured")

    def has_slot(self) -> bool:
        return self.state is State.READY and len(self.flight) < self.slots and not self.flight.anybody_alone

    def fits(self, _request: SlotRequest, _share: float = 1.0) -> bool:
        return True

    prompt_bound: PromptBound | None = None

    def shortage(self, _request: SlotRequest) -> None:
        return None

    def admit(self) -> Lease:
        lease = Lease(self, self, 0.0)
        self.flight.add(lease)
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

    def snapshot(self) -> Snapshot:
        slots = self.slots if self.state is State.READY else 0
        return Snapshot(self.id, "m", self.state, None, None, self.flight.clients, 0, 1, 0.0, None, slots=slots)

    def open(self, request: Request) -> Exchange:
        return Call(self, request)

    async def aclose(self) -> None:
        pass

    async def diagnose(self, error: ExchangeError, lease: Lease) -> CallFailure:
        return CallFailure(Failure(Cause.KILLED, Aftermath.EXITED, error.detail))

    async def dropped_call(self, *, since: float, within: float) -> bool:
        return False


class Running:
    def __init__(self, *replicas: Replica) -> None:
        self.pool = Pool(replicas, max_queue=10, queue_timeout=60.0)
        self.replicas = replicas
        self.told: list[Proof] = []
        self.task = asyncio.ensure_future(DeterminismTest("m", self.pool, self.told.append, retry_delay=0.005).run())

    async def result(self) -> Proof:
        await asyncio.wait_for(self.task, 30.0)
        assert self.told[:-1] in ([Proof.PENDING], [])
        return self.told[-1]

    @property
    def calls(self) -> list[Call]:
        return [call for replica in self.replicas for call in replica.calls]


@asynccontextmanager
async def running(*replicas: Replica) -> AsyncIterator[Running]:
    one = Running(*replicas)
    try:
        yield one
    finally:
        one.task.cancel()
        await asyncio.gather(one.task, return_exceptions=True)
    assert all(call.closed for call in one.calls)
    assert all(replica.inflight == 0 for replica in replicas)


# -- what it concludes -------------------------------------------------------------------------------------------------


async def test_the_same_everywhere() -> None:
    async with running(Replica(0), Replica(1)) as one:
        assert await one.result() is Proof.VERIFIED
    first, second = ([call.body for call in replica.calls] for replica in one.replicas)
    assert first == second[:3]
    assert [body.get("seed") for body in first] == [None, None, 7]
    assert [body["messages"][0]["content"] for body in second[3:]][:2] == list(PROMPTS)
    assert len(second) == 7
    assert all(body["stream"] and body["max_tokens"] == TOKENS for body in first)


@pytest.mark.parametrize("differs", ["greedy", "seeded"])
async def test_another_text_elsewhere(differs: str) -> None:
    def own(replica: Replica, prompt: str, body: Json) -> str:
        return f"{replica.id} {prompt}" if (body["temperature"] == 0) is (differs == "greedy") else prompt

    async with running(Replica(0, own), Replica(1, own)) as one:
        assert await one.result() is Proof.OFF


async def test_another_text_in_company() -> None:
    def crowded(replica: Replica, prompt: str, body: Json) -> str:
        return f"{prompt} {replica.inflight > 1}"

    async with running(Replica(0, crowded), Replica(1, crowded)) as one:
        assert await one.result() is Proof.IDLE_ONLY
    async with running(Replica(0, crowded, width=1), Replica(1, crowded, width=1)) as one:
        assert await one.result() is Proof.VERIFIED, "there is never any company"


async def test_one_replica_is_asked_twice() -> None:
    async with running(Replica(0)) as one:
        assert await one.result() is Proof.VERIFIED
    count = itertools.count()
    async with running(Replica(0, lambda *_: str(next(count)))) as one:
        assert await one.result() is Proof.OFF
    async with running(Replica(0, lambda replica, prompt, _: f"{prompt} {replica.inflight > 1}")) as one:
        assert await one.result() is Proof.IDLE_ONLY


async def test_a_model_without_chat() -> None:
    async with running(Replica(0, no_chat=True), Replica(1, no_chat=True)) as one:
        assert await one.result() is Proof.VERIFIED


# -- what it fails of --------------------------------------------------------------------------------------------------


async def test_one_that_refuses_is_left_in_peace() -> None:
    async with running(Replica(0, status=500), Replica(1)) as one:
        assert await one.result() is Proof.OFF
        assert len(one.calls) == 2 * MAX_FAILURES


@pytest.mark.parametrize("broken", [ExchangeError(Fault.RESET, "reset"), None])
async def test_one_that_it_ends_is_not_ended_for_ever(broken: ExchangeError | None) -> None:
    """With an error, or with a stream that just ends."""
    deaths = 0

    def dies_in_company(replica: Replica, prompt: str, body: Json) -> str:
        nonlocal deaths
        if replica.inflight < 4:
            return prompt
        deaths += 1
        if broken is not None:
            raise broken
        return ""

    async with running(Replica(0, dies_in_company), Replica(1, dies_in_company)) as one:
        assert await one.result() is Proof.OFF
    assert deaths == MAX_FAILURES


# -- in nobody's way ---------------------------------------------------------------------------------------------------


async def test_it_waits_until_both_are_ready_and_idle() -> None:
    loading = Replica(1, state=State.STARTING)
    async with running(Replica(0), loading) as one:
        client = one.replicas[0].admit()
        loading.state = State.READY
        await asyncio.sleep(0.05)
        assert (one.told, one.calls) == ([Proof.PENDING], [])
        client.release()
        assert await one.result() is Proof.VERIFIED


async def test_it_waits_until_one_that_was_restarted_has_its_whole_share() -> None:
    async with running(Replica(0), Replica(1, slots=3)) as one:
        await asyncio.sleep(0.05)
        assert not one.calls
        one.replicas[1].slots = 4
        one.replicas[1].on_change()
        assert await one.result() is Proof.VERIFIED


async def test_its_requests_are_not_shown_as_traffic() -> None:
    held = Replica(0)
    held.pace.clear()
    async with running(held, Replica(1)) as one:
        await until(lambda: held.inflight == 1, "the test is under way")
        assert held.snapshot().inflight == 0
        assert not held.has_slot(), "yet it has its slot, alone"
        held.pace.set()
        assert await one.result() is Proof.VERIFIED


@pytest.mark.parametrize("where", [0, 1])
async def test_it_steps_back_for_a_client(where: int) -> None:
    held = Replica(0)
    held.pace.clear()
    async with running(held, Replica(1)) as one:
        await until(lambda: held.inflight == 1, "the test is under way")
        wanted = Excluded(backends=frozenset({f"m:{1 - where}"}))
        client = await asyncio.wait_for(one.pool.acquire(SlotRequest(exclude=wanted)), 10.0)
        assert isinstance(client, Lease)
        await until(lambda: held.calls[0].closed, "the test has been cancelled")
        assert [r.inflight for r in one.replicas] == [int(where == i) for i in range(2)]
        held.pace.set()
        client.release()
        assert await one.result() is Proof.VERIFIED

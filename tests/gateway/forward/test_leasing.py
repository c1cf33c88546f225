"""What a request asks of the pool: as a newcomer, and when it was admitted before."""

from types import SimpleNamespace
from typing import Any

import pytest

from backends.admission.slot_request import SlotRequest
from backends.domain.priority import Priority
from backends.domain.refusal import Refusal, Why
from backends.domain.snapshot import Seat
from backends.domain.work import NO_WORK
from gateway.forward.leasing import Denied, Leasing
from gateway.forward.request_state import Progress
from gateway.policy.affinity import NO_PATH
from gateway.policy.cached_prompts import NO_PROMPT
from gateway.policy.request_guard import RequestGuard
from gateway.policy.routing import Routes
from gateway.policy.slicing import Slice, Slicing

FULL = Refusal(Why.QUEUE_FULL)


class Pool:
    """Its queue is full."""

    def __init__(self) -> None:
        self.backends = self.seats = self.ids = ()
        self.queue_timeout = 60.0
        self.asked: list[SlotRequest] = []

    def ready(self, _exclude: object) -> bool:
        return True

    async def acquire(self, request: SlotRequest, **_: object) -> Refusal:
        self.asked.append(request)
        return FULL


@pytest.fixture
def pool() -> Pool:
    return Pool()


@pytest.fixture
def leasing(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> Leasing:
    fleet: Any = SimpleNamespace(pools={"m": pool}, backends={})
    made = Leasing(fleet, Routes({"m": "m"}, {"m": ()}), {}, RequestGuard({"m": None}), clock=lambda: 0.0)
    monkeypatch.setattr(made, "_work", lambda *_: NO_WORK)
    monkeypatch.setattr(made, "_priority", lambda *_: Priority.INTERACTIVE)
    monkeypatch.setattr(made, "unbatchable", lambda *_: False)
    return made


def request(**progress: Any) -> Any:
    return SimpleNamespace(
        progress=Progress(model="m", **progress),
        model="m",
        sizes={"m": None},
        path=NO_PATH,
        prompt=NO_PROMPT,
        parsed=SimpleNamespace(prompt_chars=8000),
        deadline=None,
        client_deadline=None,
    )


def in_slices(count: int) -> Slicing:
    plan = Slicing(8000, 8000, 0, proven=True)
    plan.sit(Seat("m:0", 1))
    for number in range(count):
        plan.note(Slice(1000 * (number + 1), 1000 * (number + 1), 1000 * number, 1.0))
    return plan


@pytest.mark.parametrize(
    ("progress", "goes_on"),
    [
        ({}, False),
        ({"slicing": in_slices(0)}, False),
        ({"slicing": in_slices(2)}, True),
        ({"failures": ["it was stopped, so that the others fit"]}, True),
    ],
)
async def test_what_was_admitted_before_goes_on(
    leasing: Leasing, pool: Pool, progress: dict[str, Any], goes_on: bool
) -> None:
    assert await leasing.acquire(request(**progress)) == Denied(FULL, "m")
    (asked,) = pool.asked
    assert (asked.goes_on, asked.again, bool(asked.exclude)) == (goes_on, goes_on, False)


async def test_an_answer_in_its_middle_and_a_prompt_between_two_slices_go_on(leasing: Leasing, pool: Pool) -> None:
    assert await leasing.again(request(), idle=False) is FULL
    plan = in_slices(2)
    assert await leasing.turn(request(slicing=plan), plan) == Denied(FULL, "m")
    assert [asked.goes_on for asked in pool.asked] == [True, True]
    assert [asked.long for asked in pool.asked] == [False, True]

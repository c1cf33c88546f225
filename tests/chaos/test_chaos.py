"""Everything at once, for a while: three real replicas that go down at random, under sixteen clients of every kind.

    CHAOS_SEED=7 CHAOS_SECONDS=300 uv run pytest tests/chaos

Each request has exactly one outcome. Afterwards all is as it was before: processes, descriptors, tasks, slots, memory.
"""

import os
import random
import threading
import time
from itertools import product
from pathlib import Path

import psutil
import pytest

from tests.chaos.clients import COMPLETION, LENGTHS, PROMPTS, Clients, body_of
from tests.chaos.faults import Faults
from tests.chaos.ledger import Ledger, Outcome
from tests.conftest import Launch
from tests.integration.harness import Gateway, wait_until
from tests.integration.wire import CHAT, Json, whole

SECONDS = float(os.environ.get("CHAOS_SECONDS", "25"))
SEED = int(os.environ.get("CHAOS_SEED", str(random.randrange(10**6))))
AT_ONCE = 16
FAULT_EVERY = (4.0, 10.0)  # seconds; each costs a restart, which takes some seconds of a core
GROWTH = 24 << 20  # bytes that the gateway may grow after the first third: caches of the allocator, not leaks
SPOILT = ("Traceback", "internal error", "supervision failed", "monitor failed", "never retrieved", "never awaited")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(SECONDS + 240)]


def config(model: Path) -> Json:
    tiny = {
        "model": str(model),
        "replicas": 3,
        "timeouts": {"progress": "10s", "stop": "2s"},
        "restart": {"min_backoff": "200ms", "max_backoff": "1s", "max_failures": 10_000},
    }
    return {"server": {"max_body": 200_000}, "models": {"tiny": tiny}}


class Resources:
    """Of the gateway's own process."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._process = psutil.Process(gateway.process.pid)
        self.memory: list[int] = []

    def sample(self) -> None:
        self.memory.append(self._process.memory_info().rss)

    def now(self) -> dict[str, int]:
        told = self._gateway.http.get("/api/status").json()
        return {
            "descriptors": self._process.num_fds(),
            "threads": self._process.num_threads(),
            "children": len(self._process.children(recursive=True)),
            "tasks": told["tasks"],
            "inflight": self._gateway.inflight(),
            "queued": told["models"]["tiny"]["queued"],
        }

    def settled(self, before: dict[str, int]) -> bool:
        """The threads of the pool that asyncio keeps may have grown in number; nothing else may."""
        now = self.now()
        return all(now[name] <= before[name] for name in before if name != "threads") and now["threads"] < 40


def test_chaos(tiny_model: Path, launch: Launch) -> None:
    print(f"CHAOS_SEED={SEED} CHAOS_SECONDS={SECONDS:g}")  # noqa: T201  shown when it fails
    gateway = launch(config(tiny_model))
    wait_until(lambda: gateway.health()["models"]["tiny"]["resume"] == "verified", what="the self-test")
    keys = list(product((CHAT, COMPLETION), PROMPTS, LENGTHS))
    expected = {key: gateway.ask(body_of(key), key[0]).text for key in keys}
    resources, ledger = Resources(gateway), Ledger()
    before = resources.now()
    faults = Faults(gateway, random.Random(SEED), FAULT_EVERY)
    with faults.going_on():
        storm(Clients(gateway, ledger, expected), resources)

    print(ledger.counts, faults.done, gateway.http.get("/api/status").json()["models"]["tiny"]["resumes"])  # noqa: T201
    assert not ledger.wrong
    assert all(entry.outcome is not None for entry in ledger.entries)
    counts = ledger.counts
    assert counts[Outcome.COMPLETE] >= 0.5 * (len(ledger.entries) - counts[Outcome.LEFT] - counts[Outcome.REFUSED])
    assert sum(faults.done.values()) >= SECONDS / 20

    gateway.await_health(deadline=90)
    wait_until(lambda: resources.settled(before), 30, f"what there was: {before}; now {resources.now()}")
    early, late = resources.memory[len(resources.memory) // 3], max(resources.memory[-3:])
    assert late - early <= GROWTH, resources.memory
    for key in keys[::4]:
        answer = gateway.ask({**body_of(key), "stream": True}, key[0])
        assert whole(answer)
        assert answer.text == expected[key]
    assert [line for line in gateway.log.splitlines() if any(word in line for word in SPOILT)] == []


def storm(clients: Clients, resources: Resources) -> None:
    until = time.monotonic() + SECONDS
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        chance = random.Random(seed)
        try:
            while time.monotonic() < until:
                clients.one(chance)
        except BaseException as error:  # noqa: BLE001  raised again below
            errors.append(error)

    workers = [threading.Thread(target=work, args=(SEED * 100 + i,)) for i in range(AT_ONCE)]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        resources.sample()
        workers[0].join(2.0)
        for worker in workers[1:]:
            worker.join(0.01)
    if errors:
        raise errors[0]

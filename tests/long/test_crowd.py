"""Crowds that run the only replica of a model out of memory, one after the other: six prompts that fit one by one, six
answers that are being written, and sometimes a prompt that does not fit alone. On the real mlx_lm.server, on Linux.

    pytest -m slow -s tests/long/test_crowd.py        CROWD_ROUNDS=12 by default, about 20 s each
"""

import os
import random
import sys
from pathlib import Path

import pytest

from tests.conftest import Launch
from tests.integration.harness import Gateway, wait_until
from tests.integration.limits import MemoryLimit
from tests.integration.test_live_crowd import MODEL, ROOM, TOO_LONG, WORDS, together
from tests.integration.wire import Answer, Json, chat, whole

ROUNDS = int(os.environ.get("CROWD_ROUNDS", "12"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(120 * ROUNDS),
    pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are of Linux"),
]


def alone(answer: Answer) -> bool:
    """Refused after it had failed alone, or by what that has taught."""
    told = answer.error is not None and "was alone on it" in answer.error["message"]
    return answer.code == "context_length_exceeded" or (told and answer.code == "backend_oom")


def prompts_of(number: int, count: int, chance: random.Random) -> list[Json]:
    """Streamed or not; no two rounds have the same."""
    words = [WORDS + chance.randrange(60) for _ in range(count)]
    if number % 3 == 2:
        words.append(TOO_LONG + number)
    chance.shuffle(words)
    texts = [f"{number}/{i} " + "the river and the lamp " * length for i, length in enumerate(words)]
    return [chat(text, max_tokens=5, stream=chance.random() < 0.5) for text in texts]


@pytest.mark.parametrize("replicas", [1, 2])
def test_crowds_one_after_the_other(launch: Launch, tiny_model: Path, tmp_path: Path, replicas: int) -> None:
    chance = random.Random(replicas)
    memory = MemoryLimit(tmp_path / "limit")
    model = {"model": str(tiny_model), "replicas": replicas, "env": memory.env, **MODEL}
    gateway = launch({"models": {"tiny": model}})
    wait_until(lambda: gateway.health()["models"]["tiny"]["resume"] == "verified", what="the self-test")
    undisturbed = [one.text for one in together(gateway)[0]]
    memory.apply(gateway, [f"tiny:{i}" for i in range(replicas)], ROOM)
    for number in range(ROUNDS):
        died = deaths(gateway)
        streamed, answered = together(gateway, prompts_of(number, 6 * replicas, chance))
        outcomes = sorted(f"{one.status} {one.code or ''} {one.attempts}" for one in answered)
        gone = deaths(gateway) - died
        resumed = gateway.http.get("/api/status").json()["models"]["tiny"]["resumes"]
        told = f"{gone} deaths, bystanders whole: {sum(map(whole, streamed))}, resumes so far: {resumed}, {outcomes}"
        sys.stdout.write(f"\nround {number}: {told}")
        assert all(map(whole, streamed)), streamed
        assert [one.text for one in streamed] == undisturbed
        assert all(whole(one) or alone(one) for one in answered), answered
        assert sum(whole(one) for one in answered) == 6 * replicas, "each of the six fits"
        gateway.await_health()


def deaths(gateway: Gateway) -> int:
    return sum(int(b["restarts"]) for b in gateway.health()["models"]["tiny"]["backends"])

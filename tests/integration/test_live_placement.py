"""A long prompt and short ones on two replicas of the real server: they do not share a batch."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.conftest import Launch
from tests.integration.harness import Background, wait_until
from tests.integration.wire import Json, chat, whole

pytestmark = pytest.mark.slow


def words(count: int, name: str) -> str:
    return " ".join(f"{name}{i} bridge lamp {i * 7}" for i in range(count))


def test_short_requests_keep_away_from_a_long_prompt_that_is_read(tiny_model: Path, launch: Launch) -> None:
    model: Json = {"model": str(tiny_model), "resume": "off", "replicas": 2}
    gateway = launch({"models": {"tiny": model}})
    assert whole(gateway.ask(chat(words(330, "mill"), max_tokens=1)))  # shows how fast it reads prompts of such sizes

    long = Background(lambda: gateway.ask(chat(words(620, "river"), max_tokens=1)))
    wait_until(lambda: gateway.inflight() == 1, what="the long prompt is being read")
    with ThreadPoolExecutor(4) as people:
        asked = [chat(f"A short question, number {number}", max_tokens=4) for number in range(4)]
        short = list(people.map(gateway.ask, asked))
    assert long.running, "they were answered meanwhile"
    answer = long.result()
    assert all(map(whole, (answer, *short)))
    assert "slices=" not in gateway.log, "it need not be read in slices"
    mine = answer.headers["x-gateway-backend"]
    assert {one.headers["x-gateway-backend"] for one in short} == {"tiny:0", "tiny:1"} - {mine}

    decision = gateway.http.get("/api/status").json()["models"]["tiny"]["decisions"][-1]
    assert (decision["choice"], decision["how"]) == (mine, "join")
    assert decision["alternatives"].keys() == {"tiny:0", "tiny:1"}
    assert all(cost["read"] >= 1.5 for cost in decision["alternatives"].values())

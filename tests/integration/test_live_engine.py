"""mlx_lm.server where the gateway did not write its command line: behind a wrapper script, and at a URL."""

import contextlib
import itertools
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest

from tests.integration.harness import Background, Gateway, launched
from tests.integration.wire import Answer, Json, chat, whole

pytestmark = pytest.mark.slow

CLIENTS = 3


class Pair(NamedTuple):
    """``near`` runs the wrapper; ``far`` reaches the same two servers by their URLs."""

    near: Gateway
    far: Gateway


@pytest.fixture(scope="module")
def pair(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    line = f"'{sys.executable}' -m mlx_lm server --model '{tiny_model}' --host {{host}} --port {{port}}; exit 1"
    wrapped: Json = {"command": ["sh", "-c", line], "replicas": 2, "resume": "off"}
    folder = tmp_path_factory.mktemp("engine")
    with launched({"models": {"tiny": wrapped}}, folder / "near") as near:
        urls = [near.backend_url(f"tiny:{index}") for index in range(2)]
        with launched({"models": {"tiny": {"urls": urls}}}, folder / "far") as far:
            yield Pair(near, far)


def engines(gateway: Gateway) -> list[str]:
    status = gateway.http.get("/api/status").json()
    return [backend["engine"] for backend in status["models"]["tiny"]["backends"]]


def test_it_is_recognised_and_needs_no_name(pair: Pair) -> None:
    for gateway in pair:
        assert engines(gateway) == ["mlx_lm.server"] * 2
        answer = gateway.ask(chat("hello", stream=True))
        assert whole(answer), answer
        refused = gateway.ask(chat("hello", logit_bias={"5": 1.0}))
        assert (refused.status, refused.code) == (400, "invalid_request"), "no vocabulary to check the ids against"


def test_a_dead_generation_thread_costs_no_client_its_answer(pair: Pair) -> None:
    old = pair.near.backend("tiny:0")
    url = pair.near.backend_url("tiny:0")
    over: list[str] = []

    def ask_on(gateway: Gateway) -> Answer:
        for count in itertools.count():
            answer = gateway.ask(chat(f"hello {count}", max_tokens=4))
            if over or not whole(answer):
                return answer
        raise AssertionError

    clients = [Background(partial(ask_on, gateway)) for gateway in pair for _ in range(CLIENTS)]
    with contextlib.suppress(httpx.RemoteProtocolError):  # the process may be replaced before it has answered
        httpx.post(f"{url}/v1/completions", json={"prompt": ["a", "b"], "max_tokens": 1}, timeout=30.0)
    pair.near.await_life("tiny:0", old["pid"])
    pair.far.await_state("tiny:0", "unreachable")
    over.append("over")
    for client in clients:
        answer = client.result()
        assert whole(answer), answer
    assert pair.near.backend("tiny:0")["last_failure"]["cause"] == "wedge"
    assert pair.near.backend("tiny:1")["restarts"] == 0

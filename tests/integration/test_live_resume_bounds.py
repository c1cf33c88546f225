"""When going on with an answer is not worth it, or not at the expense of others."""

import time
from collections.abc import Iterator
from pathlib import Path
from signal import SIGKILL
from typing import Any

import pytest

from tests.conftest import Launch
from tests.integration.harness import QUICK_RESTART, Background, Gateway, fake, launched, wait_until
from tests.integration.wire import Answer, Json, Stream, chat, whole

pytestmark = pytest.mark.slow

STAYS_AWAY = {"min_backoff": "10m", "max_backoff": "10m"}
CROWD = "crowd=1 delay=0.005"  # as on a GPU: within a batch another text than alone


def await_proof(gateway: Gateway, model: str, proof: str) -> None:
    wait_until(lambda: gateway.health()["models"][model]["resume"] == proof, what=f"{model} {proof}")


def resumes(gateway: Gateway, model: str) -> Json:
    told: Json = gateway.http.get("/api/status").json()["models"][model]["resumes"]
    return told


def greedy(words: str, model: str, **more: Any) -> Json:
    return chat(words, model, temperature=0, max_tokens=100_000, **more)


def kill_its(gateway: Gateway, stream: Stream) -> str:
    """The other replica."""
    name = stream.answer.headers["x-gateway-backend"]
    gateway.signal_backend(name, SIGKILL)
    return name[:-1] + ("1" if name.endswith("0") else "0")


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    models = {
        "alone": fake(CROWD, replicas=2, restart=STAYS_AWAY),
        "busy": fake(CROWD, replicas=2, restart=STAYS_AWAY),
        "hasty": fake(replicas=2, restart=QUICK_RESTART, timeouts={"total": "4s"}),
        "gone": fake("load=exit exit=1", fallbacks=["back"], restart=STAYS_AWAY),
        "back": fake(replicas=2, restart=QUICK_RESTART),
        "away": fake("load=exit exit=1", replicas=2, fallbacks=["fickle"], restart=STAYS_AWAY),
        "fickle": fake("diverge=0", replicas=2, restart=QUICK_RESTART),
    }
    with launched({"models": models}, tmp_path_factory.mktemp("bounds"), ready=False) as running:
        proofs = {"alone": "idle_only", "busy": "idle_only", "hasty": "verified", "back": "verified", "fickle": "off"}
        for model, proof in proofs.items():
            await_proof(running, model, proof)
        yield running


def test_others_wait_only_until_it_has_caught_up(gateway: Gateway) -> None:
    words = "FAKE crowd=1 n=300 delay=0.01"
    expected = gateway.ask(greedy(words, "alone", stream=True))
    with gateway.stream(greedy(words, "alone")) as stream:
        stream.until_text(400)
        kill_its(gateway, stream)
        stream.until_text(len(expected.text) // 2)
        assert whole(gateway.ask(greedy("FAKE n=1", "alone"))), "it was let in beside it"
        assert stream.answer.finish is None
        answer = stream.rest()
    assert whole(answer)
    assert expected.text.startswith(answer.text[:400])
    assert resumes(gateway, "alone")["spliced"] == 1


def test_nobody_is_kept_out_for_a_replay_that_needs_to_be_alone(gateway: Gateway) -> None:
    with gateway.stream(greedy("FAKE n=1000 delay=0.01", "busy")) as first:
        first.until_text()
        with gateway.stream(greedy("FAKE n=300 delay=0.01", "busy")) as second:
            second.until_text()
            assert kill_its(gateway, first) == second.answer.headers["x-gateway-backend"]
            wait_until(lambda: gateway.http.get("/api/status").json()["models"]["busy"]["queued"] == 1)
            assert whole(gateway.ask(greedy("FAKE n=1", "busy"))), "it was let in meanwhile"
            assert second.answer.finish is None
            assert whole(second.rest())
        assert whole(first.rest()), "it has gone on as soon as the replica was idle"
    told = resumes(gateway, "busy")
    assert (told["tried"], told["spliced"], told["failed"]) == (1, 1, 0)


def test_what_would_take_too_long_is_not_begun(gateway: Gateway) -> None:
    began = time.monotonic()
    with gateway.stream(greedy("FAKE n=1000 delay=0.02", "hasty")) as stream:
        while time.monotonic() - began < 2.5:
            assert stream.event() is not None
        other = kill_its(gateway, stream)
        answer = stream.rest()
        assert gateway.backend(other)["inflight"] == 0
    assert (answer.code, answer.done, answer.finish) == ("backend_crashed", True, None)
    assert resumes(gateway, "hasty")["tried"] == 0


@pytest.mark.parametrize(("asked", "by", "spliced"), [("gone", "back", 1), ("away", "fickle", 0)])
def test_what_counts_is_the_model_that_answers(asked: str, by: str, spliced: int, gateway: Gateway) -> None:
    gateway.await_state(f"{asked}:0", "backoff")
    before = resumes(gateway, by)
    with gateway.stream(greedy("FAKE n=60 delay=0.02", asked)) as stream:
        stream.until_text(50)
        kill_its(gateway, stream)
        answer = stream.rest()
    assert answer.headers["x-gateway-model"] == by
    assert whole(answer) is bool(spliced)
    after = resumes(gateway, by)
    assert (after["tried"] - before["tried"], after["spliced"] - before["spliced"]) == (spliced, spliced)
    assert resumes(gateway, asked)["tried"] == 0


def test_the_test_at_the_start_is_no_traffic(tiny_model: Path, launch: Launch) -> None:
    """With mlx_lm.server itself: nothing of it is seen, and a client that comes is served."""
    gateway = launch({"models": {"tiny": {"model": str(tiny_model), "replicas": 2}}})
    asked: list[Background] = []

    def proved() -> bool:
        told = gateway.health()["models"]["tiny"]
        assert [backend["inflight"] for backend in told["backends"]] in ([0, 0], [0, 1], [1, 0])
        if len(asked) < 3 and not any(one.running for one in asked):
            asked.append(Background(lambda: gateway.ask(chat("hello", max_tokens=5))))
        return bool(told["resume"] == "verified")

    wait_until(proved)
    answers: list[Answer] = [one.result() for one in asked]
    assert all(whole(answer) and answer.attempts == 1 for answer in answers)

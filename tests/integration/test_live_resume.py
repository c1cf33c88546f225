"""Streams that are cut in their middle by the death of their backend, and go on on another."""

import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from signal import SIGKILL

import pytest

from tests.conftest import Launch
from tests.integration.harness import Background, Gateway, fake, launched, wait_until
from tests.integration.wire import CHAT, Answer, Json, chat, whole

pytestmark = pytest.mark.slow

CUT = 100  # streams that have lost their backend in their middle
AT_ONCE = 12
COMPLETION = "/v1/completions"
RESTART = {"min_backoff": "50ms", "max_backoff": "100ms", "max_failures": 10_000}
WORDS = "river lamp bridge tower garden stone winter market letter boat".split()  # noqa: SIM905


def await_proof(gateway: Gateway, proof: str = "verified", model: str = "tiny") -> None:
    wait_until(lambda: gateway.health()["models"][model]["resume"] == proof, what=f"{proof}")


def resumes(gateway: Gateway, model: str = "tiny") -> Json:
    told: Json = gateway.http.get("/api/status").json()["models"][model]["resumes"]
    return told


# -- mlx_lm.server itself ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    model: Json = {"model": str(tiny_model), "replicas": 2, "restart": RESTART}
    with launched({"models": {"tiny": model}}, tmp_path_factory.mktemp("resume")) as gateway:
        await_proof(gateway)
        yield gateway


def request(chance: random.Random, count: int) -> tuple[Json, str]:
    """Chats and plain prompts, greedy and seeded."""
    words = " ".join(chance.choices(WORDS, k=chance.randint(1, 30)))
    body: Json = {"max_tokens": chance.randint(200, 600), "stream": True}
    if count % 4 == 3:
        body |= {"temperature": 0.8, "seed": chance.randrange(1000)}
    if count % 5 == 4:
        body |= {"repetition_penalty": 1.3}
    if count % 3 == 2:
        return {"model": "tiny", "prompt": words, **body}, COMPLETION
    return chat(words, **body), CHAT


def together(work: list[Callable[[], Answer]]) -> list[Answer]:
    return [one.result() for one in [Background(each) for each in work]]


def death_among(gateway: Gateway, asked: list[tuple[Json, str]], chance: random.Random) -> list[Answer]:
    """All at once, on both replicas; when some have begun to speak, one of the replicas dies."""
    begun = threading.Semaphore(0)

    def read(body: Json, path: str) -> Answer:
        with gateway.stream(body, path) as stream:
            stream.until_text()
            begun.release()
            return stream.rest()

    reading = [Background(lambda one=one: read(*one)) for one in asked]  # type: ignore[misc]
    for _ in range(chance.randint(len(asked) // 3, len(asked) * 2 // 3)):
        assert begun.acquire(timeout=60)
    gateway.signal_backend(chance.choice(["tiny:0", "tiny:1"]), SIGKILL)
    return [one.result() for one in reading]


@pytest.mark.timeout(600)
def test_a_hundred_streams_with_a_death_in_their_middle(real: Gateway) -> None:
    chance = random.Random(20261126)
    streams = failed = 0
    while resumes(real)["tried"] < CUT:
        real.await_health()
        asked = [request(chance, streams + i) for i in range(AT_ONCE)]
        wanted = together([lambda one=one: real.ask(*one) for one in asked])  # type: ignore[misc]
        for answer, expected in zip(death_among(real, asked, chance), wanted, strict=True):
            assert (answer.status, answer.done, answer.dropped) == (200, True, "")
            if answer.error is None:
                assert (answer.text, answer.finish) == (expected.text, expected.finish)
                assert len({event["id"] for event in answer.events}) == 1
            else:
                assert expected.text.startswith(answer.text)
                assert answer.code == "backend_crashed"
                failed += 1
        streams += AT_ONCE
    told = resumes(real)
    assert told["spliced"] >= 0.95 * told["tried"], told
    assert told["spliced"] + told["diverged"] + told["failed"] == told["tried"]
    assert failed == told["diverged"] + told["failed"]
    assert told["wasted"] > 0


# -- replicas that do what they are told -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    models = {
        "tiny": fake(replicas=2, restart=RESTART),
        "fickle": fake("diverge=0", replicas=2, restart=RESTART),
        "late": fake("diverge=40", replicas=2, restart=RESTART),
        "lone": fake(restart=RESTART),
        "off": fake(replicas=2, restart=RESTART, resume="off"),
    }
    with launched({"models": models}, tmp_path_factory.mktemp("resume")) as gateway:
        yield gateway


@pytest.fixture
def gateway(shared: Gateway) -> Gateway:
    shared.await_health()
    for model in ("tiny", "late"):
        await_proof(shared, model=model)
    return shared


def greedy(words: str, model: str = "tiny") -> Json:
    """That is what a server which is not mlx_lm.server needs to be told."""
    return chat(words, model, temperature=0, max_tokens=1000)


def killed(gateway: Gateway, body: Json, after: int = 50) -> Answer:
    with gateway.stream(body) as stream:
        stream.until_text(after)
        gateway.signal_backend(stream.answer.headers["x-gateway-backend"], SIGKILL)
        return stream.rest()


def test_the_proof_is_told(gateway: Gateway) -> None:
    await_proof(gateway, "off", "fickle")
    models = gateway.health()["models"]
    assert {name: model["resume"] for name, model in models.items()} == {
        "tiny": "verified",
        "fickle": "off",
        "late": "verified",
        "lone": "single",
        "off": "off",
    }


@pytest.mark.parametrize("words", ["FAKE n=60 delay=0.02", "FAKE n=60 delay=0.02 reasoning=5 tool=1"])
def test_reasoning_and_calls_go_on(gateway: Gateway, words: str) -> None:
    expected = gateway.ask({**greedy(words), "stream": True})
    answer = killed(gateway, greedy(words))
    assert whole(answer)
    assert (answer.text, answer.finish) == (expected.text, expected.finish)


def test_another_answer_is_not_sent(gateway: Gateway) -> None:
    """Equal for so long as the test at the start had looked, and not after."""
    answer = killed(gateway, greedy("FAKE n=90 delay=0.02", "late"), after=400)
    assert (answer.code, answer.done, answer.finish) == ("backend_crashed", True, None)
    assert resumes(gateway, "late")["diverged"] == 1
    assert answer.error is not None
    assert "discard it" in answer.error["message"]
    wait_until(lambda: gateway.inflight("late") == 0)


@pytest.mark.parametrize(
    "body",
    [
        greedy("FAKE n=60 delay=0.02", "fickle"),
        greedy("FAKE n=60 delay=0.02", "lone"),
        greedy("FAKE n=60 delay=0.02", "off"),
        chat("FAKE n=60 delay=0.02", temperature=0.5),
        chat("FAKE n=60 delay=0.02"),  # who knows what that server does without a temperature
    ],
)
def test_who_is_not_resumed(gateway: Gateway, body: Json) -> None:
    before = resumes(gateway, body["model"])
    answer = killed(gateway, body)
    assert (answer.code, answer.done, answer.finish) == ("backend_crashed", True, None)
    assert resumes(gateway, body["model"]) == before


def test_a_second_death_is_the_end(gateway: Gateway) -> None:
    before = resumes(gateway)
    with gateway.stream(greedy("FAKE n=200 delay=0.02")) as stream:
        stream.until_text(200)
        first = stream.answer.headers["x-gateway-backend"]
        other = "tiny:1" if first == "tiny:0" else "tiny:0"
        gateway.signal_backend(first, SIGKILL)
        wait_until(lambda: gateway.backend(other)["inflight"] == 1)
        gateway.signal_backend(other, SIGKILL)
        answer = stream.rest()
    assert (answer.code, answer.done, answer.finish) == ("backend_crashed", True, None)
    after = resumes(gateway)
    assert (after["tried"], after["failed"]) == (before["tried"] + 1, before["failed"] + 1)


def test_a_client_that_leaves_meanwhile(gateway: Gateway) -> None:
    with gateway.stream(greedy("FAKE n=400 delay=0.02")) as stream:
        stream.until_text(300)
        first = stream.answer.headers["x-gateway-backend"]
        other = "tiny:1" if first == "tiny:0" else "tiny:0"
        gateway.signal_backend(first, SIGKILL)
        wait_until(lambda: gateway.backend(other)["inflight"] == 1)
    wait_until(lambda: gateway.inflight() == 0)


def test_what_ends_a_backend_again_is_not_resumed(launch: Launch) -> None:
    """Alone, and in its middle: the next replica would come to the same point."""
    gateway = launch({"models": {"tiny": fake(replicas=2, restart=RESTART)}})
    await_proof(gateway)
    with gateway.stream(greedy("FAKE segfault n=60 after=20 delay=0.01")) as stream:
        answer = stream.rest()
    assert answer.code == "backend_crashed"
    assert sum(b["restarts"] for b in gateway.health()["models"]["tiny"]["backends"]) <= 1
    assert resumes(gateway)["tried"] == 0

"""Streams that are cut in their middle by the death of their backend, and go on on another."""

import os
import random
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from signal import SIGKILL

import pytest

from tests.conftest import Launch
from tests.integration.harness import Gateway, fake, launched, wait_until
from tests.integration.wire import CHAT, Answer, Json, chat, whole

pytestmark = pytest.mark.slow

STREAMS = int(os.environ.get("RESUME_STREAMS", "6"))  # each costs a restart
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
    body: Json = {"max_tokens": chance.randint(60, 160), "stream": True}
    if count % 4 == 3:
        body |= {"temperature": 0.8, "seed": chance.randrange(1000)}
    if count % 5 == 4:
        body |= {"repetition_penalty": 1.3}
    if count % 3 == 2:
        return {"model": "tiny", "prompt": words, **body}, COMPLETION
    return chat(words, **body), CHAT


@pytest.mark.timeout(900)
def test_streams_with_a_death_in_their_middle(real: Gateway) -> None:
    """An answer that was over before its backend died says nothing here, so deaths in the middle are counted."""
    chance = random.Random(20261126)
    same = count = 0
    while resumes(real)["tried"] < STREAMS:
        assert count < 5 * STREAMS, "nearly all answers were over before their backend died"
        body, path = request(chance, count)
        real.await_health()
        expected = real.ask(body, path)
        assert whole(expected)
        with real.stream(body, path) as stream:
            stream.until_text(chance.randrange(1, max(2, len(expected.text) * 2 // 3)))
            real.signal_backend(stream.answer.headers["x-gateway-backend"], SIGKILL)
            answer = stream.rest()
        assert (answer.status, answer.done, answer.dropped) == (200, True, "")
        if answer.error is None:
            assert (answer.text, answer.finish) == (expected.text, expected.finish), body
            assert len({event["id"] for event in answer.events}) == 1
            same += 1
        else:
            assert expected.text.startswith(answer.text)
            assert answer.code == "backend_crashed"
        count += 1
    told = resumes(real)
    assert same >= 0.95 * count, told
    assert told["spliced"] + told["diverged"] + told["failed"] == told["tried"]
    assert told["spliced"] >= 0.95 * STREAMS, told
    assert told["wasted"] > 0


def test_bystanders_of_a_death_go_on_together(real: Gateway) -> None:
    """Some streams on each replica; all of them end as they would have."""
    real.await_health()
    bodies = [chat(word, max_tokens=300) for word in WORDS[:6]]
    expected = [real.ask({**body, "stream": True}).text for body in bodies]
    with ExitStack() as stack:
        streams = [stack.enter_context(real.stream(body)) for body in bodies]
        for stream in streams:
            stream.until_text(20)
        real.signal_backend("tiny:0", SIGKILL)
        answers = [stream.rest() for stream in streams]
    assert [answer.text for answer in answers] == expected
    assert all(whole(answer) for answer in answers)


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
        "lone": "verified",
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


def test_before_the_test_it_is_tried_too(launch: Launch) -> None:
    """A model in use from its first moment on is never idle, so it is never tested."""
    gateway = launch({"models": {"tiny": fake("load-time=0.5", restart=RESTART)}}, ready=False)
    body = greedy("FAKE n=60 delay=0.02")
    with gateway.stream(body) as stream:  # queued before there is a replica
        stream.until_text(50)
        assert gateway.health()["models"]["tiny"]["resume"] == "pending"
        gateway.signal_backend("tiny:0", SIGKILL)
        answer = stream.rest()
    assert whole(answer)
    assert answer.text == gateway.ask(body).text
    assert resumes(gateway)["spliced"] == 1


def test_the_next_instance_of_the_only_replica_goes_on(gateway: Gateway) -> None:
    body = greedy("FAKE n=60 delay=0.02", "lone")
    expected = gateway.ask({**body, "stream": True})
    answer = killed(gateway, body)
    assert whole(answer)
    assert (answer.text, answer.finish) == (expected.text, expected.finish)
    assert len({event["id"] for event in answer.events}) == 1
    assert resumes(gateway, "lone")["spliced"] == 1


def test_a_suspect_goes_on_once(gateway: Gateway, tmp_path: Path) -> None:
    """It was alone when its backend crashed. Where it was not the cause, it is whole; else it is told so."""
    done = tmp_path / "done"
    body = greedy(f"FAKE segfault n=60 after=30 delay=0.02 once={done}", "lone")
    gateway.await_state("lone:0", "ready")
    answer = gateway.ask({**body, "stream": True})
    assert done.exists()
    expected = gateway.ask({**body, "stream": True})
    assert whole(answer)
    assert (answer.text, answer.finish) == (expected.text, expected.finish)
    poison = gateway.ask({**greedy("FAKE segfault n=60 after=30 delay=0.02", "lone"), "stream": True})
    assert (poison.code, poison.done) == ("backend_crashed", True)
    assert poison.error is not None
    assert "do not send it again unchanged" in poison.error["message"]


def test_all_its_streams_go_on_at_once(gateway: Gateway) -> None:
    """The restarted one, for which all of them wait, is not given them one by one."""
    gateway.await_state("lone:0", "ready")
    body = greedy("FAKE n=100 delay=0.02", "lone")
    expected = gateway.ask({**body, "stream": True})
    with ExitStack() as stack:
        streams = [stack.enter_context(gateway.stream(body)) for _ in range(4)]
        for stream in streams:
            stream.until_text(50)
        gateway.signal_backend("lone:0", SIGKILL)
        wait_until(lambda: gateway.inflight("lone") == 4)
        answers = [stream.rest() for stream in streams]
    assert [(answer.text, answer.error) for answer in answers] == 4 * [(expected.text, None)]


def other_than(backend: str) -> str:
    return "tiny:1" if backend == "tiny:0" else "tiny:0"


def test_a_second_death_before_the_client_got_more_is_a_pause_too(gateway: Gateway) -> None:
    before, body = resumes(gateway), greedy("FAKE n=200 delay=0.02")
    with gateway.stream(body) as stream:
        stream.until_text(200)
        first = stream.answer.headers["x-gateway-backend"]
        gateway.signal_backend(first, SIGKILL)
        wait_until(lambda: gateway.backend(other_than(first))["inflight"] == 1)
        gateway.signal_backend(other_than(first), SIGKILL)
        answer = stream.rest()
    assert whole(answer)
    assert answer.text == gateway.ask(body).text
    after = resumes(gateway)
    assert (after["failed"], after["spliced"]) == (before["failed"] + 1, before["spliced"] + 1)


def test_a_second_death_after_that_is_the_end(gateway: Gateway) -> None:
    gateway.await_health()
    with gateway.stream(greedy("FAKE n=300 delay=0.02")) as stream:
        stream.until_text(50)
        first = stream.answer.headers["x-gateway-backend"]
        gateway.signal_backend(first, SIGKILL)
        stream.until_text(600)
        gateway.signal_backend(other_than(first), SIGKILL)
        answer = stream.rest()
    assert (answer.code, answer.done, answer.finish) == ("backend_crashed", True, None)


def test_a_client_that_leaves_meanwhile(gateway: Gateway) -> None:
    with gateway.stream(greedy("FAKE n=400 delay=0.02")) as stream:
        stream.until_text(300)
        first = stream.answer.headers["x-gateway-backend"]
        other = "tiny:1" if first == "tiny:0" else "tiny:0"
        gateway.signal_backend(first, SIGKILL)
        wait_until(lambda: gateway.backend(other)["inflight"] == 1)
    wait_until(lambda: gateway.inflight() == 0)


def test_what_ends_a_backend_again_is_resumed_once(launch: Launch) -> None:
    """Alone, and in its middle: each replica would come to the same point."""
    gateway = launch({"models": {"tiny": fake(replicas=2, restart=RESTART)}})
    await_proof(gateway)
    with gateway.stream(greedy("FAKE segfault n=60 after=20 delay=0.01")) as stream:
        answer = stream.rest()
    assert answer.code == "backend_crashed"
    assert sum(b["restarts"] for b in gateway.health()["models"]["tiny"]["backends"]) <= 2
    assert resumes(gateway)["tried"] == 1

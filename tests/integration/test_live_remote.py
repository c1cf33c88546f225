"""A gateway in front of another: its answers go through, its errors are understood, its absence is noticed."""

from collections.abc import Iterator
from pathlib import Path
from signal import SIGSTOP
from typing import NamedTuple

import pytest

from tests.integration.harness import QUICK_RESTART, Gateway, fake, free_port, launched, wait_until
from tests.integration.wire import Answer, Json, chat, endless, whole

pytestmark = pytest.mark.slow


class Pair(NamedTuple):
    back: Gateway
    front: Gateway


def of_back(port: int) -> Json:
    slow = fake(restart={"min_backoff": "30s"}, queue_timeout="5s")
    models = {"tiny": fake(restart=QUICK_RESTART), "brittle": slow, "small": fake(max_inflight=1, max_queue=0)}
    return {"server": {"port": port, "api_keys": ["inner"]}, "models": models}


def of_front(port: int) -> Json:
    there: Json = {"urls": [f"http://127.0.0.1:{port}"], "api_key": "inner"}
    return {"models": {name: {**there, "model": name} for name in ("tiny", "brittle", "small")}}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    port = free_port()
    folder = tmp_path_factory.mktemp("remote")
    with launched(of_back(port), folder / "back", ready=False) as back:
        back.http.headers["x-api-key"] = "inner"
        back.await_health()
        with launched(of_front(port), folder / "front") as front:
            yield Pair(back, front)


def test_answers_go_through(pair: Pair) -> None:
    plain = pair.front.ask(chat("hello"))
    streamed = pair.front.ask(chat("hello", stream=True))
    completed = pair.front.ask({"model": "tiny", "prompt": "hello"}, "/v1/completions")
    assert whole(plain)
    assert whole(streamed)
    assert streamed.done
    assert streamed.text == plain.text
    assert whole(completed)
    told = pair.front.backend("tiny:0")
    assert (told["state"], told["pid"], told["restarts"]) == ("ready", None, 0)


def error_of(answer: Answer) -> Json:
    assert answer.error is not None, answer
    return answer.error


def test_a_crash_there_keeps_its_code(pair: Pair) -> None:
    """Before the first word as a status, after it as the tail of the stream; the remote gateway itself stays well."""
    early = pair.front.ask(chat("FAKE metal-oom after=-1", "brittle"))
    assert (early.status, early.code) == (503, "backend_oom")
    assert error_of(early)["backend"] == "brittle:0"
    assert early.headers["x-should-retry"] == "false"
    refused = pair.front.ask(chat("hello", "brittle"))
    assert (refused.status, refused.code) == (503, "model_unavailable")
    assert 1 <= int(refused.headers["retry-after"]) <= 59
    late = pair.front.ask(chat("FAKE killed after=5 delay=0.05", stream=True))
    assert (late.status, late.code, late.done, late.finish) == (200, "backend_crashed", True, None)
    assert len(late.text.split()) == 5
    assert pair.front.backend("tiny:0")["restarts"] == 0
    pair.back.await_state("tiny:0", "ready")


def test_a_full_queue_there(pair: Pair) -> None:
    with pair.front.stream(endless("small")) as first:
        first.until_text()
        answer = pair.front.ask(chat("hello", "small"))
        assert (answer.status, answer.code) == (503, "overloaded")
    wait_until(lambda: pair.back.inflight("small") == 0)
    assert whole(pair.front.ask(chat("hello", "small")))


def test_a_bad_request_there(pair: Pair) -> None:
    answer = pair.front.ask(chat("FAKE status=400"))
    assert (answer.status, answer.code) == (400, "invalid_request")


def test_gone_and_back(tmp_path: Path) -> None:
    port = free_port()
    with launched(of_front(port), tmp_path / "front", ready=False) as front:
        failure = front.await_state("tiny:0", "unreachable")["last_failure"]
        assert failure["cause"] == "unreachable"
        assert front.http.get("/health").status_code == 503
        answer = front.ask(chat("hello"))
        assert (answer.status, answer.code) == (503, "model_unavailable")
        with launched(of_back(port), tmp_path / "back", ready=False):
            front.await_state("tiny:0", "ready")
            assert whole(front.ask(chat("hello")))
        front.await_state("tiny:0", "unreachable")
        with launched(of_back(port), tmp_path / "again", ready=False):
            front.await_state("tiny:0", "ready")
            assert whole(front.ask(chat("hello")))


def test_killed_with_a_stream_under_way(tmp_path: Path) -> None:
    port = free_port()
    with (
        launched(of_back(port), tmp_path / "back", ready=False) as back,
        launched(of_front(port), tmp_path / "front") as front,
    ):
        with front.stream(endless()) as stream:
            stream.until_text()
            back.kill()
            answer = stream.rest()
        assert answer.dropped == ""
        assert answer.done
        assert answer.finish is None
        assert answer.code in ("model_unavailable", "backend_crashed", "stream_truncated")
        front.await_state("tiny:0", "unreachable")


def test_fails_over_from_one_url_to_another(tmp_path: Path) -> None:
    """One of two remote gateways is stopped in its tracks: requests that have seen nothing go to the other."""
    ports = [free_port(), free_port()]
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    model: Json = {"urls": urls, "api_key": "inner", "model": "tiny", "timeouts": {"progress": "3s"}}
    with (
        launched(of_back(ports[0]), tmp_path / "one", ready=False) as one,
        launched(of_back(ports[1]), tmp_path / "two", ready=False),
        launched({"models": {"tiny": model}}, tmp_path / "front") as front,
    ):
        one.process.send_signal(SIGSTOP)
        answers = [front.ask(chat("hello")) for _ in range(2)]
        assert all(whole(answer) for answer in answers)
        assert {answer.headers["x-gateway-backend"] for answer in answers} == {"tiny:1"}
        front.await_state("tiny:0", "unreachable")
        one.kill()

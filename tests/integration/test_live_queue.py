"""Waiting in line: bounded, timed, kept alive, and never a reason to lose an answer."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.harness import QUICK_RESTART, Background, Gateway, fake, launched, wait_until
from tests.integration.wire import Json, Stream, chat, endless, whole

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    narrow: Json = {"max_inflight": 1, "max_queue": 1}
    models = {
        "narrow": fake(**narrow),
        "hurried": fake(**narrow, queue_timeout="2s"),
        "none": fake(max_inflight=1, max_queue=0),
        "classes": fake(max_inflight=1, max_queue=3),
        "lowered": fake(priority="agent"),
        "pair": fake(replicas=2, restart=QUICK_RESTART),
        "lone": fake(restart=QUICK_RESTART),
    }
    with launched({"server": {"keepalive": "1s"}, "models": models}, tmp_path_factory.mktemp("queue")) as running:
        yield running


def occupied(gateway: Gateway, model: str) -> Stream:
    return gateway.stream(endless(model))


def test_the_third_is_refused_at_once(gateway: Gateway) -> None:
    """One is served, one waits; the one that waits is served when the first has left."""
    with occupied(gateway, "narrow") as first:
        first.until_text()
        second = Background(lambda: gateway.ask(chat("hello", "narrow")))
        wait_until(lambda: gateway.queued("narrow") == 1)
        third = gateway.ask(chat("hello", "narrow"))
        assert (third.status, third.code) == (503, "overloaded")
        assert 1 <= int(third.headers["retry-after"]) <= 59
        assert second.running
        assert gateway.inflight("narrow") == 1
    assert whole(second.result())
    wait_until(lambda: gateway.inflight("narrow") == 0)


def test_no_line_at_all(gateway: Gateway) -> None:
    with occupied(gateway, "none") as first:
        first.until_text()
        answer = gateway.ask(chat("hello", "none"))
        assert (answer.status, answer.code) == (503, "overloaded")
    wait_until(lambda: gateway.inflight("none") == 0)
    assert whole(gateway.ask(chat("hello", "none")))


def test_queue_timeout(gateway: Gateway) -> None:
    with occupied(gateway, "hurried") as first:
        first.until_text()
        answer = gateway.ask(chat("hello", "hurried"))
        assert (answer.status, answer.code) == (503, "overloaded")
        assert answer.error is not None
        assert "queue_timeout" in answer.error["message"]
        assert gateway.queued("hurried") == 0


def test_queue_timeout_of_a_stream_that_was_kept_alive(gateway: Gateway) -> None:
    """The comments have committed it to a 200: so the refusal is its last event."""
    with occupied(gateway, "hurried") as first:
        first.until_text()
        answer = gateway.ask(chat("hello", "hurried", stream=True))
    assert (answer.status, answer.code, answer.done, answer.text) == (200, "overloaded", True, "")
    assert answer.comments >= 1
    assert len(answer.events) == 1


def test_waiting_stream_is_kept_alive_and_served(gateway: Gateway) -> None:
    with occupied(gateway, "narrow") as first, occupied(gateway, "narrow") as second:
        first.until_text()
        first.__exit__(None, None, None)
        second.until_text()
        assert second.answer.status == 200


def test_keepalive_while_the_backend_thinks(gateway: Gateway) -> None:
    answer = gateway.ask(chat("FAKE head-delay=2.5", "lone", stream=True))
    assert whole(answer)
    assert answer.done
    assert answer.comments >= 2


@pytest.mark.parametrize("mode", ["eof-before-head", "killed after=-1"])
def test_failover_after_comments(gateway: Gateway, tmp_path: Path, mode: str) -> None:
    """Comments are no content: the stream goes on with another replica."""
    answer = gateway.ask(chat(f"FAKE {mode} head-delay=2.5 once={tmp_path / 'done'}", "pair", stream=True))
    assert whole(answer)
    assert answer.done
    assert answer.comments >= 2
    assert len(answer.text.split()) == 20
    wait_until(lambda: 'failed="pair:' in gateway.log, what="the line of the request, which follows its answer")
    gateway.await_health()


def test_error_of_the_backend_after_comments(gateway: Gateway) -> None:
    answer = gateway.ask(chat("FAKE status=500 head-delay=2.5", "pair", stream=True))
    assert (answer.status, answer.code, answer.done, answer.text) == (200, "generation_failed", True, "")
    assert answer.comments >= 2


def test_death_of_the_only_replica_after_comments(gateway: Gateway) -> None:
    answer = gateway.ask(chat("FAKE killed after=-1 head-delay=2.5", "lone", stream=True))
    assert (answer.status, answer.code, answer.done, answer.text) == (200, "backend_crashed", True, "")
    assert answer.comments >= 2
    gateway.await_health()


def test_an_answer_that_is_not_streamed_is_not_kept_alive(gateway: Gateway) -> None:
    """A comment would be no JSON."""
    answer = gateway.ask(chat("FAKE head-delay=2.5", "lone"))
    assert whole(answer)


def test_a_person_is_served_before_a_crowd_that_nobody_waits_for(gateway: Gateway) -> None:
    """And the crowd is told where it stands; one of it makes room in the full queue."""
    background = {"x-priority": "background"}
    with occupied(gateway, "classes") as first:
        first.until_text()
        crowd = [
            Background(lambda: gateway.ask(chat("FAKE n=3", "classes", stream=True), **background)) for _ in range(3)
        ]
        wait_until(lambda: gateway.queued("classes") == 3)
        person = Background(lambda: gateway.ask(chat("FAKE n=3", "classes")))
        wait_until(lambda: sum(not one.running for one in crowd) == 1)
        with gateway.stream(chat("FAKE n=3", "classes", stream=True), **background) as last:
            assert last.rest().code == "overloaded"
        wait_until(lambda: gateway.queued("classes") == 3)
    answer = person.result()
    assert whole(answer)
    assert answer.headers["x-gateway-queue"].endswith(" s: busy")
    answers = [one.result() for one in crowd]
    assert sorted(map(whole, answers)) == [False, True, True]
    assert next(one.code for one in answers if not whole(one)) == "overloaded"


def test_classes_that_there_are_not(gateway: Gateway) -> None:
    refused = gateway.ask(chat("hello", "classes"), **{"x-priority": "urgent"})
    assert (refused.status, refused.code) == (400, "invalid_request")
    lowered = gateway.ask(chat("hello", "lowered"), **{"x-priority": "interactive"})
    assert whole(lowered)
    assert "x-priority" in lowered.headers["x-gateway-warning"]

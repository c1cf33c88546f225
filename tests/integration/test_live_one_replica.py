"""One replica that is killed again and again, before its answers, in their middle and between them: a crash is a pause.

ONE_REPLICA_REQUESTS=100 pytest tests/integration/test_live_one_replica.py    about 3 s each, of three kinds
"""

import os
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice, product
from pathlib import Path
from signal import SIGKILL, SIGSTOP

import pytest

from tests.integration.harness import Gateway, launched, wait_until
from tests.integration.wire import CHAT, Answer, Json, chat, whole

REQUESTS = int(os.environ.get("ONE_REPLICA_REQUESTS", "2"))  # of each kind; each costs a restart
COMPLETION = "/v1/completions"
WORDS = "river lamp bridge tower garden stone winter market letter boat".split()  # noqa: SIM905
LONG = 400  # tokens: some tenths of a second
Request = tuple[Json, str]  # body, path
MOMENTS = ("before content", "in content", "between requests")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120 + 30 * REQUESTS)]


@pytest.fixture(scope="module")
def gateway(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """Restarts as by default, but for the first delay."""
    model: Json = {"model": str(tiny_model), "restart": {"min_backoff": "100ms"}}
    with launched({"models": {"tiny": model}}, tmp_path_factory.mktemp("one")) as running:
        wait_until(lambda: running.health()["models"]["tiny"]["resume"] == "verified", what="the test of determinism")
        yield running
        assert "state=failed" not in running.log


def request(chance: random.Random, count: int) -> Request:
    """Chats and plain prompts, greedy and seeded. Each has its own words, so that no prompt cache has it whole."""
    words = f"{count} " + " ".join(chance.choices(WORDS, k=chance.randint(1, 30)))
    body: Json = {"max_tokens": LONG}
    if count % 4 == 3:
        body |= {"temperature": 0.8, "seed": chance.randrange(1000)}
    if count % 2:
        return {"model": "tiny", "prompt": words, **body}, COMPLETION
    return chat(words, **body), CHAT


def killed_at(gateway: Gateway, moment: str, asked: Request, middle: float) -> Answer:
    """``middle``: characters of a stream after which the process is killed in content, or seconds."""
    body, path = asked
    if moment == "between requests":
        gateway.signal_backend("tiny:0", SIGKILL)
        return gateway.ask(body, path)
    if moment == "before content":  # a stopped process gets the request, and answers nothing
        gateway.signal_backend("tiny:0", SIGSTOP)
    elif body["stream"]:
        with gateway.stream(body, path) as stream:
            stream.until_text(int(middle))
            gateway.signal_backend("tiny:0", SIGKILL)
            return stream.rest()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(gateway.ask, body, path)
        wait_until(lambda: answer.done() or gateway.inflight() == 1)
        if moment == "in content":
            time.sleep(middle)
        gateway.signal_backend("tiny:0", SIGKILL)
        return answer.result()


def disturbed(gateway: Gateway, moment: str, asked: Request) -> tuple[Answer, Answer]:
    """The answer as it would have been, and as it was. One that is over before its process is killed does not count."""
    body, path = asked
    for _ in range(5):
        pid = gateway.await_state("tiny:0", "ready")["pid"]
        began = time.monotonic()
        expected = gateway.ask(body, path)
        assert whole(expected)
        middle = len(expected.text) / 3 if body["stream"] else (time.monotonic() - began) / 3
        answer = killed_at(gateway, moment, asked, middle)
        gateway.await_life("tiny:0", pid)
        if moment != "in content" or tries(gateway, answer) > 1 or answer.error:
            return expected, answer
    raise AssertionError(f"each answer was over before its process was killed: {body}")


def tries(gateway: Gateway, answer: Answer) -> int:
    """As the log says: the headers of a stream were sent before."""
    line = f"request_id={answer.headers['x-request-id']} "
    found = wait_until(lambda: [each for each in gateway.log.splitlines() if line in each and "attempts=" in each])
    return int(found[-1].partition("attempts=")[2].split()[0])


@pytest.mark.parametrize("stream", [True, False], ids=["streams", "whole"])
def test_each_deterministic_answer_is_whole(gateway: Gateway, stream: bool) -> None:
    chance = random.Random(20261127)
    for count in range(REQUESTS):
        moment = MOMENTS[(count if stream else count + 1) % len(MOMENTS)]
        body, path = request(chance, count)
        expected, answer = disturbed(gateway, moment, ({**body, "stream": stream}, path))
        assert whole(answer), (moment, body, answer)
        assert (answer.text, answer.finish) == (expected.text, expected.finish), (moment, body)


def test_a_sampled_answer_is_whole_or_says_that_it_is_not(gateway: Gateway) -> None:
    """It cannot be repeated: once content was out, an error is the truth."""
    chance = random.Random(7)
    kinds = cycle([("in content", True), *product(MOMENTS, (True, False))])
    for count, (moment, stream) in enumerate(islice(kinds, max(1, REQUESTS // 3))):
        body, path = request(chance, 1000 + count)
        sampled = {**body, "temperature": 0.9, "stream": stream}
        sampled.pop("seed", None)
        _, answer = disturbed(gateway, moment, (sampled, path))
        if moment == "in content" and stream:
            assert (answer.status, answer.code, answer.done, answer.finish) == (200, "backend_crashed", True, None)
            assert answer.text
        else:
            assert whole(answer), (moment, stream, answer)

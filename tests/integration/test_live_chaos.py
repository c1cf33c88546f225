"""A storm of requests over two real replicas, one of which is killed every three seconds."""

import random
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from signal import SIGKILL

import pytest

from tests.conftest import Launch
from tests.integration.harness import QUICK_RESTART, Gateway, wait_until
from tests.integration.wire import CHAT, PATIENCE, Answer, Json, chat

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

REQUESTS = 200
AT_A_TIME = 8
KILL_EVERY = 3.0  # seconds
COMPLETIONS = "/v1/completions"
KINDS = list(product((CHAT, COMPLETIONS), ("hello", "once upon a time", "the river and the lamp"), (20, 100, 300)))


def body_of(kind: tuple[str, str, int], *, stream: bool) -> Json:
    path, prompt, length = kind
    if path == CHAT:
        return chat(prompt, max_tokens=length, stream=stream)
    return {"model": "tiny", "prompt": prompt, "max_tokens": length, "stream": stream}


@contextmanager
def killing(gateway: Gateway) -> Iterator[list[str]]:
    """Every few seconds one that is ready. Gives the ids, as they die."""
    killed: list[str] = []
    over = threading.Event()
    dice = random.Random(1)

    def kill() -> None:
        while not over.wait(KILL_EVERY):
            ready = [b["id"] for b in gateway.health()["models"]["tiny"]["backends"] if b["state"] == "ready"]
            if ready:
                name = dice.choice(ready)
                gateway.signal_backend(name, SIGKILL)
                killed.append(name)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield killed
    finally:
        over.set()
        thread.join()


def fault_of(answer: Answer, expected: str, *, stream: bool) -> str:
    """What is wrong with it; empty for a whole answer and for a structured error."""
    if answer.dropped:
        return f"connection dropped: {answer.dropped}"
    if answer.error is not None:
        error = answer.error
        if answer.status not in (200, 503) or (answer.status == 200 and not answer.done):
            return f"error with status {answer.status}, [DONE] {answer.done}"
        if not (error["code"] and error["type"] == "server_error" and error["request_id"] and error["message"]):
            return f"unstructured: {error}"
        if not expected.startswith(answer.text):
            return "the text before the error is not the beginning of the answer"
        return ""
    if answer.status != 200:
        return f"status {answer.status} without an error"
    if answer.finish != "length" or (stream and not answer.done):
        return f"truncated: finish_reason {answer.finish}, [DONE] {answer.done}"
    return "" if answer.text == expected else "another text than undisturbed"


def test_every_client_gets_a_whole_answer_or_a_structured_error(tiny_model: Path, launch: Launch) -> None:
    tiny = {"model": str(tiny_model), "replicas": 2, "restart": QUICK_RESTART}
    gateway = launch({"models": {"tiny": tiny}})
    expected = {kind: gateway.ask(body_of(kind, stream=False), kind[0]).text for kind in KINDS}
    dice = random.Random(2)
    jobs = [(dice.choice(KINDS), number % 2 == 0) for number in range(REQUESTS)]

    def one(job: tuple[tuple[str, str, int], bool]) -> Answer:
        kind, stream = job
        return gateway.ask(body_of(kind, stream=stream), kind[0])

    with killing(gateway) as killed, ThreadPoolExecutor(AT_A_TIME) as pool:
        answers = list(pool.map(one, jobs))

    assert len(killed) >= 2
    faults = [
        (kind, stream, fault, answer)
        for (kind, stream), answer in zip(jobs, answers, strict=True)
        if (fault := fault_of(answer, expected[kind], stream=stream))
    ]
    assert not faults
    codes = Counter(answer.code for answer in answers)
    print(f"{len(killed)} kills, codes {codes}, attempts {Counter(a.attempts for a in answers)}")  # noqa: T201
    assert codes[None] > REQUESTS / 2
    assert codes.keys() <= {None, "backend_crashed", "model_unavailable", "overloaded"}
    failed_over = [stream for (_, stream), a in zip(jobs, answers, strict=True) if a.error is None and a.attempts == 2]
    assert failed_over

    gateway.await_health()
    wait_until(lambda: gateway.inflight() == 0, PATIENCE)
    for kind in KINDS[:3]:
        assert gateway.ask(body_of(kind, stream=True), kind[0]).text == expected[kind]
    restarts = sum(b["restarts"] for b in gateway.health()["models"]["tiny"]["backends"])
    assert restarts == len(killed)

"""Prompts that fit into memory one by one, and not together, on the only replica of a model, beside answers that are
being written: the answers are whole, each prompt is answered, and what does not fit alone is told so."""

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.conftest import Launch
from tests.integration.harness import QUICK_RESTART, Background, Gateway, wait_until
from tests.integration.limits import MemoryLimit, tokens_of
from tests.integration.wire import Answer, Json, Stream, chat, whole

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are of Linux"),
]

# Without admission by memory, which would take the share of the machine for the limit, and send the largest alone.
MODEL = {"restart": QUICK_RESTART, "max_inflight": 16, "max_context": 50_000, "admission": "off"}
ROOM = 250 << 20  # bytes; a prompt takes about 80 MiB while it is read, six of them 430 MiB
WORDS = 400  # five tokens each
TOO_LONG = 4000  # words that do not fit alone
PROMPTS = 6
BYSTANDERS = 6


def bystanders() -> list[Json]:
    return [chat(f"number {i}", max_tokens=1000, stream=True, temperature=0) for i in range(BYSTANDERS)]


def prompt(number: int, words: int = WORDS) -> Json:
    return chat(f"{number} " + "the river and the lamp " * (words + number), max_tokens=5)


def together(gateway: Gateway, prompts: Sequence[Json] = ()) -> tuple[list[Answer], list[Answer]]:
    """The answers to the bystanders, and to the prompts that are sent at once while these are being answered."""
    streams = [gateway.stream(body) for body in bystanders()]
    reading = [Background(lambda stream=stream: whole_of(stream)) for stream in streams]  # type: ignore[misc]
    wait_until(lambda: all(stream.answer.text for stream in streams), what="all are being written")
    asked = [Background(lambda body=body: gateway.ask(body)) for body in prompts]  # type: ignore[misc]
    return [one.result() for one in reading], [one.result() for one in asked]


def whole_of(stream: Stream) -> Answer:
    with stream:
        return stream.rest()


def test_a_crowd_on_the_only_replica(launch: Launch, tiny_model: Path, tmp_path: Path) -> None:
    memory = MemoryLimit(tmp_path / "limit")
    gateway = launch({"models": {"tiny": {"model": str(tiny_model), "env": memory.env, **MODEL}}})
    wait_until(lambda: gateway.health()["models"]["tiny"]["resume"] == "verified", what="the self-test")
    undisturbed, _ = together(gateway)
    memory.apply(gateway, ["tiny:0"], ROOM)
    before = gateway.backend("tiny:0")["restarts"]
    whole_at_once: Json = {"logprobs": True}  # in slices it could fit
    prompts = [*map(prompt, range(PROMPTS)), prompt(PROMPTS, TOO_LONG) | whole_at_once]
    streamed, answered = together(gateway, prompts)
    assert all(whole(one) for one in streamed)
    assert [one.text for one in streamed] == [one.text for one in undisturbed]
    resumes = gateway.http.get("/api/status").json()["models"]["tiny"]["resumes"]
    assert resumes["spliced"] >= BYSTANDERS // 2, "they were in their middle"
    *fit, too_long = answered
    assert all(map(whole, fit)), fit  # some are read in turn, where the model has shown that it reads them slowly
    assert max(one.attempts for one in [*fit, too_long]) == 2, "there was a crowd"
    assert (too_long.status, too_long.code) == (503, "backend_oom")
    assert too_long.headers["x-should-retry"] == "false"
    template = fit[0].body["usage"]["prompt_tokens"] - tokens_of(tiny_model, prompts[0])
    counted = template + tokens_of(tiny_model, prompts[-1])
    assert too_long.error is not None
    assert f"This request, of {counted} tokens, was alone on it" in too_long.error["message"]
    gateway.await_health()
    assert gateway.backend("tiny:0")["restarts"] - before in (2, 3), "of one crowd or two, and of one alone"
    known = gateway.http.get("/api/quarantine").json()
    assert known["ceilings"]["tiny"]["tokens"] == counted
    (held,) = known["requests"]
    assert held["tokens"] == counted, "nothing is held against six"

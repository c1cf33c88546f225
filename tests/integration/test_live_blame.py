"""One request that is too much for the memory, six that are not: the six are answered, and the one is told once it has
failed alone."""

from pathlib import Path

import pytest

from tests.conftest import Launch
from tests.integration.harness import QUICK_RESTART, Background, Gateway, fake, free_port, wait_until
from tests.integration.wire import CHAT, Answer, Json, chat, whole

pytestmark = pytest.mark.slow

BYSTANDERS = 6
ROOM = 200 << 20  # bytes


def together(gateway: Gateway, culprit: Json, bystanders: list[Json]) -> tuple[Answer, list[Answer]]:
    """The culprit comes when the others are in flight."""
    asked = [Background(lambda body=body: gateway.ask(body)) for body in bystanders]  # type: ignore[misc]
    wait_until(lambda: gateway.inflight() == len(bystanders), what="the bystanders are in flight")
    answer = gateway.ask(culprit)
    return answer, [background.result() for background in asked]


def await_proof(gateway: Gateway) -> None:
    wait_until(lambda: gateway.health()["models"]["tiny"]["resume"] == "verified", what="the self-test")


def lives(gateway: Gateway) -> dict[str, int]:
    return {b["id"]: b["restarts"] for b in gateway.health()["models"]["tiny"]["backends"]}


def deaths(before: dict[str, int], after: dict[str, int]) -> int:
    return sum(after[name] - before[name] for name in before)


def assert_told(answer: Answer) -> None:
    assert (answer.status, answer.code) == (503, "backend_oom"), answer
    assert answer.headers["x-should-retry"] == "false"
    assert answer.error is not None
    assert "was alone on it" in answer.error["message"]


def assert_refused(gateway: Gateway, body: Json) -> None:
    """At once, by the gateway alone."""
    before = gateway.await_health()
    refused = gateway.ask(body)
    assert (refused.status, refused.code) == (400, "context_length_exceeded")
    assert "x-gateway-backend" not in refused.headers
    after = gateway.health()
    assert [b["pid"] for b in after["models"]["tiny"]["backends"]] == [
        b["pid"] for b in before["models"]["tiny"]["backends"]
    ]


def test_memory_of_one_request_among_six(launch: Launch) -> None:
    gateway = launch({"models": {"tiny": fake(replicas=2, restart=QUICK_RESTART)}})
    culprit = chat("FAKE metal-oom prompt=40000 prefill-delay=0.02 after=0")
    # Some have part of their answer already, and go on in its middle.
    await_proof(gateway)
    words = "FAKE n=60 delay=0.03\nnumber"
    bystanders = [chat(f"{words} {i}", temperature=0, stream=i % 2 == 0) for i in range(BYSTANDERS)]
    before = lives(gateway)
    answer, answers = together(gateway, culprit, bystanders)
    assert_told(answer)
    assert all(whole(one) for one in answers)
    spliced = gateway.http.get("/api/status").json()["models"]["tiny"]["resumes"]["spliced"]
    moved = spliced + sum(one.attempts == 2 for one in answers)  # of a stream the head, and with it the count, was out
    assert 0 < moved < BYSTANDERS, "some were there, some were not"
    gateway.await_health()
    assert deaths(before, lives(gateway)) == 2, "one with company, one alone"
    assert answer.attempts == 2
    assert_refused(gateway, culprit)
    assert_refused(gateway, {**culprit, "user": "somebody else"})
    assert deaths(before, lives(gateway)) == 2
    (known,) = gateway.http.get("/api/quarantine").json()["requests"]
    assert (known["failures"], known["cause"], known["tokens"], known["refused"]) == (2, "oom", 40_000, True)
    assert gateway.http.delete("/api/quarantine").json() == {"cleared": 1}
    again = gateway.ask(culprit)
    assert_told(again)
    assert again.attempts == 1, "it was alone"


# -- mlx_lm.server itself ----------------------------------------------------------------------------------------------


def test_prompts_are_counted_as_the_server_counts_them(launch: Launch, tiny_model: Path) -> None:
    """Exactly at the bound one is answered and the next is not, chat or not, with tools and calls."""
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"word": "lamp", "n": 3}'}}
    turns: list[Json] = [
        {"role": "system", "content": "Ümläute and 日本"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "found", "tool_call_id": "c"},
        {"role": "user", "content": "the river " * 40},
    ]
    tools = [{"type": "function", "function": {"name": "f", "description": "looks up", "parameters": {}}}]
    model: Json = {"model": str(tiny_model), "server_args": {"max-tokens": 3}}
    free = launch({"models": {"tiny": model}})
    bodies: list[Json] = [
        chat("the river and the lamp " * 50),
        {"model": "tiny", "messages": turns},
        {"model": "tiny", "messages": turns, "tools": tools},
        {"model": "tiny", "prompt": "the river and the lamp " * 50},
    ]
    counts = [free.ask(body, _path(body)).body["usage"]["prompt_tokens"] for body in bodies]
    assert_refused(free, chat("the river and the lamp " * 40_000))  # the default: what the model was trained for
    limits = {f"m{i}": {**model, "max_context": count + 1} for i, count in enumerate(counts)}
    bound = launch({"models": limits})
    for i, body in enumerate(bodies):
        fits = bound.ask({**body, "model": f"m{i}", "max_tokens": 9}, _path(body))
        assert fits.status == 200, fits
        assert fits.body["usage"]["completion_tokens"] == 1, "there was room for one"
        assert "max_tokens" in fits.headers["x-gateway-normalized"]
        assert "max_tokens: 1," in fits.headers["x-gateway-warning"]
        longer = {**body, "model": f"m{i}"}
        if "prompt" in body:
            longer["prompt"] += "z"
        else:
            longer["messages"] = [
                *body["messages"][:-1],
                {"role": "user", "content": f"{body['messages'][-1]['content']}z"},
            ]
        refused = bound.ask(longer, _path(body))
        assert (refused.status, refused.code) == (400, "context_length_exceeded")
        assert refused.error is not None
        assert f"the prompt has {counts[i] + 1} tokens" in refused.error["message"]


def test_a_fallback_counts_its_own_tokens(launch: Launch, tiny_model: Path) -> None:
    """By its characters the prompt could fit, and the model that was asked for cannot count it."""
    far: Json = {"urls": [f"http://127.0.0.1:{free_port()}"], "fallbacks": ["near"]}
    near: Json = {"model": str(tiny_model), "max_context": 64, "server_args": {"max-tokens": 3}}
    gateway = launch({"models": {"far": far, "near": near}}, ready=False)
    gateway.await_state("near:0", "ready")
    fits = gateway.ask(chat("hello", "far"))
    assert (fits.status, fits.headers["x-gateway-backend"]) == (200, "near:0")
    longer = gateway.ask(chat("z" * 200, "far"))
    assert (longer.status, longer.code) == (503, "model_unavailable")
    assert gateway.ask(chat("z" * 200, "near")).code == "context_length_exceeded"


def test_an_answer_is_not_shortened_by_an_estimate(launch: Launch) -> None:
    """Under a command prompts cannot be counted; 3960 characters may be 990 tokens, or 200."""
    gateway = launch({"models": {"tiny": fake("n=1000", max_context=1000)}})
    answer = gateway.ask(chat("w" * 3960, max_tokens=40))
    assert answer.body["usage"]["completion_tokens"] == 40
    assert "x-gateway-normalized" not in answer.headers
    unset = gateway.ask(chat("w" * 3960))
    assert unset.body["usage"]["completion_tokens"] == 512, "the server's own default"
    more = gateway.ask(chat("w" * 3960, max_tokens=4000))
    assert more.body["usage"]["completion_tokens"] == 999, "no more is possible in this context"
    assert "max_tokens" in more.headers["x-gateway-normalized"]
    assert "max_tokens: 999," in more.headers["x-gateway-warning"]
    refused = gateway.ask(chat("w" * 40_000))
    assert (refused.status, refused.code) == (400, "context_length_exceeded")


def _path(body: Json) -> str:
    return "/v1/completions" if "prompt" in body else CHAT

"""Prompts that equal a key of the prompt cache: in a batch each of them ends the generation thread of mlx_lm.server.

Without the instrument, whose engine fix makes them harmless: it is not there at ``command:``, at ``urls:``, and with
versions of mlx-lm that it was not made for.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.integration.harness import Background, Gateway, launched, wait_until
from tests.integration.wire import Answer, Json, chat, whole

pytestmark = pytest.mark.slow

COMPLETIONS = "/v1/completions"
OFF: Json = {"chat_template_kwargs": {"enable_thinking": False}}


def hybrid(tiny: Path, folder: Path) -> Path:
    """A model whose caches cannot be trimmed (a full window), with a template that can switch thinking off."""
    shutil.copytree(tiny, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:-2]
    vocab = tokenizer["model"]["vocab"]
    for name in ("</think>", "<think>"):
        number = vocab.pop(max(vocab, key=lambda token: vocab[token] if token[0] != "<" else -1))
        vocab[name] = number
        tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": number, "content": name})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] += "{%- if not enable_thinking -%}<think></think>{%- endif -%}"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def gateway(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("cached")
    base: Json = {"instrument": "off"}
    models = {
        "tiny": {**base, "model": str(tiny_model), "queue_timeout": "12s"},
        "hybrid": {**base, "model": str(hybrid(tiny_model, folder / "hybrid")), "replicas": 2, "resume": "off"},
    }
    with launched({"models": models}, folder) as running:
        yield running


def completion(prompt: str, **more: object) -> Json:
    return {"model": "tiny", "prompt": prompt, "temperature": 0, "max_tokens": 8, **more}


def pids(gateway: Gateway) -> list[tuple[int, int]]:
    return [(b["pid"], b["restarts"]) for m in gateway.health()["models"].values() for b in m["backends"]]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("extra", [{}, {"logprobs": 1}])
def test_a_completion_is_continued(gateway: Gateway, stream: bool, extra: Json) -> None:
    before = pids(gateway)
    prompt = f"The river runs past the old mill {stream} {len(extra)} and"
    with gateway.stream(completion("Once", max_tokens=100_000), COMPLETIONS) as bystander:
        bystander.until_text()
        first = gateway.ask(completion(prompt, stream=stream, **extra), COMPLETIONS)
    assert whole(first)
    text = f"{prompt} {first.text}"  # the server has stripped the space
    answers = [gateway.ask(completion(text, stream=stream), COMPLETIONS) for _ in range(2)]
    assert all(map(whole, answers))
    assert answers[0].text == answers[1].text != ""
    assert "seed" in answers[0].headers["x-gateway-normalized"]
    assert pids(gateway) == before


def test_a_prompt_is_shortened_after_its_client_has_left(gateway: Gateway) -> None:
    before = pids(gateway)
    with gateway.stream(completion("A lamp of the town and another lamp", max_tokens=100_000), COMPLETIONS) as left:
        left.until_text()
    wait_until(lambda: gateway.inflight("tiny") == 0)
    assert whole(gateway.ask(completion("A lamp of the town and another"), COMPLETIONS))
    assert pids(gateway) == before


def test_a_prompt_that_looks_like_an_earlier_one_does_not_keep_others_waiting_for_long(gateway: Gateway) -> None:
    assert whole(gateway.ask(completion("The town has a lamp and a bridge"), COMPLETIONS))
    with gateway.stream(chat("Once", "tiny", max_tokens=100_000)) as bystander:
        bystander.until_text()
        shorter = Background(lambda: gateway.ask(completion("The town has a lamp and a"), COMPLETIONS))
        wait_until(lambda: gateway.queued() == 1)
        assert whole(gateway.ask(chat("hi", "tiny", max_tokens=3)))
        assert shorter.running, "others were not kept waiting until it had its turn, or gave up"
        refused = shorter.result()
    assert (refused.status, refused.code) == (503, "overloaded")
    assert refused.error is not None
    assert "change it" in refused.error["message"], "it had no seed that could be left out"


def ask(gateway: Gateway, **settings: object) -> Answer:
    return gateway.ask(
        chat("Why does the river run past the old mill and the town?", "hybrid", max_tokens=4, **settings)
    )


def test_thinking_is_switched_on_where_caches_cannot_be_trimmed(gateway: Gateway) -> None:
    """Another replica answers; the last one refuses, and lives."""
    before = pids(gateway)
    off, on = ask(gateway, **OFF), ask(gateway)
    assert whole(off)
    assert whole(on)
    assert off.headers["x-gateway-backend"] != on.headers["x-gateway-backend"]
    assert gateway.http.post(f"/api/backends/{on.headers['x-gateway-backend']}/stop").status_code == 202
    gateway.await_state(on.headers["x-gateway-backend"], "stopped")
    refused = ask(gateway)
    assert (refused.status, refused.code) == (500, "generation_failed")
    assert refused.headers["x-should-retry"] == "false"
    assert refused.error is not None
    assert "change the prompt" in refused.error["message"]
    assert whole(ask(gateway, **OFF))
    assert pids(gateway)[0] == before[0]
    name = off.headers["x-gateway-backend"]
    assert (gateway.backend(name)["restarts"], gateway.backend(name)["last_failure"]) == (0, None)


def test_what_the_gateway_could_not_know_ends_one_process_at_most(gateway: Gateway) -> None:
    """Both have the prompt from somebody else. The log of the first says what it died of; the second is spared, and the
    next process of the first, which has nothing cached, answers."""
    for name in ("hybrid:0", "hybrid:1"):
        gateway.http.post(f"/api/backends/{name}/start")
        gateway.await_state(name, "ready")
        there = httpx.post(gateway.backend_url(name) + COMPLETIONS, json=completion("It rains", model="default_model"))
        text = f"It rains {there.json()['choices'][0]['text']}"
    before = {name: gateway.backend(name)["pid"] for name in ("hybrid:0", "hybrid:1")}
    answer = gateway.ask(completion(text, model="hybrid"), COMPLETIONS)
    assert whole(answer)
    assert answer.attempts == 3
    failures = [gateway.backend(name)["last_failure"] for name in before]
    told = [failure["message"] for failure in failures if failure is not None]
    assert len(told) == 1
    assert "in the prompt cache" in told[0]
    (spared,) = (name for name, failure in zip(before, failures, strict=True) if failure is None)
    assert gateway.backend(spared)["pid"] == before[spared]

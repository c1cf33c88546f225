"""A long prompt is read in slices by the real server."""

import json
import os
import re
from pathlib import Path
from signal import SIGKILL

import httpx
import pytest

from tests.conftest import Launch
from tests.integration.harness import QUICK_RESTART, Background, Gateway, wait_until
from tests.integration.wire import CHAT, Answer, Json, chat, whole

pytestmark = pytest.mark.slow

LONG = " ".join(f"river{i} bridge lamp {i * 7}" for i in range(620))


def cached(answer: Answer) -> int:
    return int(answer.body["usage"]["prompt_tokens_details"]["cached_tokens"])


def leave_after_two_slices(gateway: Gateway, body: Json) -> None:
    with gateway.stream(body) as stream:
        assert stream.answer.headers["x-gateway-attempts"] == "1"
        wait_until(lambda: gateway.output("tiny:0").count("POST /v1/completions") > 1, what="two slices")


def test_a_long_prompt_is_read_in_slices(tiny_model: Path, launch: Launch) -> None:
    files = json.loads((tiny_model / "tokenizer_config.json").read_text())
    template = "{{ bos_token }}You are {{ mood }}.\n" + files["chat_template"]
    args = {"prompt-cache-size": 4, "chat-template": template, "chat-template-args": {"mood": "kind and patient"}}
    model = {"model": str(tiny_model), "resume": "off", "server_args": args}
    gateway = launch({"models": {"tiny": {**model, "restart": QUICK_RESTART}, "plain": model}})
    other = chat("Tell me of the mill. " * 20, max_tokens=4)
    assert whole(gateway.ask(other))
    prompt = chat(LONG, max_tokens=12, temperature=0)

    leave_after_two_slices(gateway, prompt)
    answer = gateway.ask(prompt)
    assert whole(answer)
    assert cached(answer) > 800, "what was read for the client that has left"
    usage = answer.body["usage"]
    assert cached(answer) < usage["prompt_tokens"] - 1000, "what was read in slices now is not told as cached"
    assert answer.headers["x-gateway-attempts"] == "1"
    wait_until(lambda: re.search(r"ended=client_left .* slices=\d", gateway.log), what="its slices in the log")

    with httpx.Client(base_url=gateway.backend_url("plain:0"), timeout=60) as direct:
        reference = direct.post(CHAT, json={**prompt, "model": "default_model"}).json()
    assert reference["usage"]["prompt_tokens_details"]["cached_tokens"] < 20
    assert answer.text == reference["choices"][0]["message"]["content"]
    assert usage["prompt_tokens"] == reference["usage"]["prompt_tokens"]

    again = gateway.ask(other)
    assert cached(again) > 50, "the entries of the slices have not pushed it out"
    assert gateway.backend("tiny:0")["restarts"] == 0
    kill_between_two_slices(gateway)


def kill_between_two_slices(gateway: Gateway) -> None:
    """What was read is gone. The next process gets all of it, and nobody is blamed."""
    slices, pid = gateway.output("tiny:0").count("POST /v1/completions"), gateway.backend("tiny:0")["pid"]
    long = Background(lambda: gateway.ask(chat(f"Again: {LONG}", max_tokens=4, stream=True)))
    wait_until(lambda: gateway.output("tiny:0").count("POST /v1/completions") > slices, what="a slice")
    with gateway.stream(chat("hello", max_tokens=1000)) as other:
        while (event := other.event()) and not event["choices"][0]["delta"].get("content"):
            pass
        wait_until(gateway.queued, what="a slice that waits for its turn")
        os.kill(pid, SIGKILL)
        assert other.rest().code == "backend_crashed"
    answer = long.result()
    assert whole(answer)
    assert answer.done
    assert gateway.backend("tiny:0")["restarts"] == 1
    assert gateway.http.get("/api/quarantine").json() == {"requests": [], "ceilings": {}}

"""On the real server: work that goes on after its client has left, and requests that cannot be batched."""

import json
import shutil
import sys
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path

import httpx
import pytest

from tests.conftest import Launch
from tests.integration.harness import Background, Gateway, launched, wait_until
from tests.integration.wire import CHAT, Json, chat, whole

pytestmark = pytest.mark.slow

LONG = " ".join(f"word{i}" for i in range(1200))  # seconds of reading on one core


MARKUP = 1023  # the last token of the vocabulary


@pytest.fixture(scope="module")
def caller(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, with a token that opens a tool call in place of its last one."""
    folder = tmp_path_factory.mktemp("models") / "caller"
    shutil.copytree(tiny_model, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    model = tokenizer["model"]
    (word,) = [text for text, number in model["vocab"].items() if number == MARKUP]
    del model["vocab"][word]
    model["vocab"]["<tool_call>"] = MARKUP
    model["merges"] = [pair for pair in model["merges"] if "".join(pair) != word]
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": MARKUP, "content": "<tool_call>"})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "tool_parser_type": "json_tools"}))
    return folder


@pytest.fixture(scope="module")
def gateway(caller: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    models = {"tiny": {"model": str(caller), "timeouts": {"progress": "3s"}}}
    with launched({"models": models}, tmp_path_factory.mktemp("abandoned")) as running:
        yield running


def abandoned(gateway: Gateway) -> int:
    return int(gateway.backend("tiny:0")["abandoned"])


def leave(gateway: Gateway, body: Json) -> None:
    """A client that hangs up once the server has begun with its request."""

    def begun() -> int:
        return gateway.output("tiny:0").count('completions HTTP/1.1" 200')

    before, address = begun(), httpx.URL(gateway.url)
    client = HTTPConnection(address.host, address.port)
    client.request("POST", CHAT, json.dumps(body), {"content-type": "application/json"})
    wait_until(lambda: begun() > before)
    client.close()
    wait_until(lambda: abandoned(gateway) == 1)


def lives_on(gateway: Gateway, pid: int) -> None:
    backend = gateway.backend("tiny:0")
    assert (backend["pid"], backend["restarts"], backend["last_failure"]) == (pid, 0, None)
    wait_until(lambda: abandoned(gateway) == 0)


def test_an_answer_in_one_piece_whose_client_has_left_keeps_its_slot_and_harms_nobody(gateway: Gateway) -> None:
    pid = gateway.backend("tiny:0")["pid"]
    leave(gateway, chat("hi", max_tokens=1_000_000, logprobs=True))
    seeded = Background(lambda: gateway.ask(chat("hi", max_tokens=3, seed=1)))
    wait_until(lambda: gateway.queued() == 1)
    assert abandoned(gateway) == 1
    assert whole(gateway.ask(chat("hi", max_tokens=3))), "what can be batched is served beside it"
    assert whole(seeded.result())
    lives_on(gateway, pid)


def test_a_stream_that_is_hung_up_on_while_its_prompt_is_read(gateway: Gateway) -> None:
    pid = gateway.backend("tiny:0")["pid"]
    leave(gateway, chat(LONG, max_tokens=5, seed=2, stream=True))
    assert whole(gateway.ask(chat("hi", max_tokens=3)))
    lives_on(gateway, pid)


def test_a_client_that_leaves_while_a_tool_call_is_collected(gateway: Gateway) -> None:
    """Nothing is written meanwhile, so the server cannot notice."""
    pid = gateway.backend("tiny:0")["pid"]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    leave(gateway, chat("hi", max_tokens=3000, stream=True, tools=tools, logit_bias={str(MARKUP): 100}))
    seeded = Background(lambda: gateway.ask(chat("hi", max_tokens=3, seed=1)))
    assert whole(gateway.ask(chat("hi", max_tokens=3)))
    assert whole(seeded.result())
    lives_on(gateway, pid)


def test_a_client_that_leaves_in_the_middle_of_a_stream_gives_its_slot_back_at_once(gateway: Gateway) -> None:
    with gateway.stream(chat("hi", max_tokens=100_000)) as stream:
        stream.until_text()
    wait_until(lambda: gateway.inflight() + abandoned(gateway) == 0, 5.0)


def test_a_request_that_cannot_be_batched_waits_in_our_line_behind_a_long_stream(gateway: Gateway) -> None:
    with gateway.stream(chat("hi", max_tokens=100_000)) as stream:
        stream.until_text()
        seeded = Background(lambda: gateway.ask(chat("hi", max_tokens=3, seed=3)))
        wait_until(lambda: gateway.queued() == 1)
        assert seeded.running
        assert gateway.inflight() == 1, "nothing waits in the server"
    assert whole(seeded.result())


def test_requests_behind_an_abandoned_one_are_moved_and_the_process_lives_on(tiny_model: Path, launch: Launch) -> None:
    """A wrapper whose server answers one request at a time, which nothing but its silence shows."""
    command = [
        sys.executable,
        "-m",
        "mlx_lm",
        "server",
        "--model",
        str(tiny_model),
        "--port",
        "{port}",
        "--kv-bits",
        "8",
    ]
    gateway = launch(
        {"models": {"tiny": {"command": command, "model": str(tiny_model), "timeouts": {"progress": "1s"}}}}
    )
    pid = gateway.backend("tiny:0")["pid"]
    leave(gateway, chat("hi", max_tokens=3000, logprobs=True))
    answer = gateway.ask(chat("hi", max_tokens=3))
    assert whole(answer)
    assert answer.attempts == 2, "it waited in the queue in the end, and not in the server"
    lives_on(gateway, pid)

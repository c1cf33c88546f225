"""Tool calls that the real mlx_lm.server cannot read: a tokenizer whose words are pieces of tool markup.

Each word is one token, so ``logit_bias`` decides what the model "writes", and the server's own parser does the rest.
"""

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.integration.harness import Gateway, launched
from tests.integration.wire import Answer, Json, chat, whole

pytestmark = pytest.mark.slow

WORDS = {
    "good": '<tool_call>{"name":"look","arguments":{}}</tool_call>',
    "broken": "<tool_call>{</tool_call>",
    "number": "<tool_call>5</tool_call>",  # JSON, and no object: another exception than a parser's
    "half": '<tool_call>{</tool_call><tool_call>{"name":"look","arguments":{}}</tool_call>',
    "open": '<tool_call>{"name":',
    "talk": "harbour",
}
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]


def teach(folder: Path) -> dict[str, int]:
    """The last tokens of the vocabulary become WORDS; returns their ids."""
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocab: dict[str, int] = tokenizer["model"]["vocab"]
    last = sorted(vocab, key=vocab.__getitem__)[-len(WORDS) :]
    ids = dict(zip(WORDS, (vocab.pop(token) for token in last), strict=True))
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][: -len(WORDS)]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    tokenizer["added_tokens"] += [{"id": ids[name], "content": text, **flags} for name, text in WORDS.items()]
    path.write_text(json.dumps(tokenizer))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "tool_parser_type": "json_tools"}))
    return ids


@pytest.fixture(scope="module")
def shared(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Gateway, dict[str, int]]]:
    folder = tmp_path_factory.mktemp("calls")
    shutil.copytree(tiny_model, folder / "model")
    ids = teach(folder / "model")
    model = {"model": str(folder / "model"), "replicas": 2, "resume": "off"}
    with launched({"models": {"tiny": model}}, folder / "gateway") as gateway:
        yield gateway, ids


def ask(shared: tuple[Gateway, dict[str, int]], word: str, *, stream: bool, **more: Any) -> Answer:
    gateway, ids = shared
    more = {"max_tokens": 4, **more}
    return gateway.ask(chat("hello", logit_bias={str(ids[word]): 100.0}, tools=TOOLS, stream=stream, **more))


def alive(shared: tuple[Gateway, dict[str, int]]) -> list[tuple[str, int]]:
    return [(b["state"], b["restarts"]) for b in (shared[0].backend(f"tiny:{i}") for i in range(2))]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("word", "more"),
    [
        ("broken", {"stop": WORDS["broken"] * 2}),  # finish_reason "tool_calls", and no call
        ("number", {}),  # the stream is cut, and the server goes on
        ("number", {"logprobs": True}),  # answered in one piece
        ("broken", {"stop": WORDS["broken"] * 2, "logprobs": True}),
    ],
)
def test_a_call_that_cannot_be_read(
    shared: tuple[Gateway, dict[str, int]], word: str, more: Json, stream: bool
) -> None:
    answer = ask(shared, word, stream=stream, **more)
    assert (answer.status, answer.code) == (500, "tool_call_malformed"), answer
    assert answer.headers["x-should-retry"] == "false"
    assert answer.attempts == 2
    assert alive(shared) == [("ready", 0)] * 2


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("limit", ["max_tokens", "max_completion_tokens"])
@pytest.mark.parametrize("tokens", [3, 20])  # few: only the log says what became of them
def test_a_call_that_is_cut_off(shared: tuple[Gateway, dict[str, int]], limit: str, tokens: int, stream: bool) -> None:
    answer = ask(shared, "open", stream=stream, **{"max_tokens": None, limit: tokens})
    assert (answer.status, answer.code) == (400, "tool_call_truncated"), answer
    assert answer.error is not None
    assert answer.error["param"] == limit
    assert f"{limit} ({tokens})" in answer.error["message"]
    assert answer.attempts == 2


@pytest.mark.parametrize("tokens", [3, 20])
def test_a_call_that_is_cut_off_in_an_answer_in_one_piece(shared: tuple[Gateway, dict[str, int]], tokens: int) -> None:
    answer = ask(shared, "open", stream=False, max_tokens=tokens, logprobs=True)
    assert (answer.status, answer.code, answer.attempts) == (400, "tool_call_truncated", 2), answer


@pytest.mark.parametrize("stream", [True, False])
def test_a_call_that_can_be_read(shared: tuple[Gateway, dict[str, int]], stream: bool) -> None:
    answer = ask(shared, "good", stream=stream, stop=WORDS["good"] * 2)
    assert whole(answer), answer
    assert (answer.finish, answer.attempts) == ("tool_calls", 1)
    assert "look" in json.dumps(answer.events or answer.body)


def test_one_call_of_two_is_lost(shared: tuple[Gateway, dict[str, int]]) -> None:
    """Only the log tells of it, and only of a request that was alone."""
    answer = ask(shared, "half", stream=False)
    assert (answer.status, answer.code, answer.attempts) == (500, "tool_call_malformed", 2), answer
    streamed = ask(shared, "half", stream=True)  # told in the stream, unless all of it came at once
    assert streamed.code == "tool_call_malformed", streamed


def test_requests_at_the_same_time_do_not_blame_one_another(shared: tuple[Gateway, dict[str, int]]) -> None:
    """Answers that are cut off in plain text, beside calls that are dropped: the log of one server has both."""
    words = ["open", "talk", "broken", "good"] * 4
    with ThreadPoolExecutor(len(words)) as pool:
        answers = list(pool.map(lambda word: ask(shared, word, stream=True, max_tokens=12), words))
    for word, answer in zip(words, answers, strict=True):
        if word in ("talk", "good"):
            assert whole(answer), answer
            assert answer.finish == "length"
        else:
            assert answer.code == ("tool_call_truncated" if word == "open" else "tool_call_malformed"), answer

"""The demo model: builds whole or not at all, the same each time, and makes the real server speak varied text."""

import hashlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from gateway.cli.demo_model import model as demo
from gateway.cli.demo_model.shape import SPECIAL

PROMPTS = (
    "Hello",
    "Hello there",
    "Tell me a story about the sea.",
    "What is 2+2?",
    "日本語で書いて 🙂",
    "def main():\n    return 1\n",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory.mktemp("demo") / "tiny")


def built(folder: Path) -> Path:
    """By a process of its own. Within one that has done other things, sums may come out in another order: how numpy
    adds depends on where in memory an array lies."""
    subprocess.run([sys.executable, "-m", "gateway.cli.demo_model.model", str(folder)], check=True)
    return folder


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_importing_the_module_loads_nothing_heavy() -> None:
    heavy = ("mlx", "numpy", "tokenizers", "safetensors")
    code = f"import sys, gateway.cli.demo_model.model; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_building_loads_no_mlx(tmp_path: Path) -> None:
    code = (
        "import pathlib, sys; from gateway.cli.demo_model.model import ensure_tiny_model; "
        f"ensure_tiny_model(pathlib.Path({str(tmp_path / 'tiny')!r})); print('mlx' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_has_exactly_the_promised_files_and_a_long_context(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == set(demo.FILES)
    config = json.loads((folder / "config.json").read_text())
    assert config["max_position_embeddings"] == 32768
    assert demo.is_complete(folder)


@pytest.mark.slow
def test_same_seed_gives_the_same_bytes_and_another_seed_other_weights(folder: Path, tmp_path: Path) -> None:
    assert digests(built(tmp_path / "again")) == digests(folder)
    demo.make_tiny_model(tmp_path / "again", seed=1)
    assert digests(tmp_path / "again")["model.safetensors"] != digests(folder)["model.safetensors"]
    assert digests(tmp_path / "again")["tokenizer.json"] == digests(folder)["tokenizer.json"]


def test_a_complete_model_is_left_alone(folder: Path) -> None:
    before = folder.stat().st_ino
    demo.ensure_tiny_model(folder)
    assert folder.stat().st_ino == before


@pytest.mark.parametrize("name", demo.FILES)
def test_each_missing_file_makes_it_incomplete(folder: Path, tmp_path: Path, name: str) -> None:
    for path in folder.iterdir():
        if path.name != name:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    assert not demo.is_complete(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"demo": {"recipe": 0}}'])
def test_a_foreign_or_broken_config_makes_it_incomplete(folder: Path, tmp_path: Path, text: str) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "config.json").write_text(text)
    assert not demo.is_complete(tmp_path)


@pytest.mark.slow
def test_remains_of_a_killed_run_are_replaced(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "tiny"
    for half in (target, tmp_path / ".tiny.building", tmp_path / ".tiny.old"):
        half.mkdir()
        (half / "config.json").write_text("{")
    assert digests(built(target)) == digests(folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".tiny.lock", "tiny"]


@pytest.mark.slow
def test_two_processes_at_once_build_one_model(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "deep" / "tiny"
    both = [subprocess.Popen([sys.executable, "-m", "gateway.cli.demo_model.model", str(target)]) for _ in range(2)]
    assert [process.wait(60) for process in both] == [0, 0]
    assert digests(target) == digests(folder)


@pytest.mark.parametrize(("hidden", "layers"), [(0, 2), (60, 2), (-64, 2), (64, 0)])
def test_impossible_sizes_are_refused_before_anything_is_written(tmp_path: Path, hidden: int, layers: int) -> None:
    with pytest.raises(ValueError, match="multiple of 8"):
        demo.make_tiny_model(tmp_path / "tiny", hidden=hidden, layers=layers)
    assert list(tmp_path.iterdir()) == []


@given(st.text())
@example("\x00\r\n\t\u2028 \ufeff")
def test_any_text_survives_the_tokenizer(folder: Path, text: str) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


# With the real server.


def post(port: int, path: str, body: dict[str, Any]) -> bytes:
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
        return bytes(answer.read())


def chat(port: int, prompt: str, *, role: str = "user", tokens: int = 100) -> dict[str, Any]:
    messages = [{"role": "system", "content": "Be brief."}, {"role": role, "content": prompt}]
    answer = post(port, "/v1/chat/completions", {"messages": messages, "max_tokens": tokens, "logprobs": True})
    choice: dict[str, Any] = json.loads(answer)["choices"][0]
    return choice


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    output = tmp_path_factory.mktemp("server") / "output"
    argv = [sys.executable, "-m", "mlx_lm", "server", "--model", str(folder), "--port", str(port)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with output.open("wb") as sink, subprocess.Popen(argv, stdout=sink, stderr=sink, env=environment) as process:
        try:
            while True:
                assert process.poll() is None, output.read_text()
                try:
                    post(port, "/v1/completions", {"prompt": "a", "max_tokens": 1})
                    break
                except urllib.error.URLError:
                    time.sleep(0.05)
            yield port
        finally:
            process.terminate()


@pytest.mark.slow
def test_greedy_texts_are_long_varied_and_different(server: int) -> None:
    choices = [chat(server, prompt) for prompt in PROMPTS]
    assert {choice["finish_reason"] for choice in choices} == {"length"}
    assert len({choice["message"]["content"] for choice in choices}) == len(PROMPTS)
    for choice in choices:
        ids = [token["id"] for token in choice["logprobs"]["content"]]
        assert len(ids) == 100
        assert len(set(ids)) >= 30
        assert sum(a == b for a, b in pairwise(ids)) <= 5
        assert min(ids) >= len(SPECIAL)


@pytest.mark.slow
def test_greedy_text_is_the_same_alone_and_in_a_batch(server: int) -> None:
    alone = [chat(server, prompt) for prompt in PROMPTS]
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        together = list(pool.map(lambda prompt: chat(server, prompt), PROMPTS))
    assert [choice["message"] for choice in together] == [choice["message"] for choice in alone]


@pytest.mark.slow
def test_the_stream_says_what_the_plain_answer_says(server: int) -> None:
    messages = [{"role": "user", "content": "Count."}]
    body = {"messages": messages, "max_tokens": 40}
    plain = json.loads(post(server, "/v1/chat/completions", body))["choices"][0]
    lines = post(server, "/v1/chat/completions", {**body, "stream": True}).decode().split("\n\n")
    events = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert events.pop() == "[DONE]"
    deltas = [json.loads(event)["choices"][0] for event in events]
    assert "".join(delta["delta"].get("content", "") for delta in deltas) == plain["message"]["content"]
    assert deltas[-1]["finish_reason"] == plain["finish_reason"] == "length"


@pytest.mark.slow
def test_every_role_and_raw_completions_are_understood(server: int) -> None:
    texts = {chat(server, "Hello", role=role, tokens=20)["message"]["content"] for role in ("user", "assistant")}
    assert len(texts) == 2
    assert chat(server, "Hello", role="developer")["finish_reason"] == "length"
    raw = json.loads(post(server, "/v1/completions", {"prompt": "The harbour", "max_tokens": 30}))["choices"][0]
    assert len(raw["text"]) > 60

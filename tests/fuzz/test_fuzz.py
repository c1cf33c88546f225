"""The targets under hypothesis; and, where it is installed, for a few seconds under atheris."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz import targets

SECONDS = int(os.environ.get("FUZZ_SECONDS", "10"))
RUNNER = Path(__file__).with_name("run_atheris.py")


@st.composite
def spoilt(draw: st.DrawFn, seeds: tuple[bytes, ...]) -> bytes:
    """Real ones: put together, and with some bytes changed, lost or added."""
    data = bytearray(b"".join(draw(st.lists(st.sampled_from(seeds), min_size=1, max_size=3))))
    for _ in range(draw(st.integers(0, 4))):
        place = draw(st.integers(0, len(data)))
        data[place : place + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
    return bytes(data)


@given(st.binary(min_size=4, max_size=4), st.binary(max_size=200) | spoilt(targets.STREAMS))
@settings(max_examples=400)
def test_streams(head: bytes, body: bytes) -> None:
    targets.stream(head + body)


SCALARS = st.none() | st.booleans() | st.integers(-2, 10**20) | st.floats(allow_nan=False) | st.text(max_size=5)
FIELDS = (
    "id", "object", "created", "model", "choices", "usage", "error", "errors", "detail", "code", "message", "status",
    "type", "index", "delta", "text", "finish_reason", "logprobs", "role", "content", "reasoning", "reasoning_content",
    "refusal", "tool_calls", "function_call", "function", "name", "arguments", "custom", "prompt_tokens",
    "completion_tokens", "total_tokens", "prompt_tokens_details", "cached_tokens", "thinking",
)  # fmt: skip


def odd_object(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(st.sampled_from(FIELDS), inner, max_size=4)


VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | odd_object(inner), max_leaves=6)


@st.composite
def answer(draw: st.DrawFn, part: str) -> dict[str, Any]:
    """One of the right form, but for a few fields that hold anything. ``part``: where its text is."""
    call = {"index": 0, "id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    delta: dict[str, Any] = {"role": "assistant", "content": draw(st.sampled_from(["", "hi", "<tool_call>{"]))}
    if draw(st.booleans()):
        delta["tool_calls"] = [call]
    finish = draw(st.sampled_from([None, "", "stop", "length", "tool_calls", "error"]))
    choice = {"index": 0, part: delta, "finish_reason": finish, "text": draw(st.sampled_from([None, "", "hi"]))}
    whole: dict[str, Any] = {"id": "a", "created": 1, "choices": [choice], "usage": draw(VALUES)}
    places: list[dict[str, Any]] = [whole, choice, delta, call, call["function"]]  # type: ignore[list-item]
    for _ in range(draw(st.integers(0, 3))):
        draw(st.sampled_from(places))[draw(st.sampled_from(FIELDS))] = draw(VALUES)
    return whole


@given(st.binary(min_size=4, max_size=4), st.lists(answer("delta"), min_size=1, max_size=4), st.booleans())
@settings(max_examples=300)
def test_streams_of_odd_chunks(head: bytes, chunks: list[dict[str, Any]], done: bool) -> None:
    events = [b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks]
    targets.stream(head + b"".join(events) + (targets.DONE if done else b""))


@given(answer("message") | VALUES)
@settings(max_examples=300)
def test_odd_answers_in_one_piece(value: Any) -> None:
    targets.one_piece(value)


@given(st.sampled_from([b"\0", b"\1"]), st.binary(max_size=200) | spoilt(targets.BODIES))
@settings(max_examples=400)
def test_bodies(head: bytes, body: bytes) -> None:
    targets.parsed(head + body)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris has wheels for Linux on x86 only")
@pytest.mark.timeout(SECONDS + 120)
@pytest.mark.parametrize("target", ["stream", "intake"])
def test_guided_by_coverage(target: str, tmp_path: Path) -> None:
    command = [sys.executable, str(RUNNER), target, str(tmp_path), f"-max_total_time={SECONDS}"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert ended.returncode == 0, ended.stderr[-4000:]
    assert "Done " in ended.stderr

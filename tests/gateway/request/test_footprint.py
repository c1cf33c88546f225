"""The memory that a parsed request takes: never said to be much less than it is."""

import json
import tracemalloc
from typing import Any

import pytest

from gateway.api.kinds import Kind
from gateway.request import ParsedRequest, parse
from gateway.request.footprint import kept_size

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"p": {"enum": ["a", "b"]}}}}}


def chat(content: str, **more: Any) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": content}], **more}, ensure_ascii=False).encode()


BODIES = {
    "plain text": chat("x" * 1_000_000),
    "one emoji among letters": chat("x" * 1_000_000 + "\U0001f600"),
    "many messages": json.dumps({"messages": [{"role": "user", "content": f"no {i}"} for i in range(5000)]}).encode(),
    "tools": chat("x", tools=[TOOL] * 400),
    "prompts": json.dumps({"prompt": ["y" * 100_000 + str(i) for i in range(16)]}).encode(),
    "small, with many values": chat("x", tools=[{**TOOL, "function": {"name": "f", "parameters": {"x": [[]] * 1500}}}]),
    "small, with an emoji": chat("x" * 100_000 + "\U0001f600"),
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_at_least_what_python_takes(body: bytes) -> None:
    kind = Kind.COMPLETION if b'"prompt"' in body[:12] else Kind.CHAT
    parse(body, kind)  # what is made once only
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        parsed: ParsedRequest = parse(body, kind)
        taken = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert kept_size(parsed) >= 0.9 * taken
    assert kept_size(parsed) >= parsed.body_size, "what is sent"

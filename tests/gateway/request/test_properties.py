"""Whatever a client sends is refused by name, or what goes out passes mlx_lm.server's checks and spares its thread.

``survives`` states both again, independently: first ``validate_model_parameters`` of mlx_lm 0.32.2, then the predicates
of what is known to end the generation thread, the process, or the stream.
"""

import json
import math
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.api.errors import Code, RequestError
from gateway.api.kinds import Kind
from gateway.request import ParsedRequest, Rules, parse, upstream_body

VOCAB = 300


@dataclass(frozen=True)
class NoRules:
    defaults: dict[str, Any]
    force: dict[str, Any]
    drop: tuple[str, ...]


NONE = NoRules({}, {}, ())


def validate(body: dict[str, Any]) -> None:
    """As mlx_lm.server 0.32.2 does it, with the defaults of its command line."""

    def field(name: str, default: Any, types: Any, *limits: float) -> None:
        value = body.get(name, default)
        assert isinstance(value, types), name
        assert not limits or value >= limits[0], name
        assert len(limits) < 2 or value <= limits[1], name

    number = (float, int)
    field("stream", False, bool)
    field("max_tokens", 512, int, 1)
    field("temperature", 0.0, number, 0)
    field("top_p", 1.0, number, 0, 1)
    field("top_k", 0, int, 0)
    field("min_p", 0.0, number, 0, 1)
    field("num_draft_tokens", 3, int, 0)
    field("repetition_penalty", 0.0, number, 0)
    field("presence_penalty", 0.0, number)
    field("frequency_penalty", 0.0, number)
    for name in ("repetition_context_size", "presence_context_size", "frequency_context_size"):
        field(name, 20, int, 0)
    field("logprobs", False, bool)
    field("top_logprobs", -1, int, -1, 11)
    field("xtc_probability", 0.0, float, 0, 1)
    field("xtc_threshold", 0.1, float, 0, 1)
    field("model", "default_model", str)
    for name, types in (("adapters", str), ("seed", int), ("logit_bias", dict)):
        assert name not in body or isinstance(body[name], types), name
    assert "max_completion_tokens" not in body


def spares_the_thread(body: dict[str, Any]) -> None:
    """What the server lets pass and its samplers, tokenizer and bindings do not survive."""
    assert body.get("top_k", 0) < VOCAB
    assert 0 <= body.get("seed", 0) < 2**64
    assert body.get("xtc_threshold", 0.1) <= 0.5
    for name in ("temperature", "repetition_penalty", "presence_penalty", "frequency_penalty", "min_p", "top_p"):
        value = body.get(name, 0.0)
        assert not isinstance(value, bool)
        assert math.isfinite(value)
        assert abs(value) < 3.4e38  # float32
    for name in ("repetition_context_size", "presence_context_size", "frequency_context_size", "max_tokens"):
        assert body.get(name, 1) < 2**31
    for key, bias in body.get("logit_bias", {}).items():
        assert 0 <= int(key) < VOCAB
        assert math.isfinite(bias)
    stops = body.get("stop", [])
    assert isinstance(stops, list)
    assert all(isinstance(word, str) and word for word in stops)
    if body["stream"]:
        assert body["stream_options"]["include_usage"] is True  # else a KeyError and no [DONE]
    assert not {"adapters", "draft_model", "role_mapping", "n", "response_format"} & body.keys()


def renders(body: dict[str, Any]) -> None:
    """What ``process_message_content`` and a strict chat template want."""
    if "prompt" in body:
        assert isinstance(body["prompt"], str)
        assert body["prompt"]
        return
    assert body["messages"]
    for i, message in enumerate(body["messages"]):
        assert message["role"] in {"system", "user", "assistant", "tool"}
        assert message["role"] != "system" or i == 0
        assert isinstance(message["content"], str)  # so there is no image to fetch either
        for call in message.get("tool_calls", []):
            assert isinstance(call["function"]["name"], str)
            assert isinstance(json.loads(call["function"]["arguments"]), dict)
    for tool in body.get("tools", []):
        assert isinstance(tool["function"]["name"], str)
        assert all(isinstance(item, dict) for item in tool["function"]["parameters"]["properties"].values())
    variables = body.get("chat_template_kwargs", {})
    assert not {"tools", "tokenize", "add_generation_prompt", "chat_template", "return_dict"} & variables.keys()
    assert all(isinstance(value, str | bool | int | float) for value in variables.values())


def survives(raw: bytes) -> None:
    def no_constant(name: str) -> None:
        raise AssertionError(name)

    body = json.loads(raw.decode(), parse_constant=no_constant)
    validate(body)
    spares_the_thread(body)
    renders(body)
    json.dumps(body, ensure_ascii=False).encode()  # no lone surrogate anywhere


def outcome(body: bytes, kind: Kind) -> ParsedRequest | RequestError:
    try:
        parsed = parse(body, kind, rules=Rules(vocab_size=VOCAB))
    except RequestError as refused:
        return refused
    for stream in (False, True):
        survives(upstream_body(parsed, model="/models/one", stream=stream, request_rules=NONE))
    return parsed


FIELDS = [
    "model",
    "stream",
    "stream_options",
    "messages",
    "prompt",
    "max_tokens",
    "max_completion_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "stop",
    "xtc_probability",
    "xtc_threshold",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "repetition_context_size",
    "n",
    "tools",
    "presence_context_size",
    "frequency_context_size",
    "num_draft_tokens",
    "logprobs",
    "top_logprobs",
    "logit_bias",
    "tool_choice",
    "suffix",
    "chat_template_kwargs",
    "response_format",
    "functions",
    "function_call",
    "adapters",
    "draft_model",
    "role_mapping",
    "parallel_tool_calls",
    "reasoning_effort",
    "metadata",
    "store",
    "service_tier",
    "user",
    "echo",
    "best_of",
    "repeat_penalty",
    "unheard_of",
]

text = st.text(st.characters(codec=None), max_size=12)  # surrogates included
numbers = st.one_of(
    st.integers(-3, 2),
    st.integers(),
    st.floats(),
    st.sampled_from([10**30, 10**400, -(10**400), 2**31, 2**63, 2**64, 40.0, 0.5, 299, 300, 1e-320, 1e39, -0.0]),
)
keys = st.one_of(
    text,
    st.sampled_from(["type", "text", "role", "content", "function", "name", "arguments", "include_usage", "5", "300"]),
    st.sampled_from(["tokenize", "chat_template", "enable_thinking", "properties", "parameters", "tool_calls"]),
)
words = st.sampled_from(
    ["user", "system", "developer", "function", "text", "none", "{}", "[1]", "{", "image_url", "0.7"]
)
scalars = st.one_of(st.none(), st.booleans(), numbers, text, words)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4), max_leaves=12
)

parts = st.one_of(values, st.builds(lambda t, v: {"type": t, "text": v}, words, text))
calls = st.one_of(values, st.builds(lambda n, a: {"function": {"name": n, "arguments": a}}, text, scalars))
messages = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "developer", "user", "assistant", "tool", "function", "x"])},
    optional={
        "content": st.one_of(text, st.none(), st.lists(parts, max_size=3)),
        "tool_calls": st.lists(calls, max_size=2),
        "name": scalars,
        "reasoning_content": scalars,
        "tool_call_id": scalars,
    },
)
schemas = st.dictionaries(st.sampled_from(["type", "properties", "x"]), values, max_size=3)
tools = st.builds(lambda n, p: {"type": "function", "function": {"name": n, "parameters": p}}, text, schemas)
likely = {
    "messages": st.lists(messages, max_size=4),
    "prompt": st.one_of(text, st.lists(text, max_size=2)),
    "tools": st.lists(tools, max_size=2),
    "logit_bias": st.dictionaries(st.integers(-2, 400).map(str), numbers, max_size=3),
    "stop": st.lists(scalars, max_size=3),
}


@pytest.mark.parametrize("kind", list(Kind))
@pytest.mark.parametrize("field", FIELDS)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_value_in_any_field(kind: Kind, field: str, data: st.DataObject) -> None:
    value = data.draw(st.one_of(values, likely[field]) if field in likely else values)
    body = {"messages": [{"role": "user", "content": "hi"}], "prompt": "hi", field: value}
    result = outcome(json.dumps(body).encode(), kind)
    if isinstance(result, RequestError):
        assert result.error.code is Code.INVALID_REQUEST
        assert result.error.param is not None
        assert result.error.param.partition(".")[0].partition("[")[0] == field


@settings(max_examples=120, deadline=None)
@given(
    body=st.fixed_dictionaries(likely, optional={name: values for name in FIELDS if name not in likely}),
    kind=st.sampled_from(list(Kind)),
)
def test_any_mixture_of_fields(body: dict[str, Any], kind: Kind) -> None:
    result = outcome(json.dumps(body).encode(), kind)
    if isinstance(result, RequestError):
        assert result.error.param is not None


@settings(max_examples=120, deadline=None)
@given(body=st.binary(max_size=200), kind=st.sampled_from(list(Kind)))
def test_any_bytes(body: bytes, kind: Kind) -> None:
    outcome(body, kind)


@settings(max_examples=120, deadline=None)
@given(
    cut=st.integers(0, 120),
    junk=st.binary(max_size=4),
    kind=st.sampled_from(list(Kind)),
)
def test_a_good_body_cut_or_spoilt(cut: int, junk: bytes, kind: Kind) -> None:
    good = b'{"prompt": "hi", "messages": [{"role": "user", "content": "hi"}], "temperature": 0.5, "stop": ["a"]}'
    outcome(good[:cut] + junk + good[cut:], kind)


def test_the_oracle_is_not_blind() -> None:
    """Each known killer, in an otherwise good body, is caught by it."""
    good: dict[str, Any] = {"model": "m", "stream": False, "prompt": "hi"}
    survives(json.dumps(good).encode())
    killers: list[dict[str, Any]] = [
        {"top_k": VOCAB},
        {"prompt": ""},
        {"prompt": ["hi"]},
        {"stop": [1]},
        {"stop": 5},
        {"presence_penalty": 10**400},
        {"seed": -1},
        {"logit_bias": {"300": 1}},
        {"xtc_threshold": 0.6},
        {"temperature": float("nan")},
        {"repetition_context_size": 2**62},
        {"stream": True},
        {"max_tokens": None},
    ]
    for killer in killers:
        with pytest.raises((AssertionError, KeyError, OverflowError)):
            survives(json.dumps(good | killer).encode())

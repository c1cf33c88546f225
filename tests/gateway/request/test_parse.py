"""Whole bodies: what is dropped, limits, logprobs, prompts, the vocabulary, and bytes that are no body."""

import json
from typing import Any

import pytest

from gateway.api.errors import Code, RequestError
from gateway.api.kinds import Kind
from gateway.request import ALLOWABLE, DEFAULT_RULES, ParsedRequest, Rules, fit_allowed, fit_vocab, parse

HI = [{"role": "user", "content": "hi"}]
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
KNOWN_VOCAB = Rules(vocab_size=1000)


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": HI, **fields}


def completion(**fields: Any) -> dict[str, Any]:
    return {"model": "m", "prompt": "once", **fields}


def take(body: dict[str, Any], rules: Rules = DEFAULT_RULES) -> ParsedRequest:
    kind = Kind.CHAT if "messages" in body else Kind.COMPLETION
    return parse(json.dumps(body).encode(), kind, rules=rules)


def refusal(body: dict[str, Any], rules: Rules = DEFAULT_RULES) -> tuple[str | None, str]:
    with pytest.raises(RequestError) as caught:
        take(body, rules)
    assert caught.value.error.code is Code.INVALID_REQUEST
    return caught.value.error.param, caught.value.error.message


# What mlx_lm.server would read past.


@pytest.mark.parametrize(
    ("fields", "warned"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, True),
        ({"response_format": {"type": "json_object"}}, True),
        ({"response_format": {"type": "text"}}, False),
        ({"response_format": None}, False),
        ({"parallel_tool_calls": True}, False),
        ({"parallel_tool_calls": False}, True),
        ({"reasoning_effort": "low"}, True),
        ({"echo": True}, True),
        ({"echo": False}, False),
        ({"suffix": "end"}, True),
        ({"best_of": 1}, False),
        ({"best_of": 3}, True),
        ({"repeat_penalty": 1.2}, True),
        ({"adapters": "/an/adapter"}, True),
        ({"draft_model": "other"}, True),
        ({"role_mapping": {"user": "U"}}, True),
        ({"user": "ann"}, False),
        ({"metadata": {"a": 1}}, False),
        ({"store": False}, False),
        ({"service_tier": "auto"}, False),
        ({"prompt_cache_key": "k"}, False),
        ({"never_heard_of": [float("nan")]}, False),
    ],
)
def test_what_is_not_known_is_dropped_and_noted(fields: dict[str, Any], warned: bool) -> None:
    parsed = take(chat(**fields))
    (name,) = fields
    assert name not in parsed.params
    assert (name in parsed.normalized) is (fields[name] is not None)
    assert bool(parsed.warnings) is warned


def test_names_of_unknown_fields_cannot_carry_header_lines_or_fill_a_header() -> None:
    assert take(chat(**{"x\r\nset-cookie: a=b": 1})).normalized == ("unprintable-name",)
    assert len(take(chat(**{f"f{i}": 1 for i in range(1000)})).normalized) <= 32


def test_what_the_rules_allow_is_kept() -> None:
    allowing = Rules(allow=frozenset(ALLOWABLE))
    fields = {"adapters": "/a", "draft_model": "d", "role_mapping": {"user": "U: "}, "reasoning_effort": "low"}
    parsed = take(chat(**fields), allowing)
    assert parsed.params["adapters"] == "/a"
    assert parsed.params["draft_model"] == "d"
    assert parsed.params["role_mapping"] == {"user": "U: "}
    assert parsed.params["chat_template_kwargs"] == {"reasoning_effort": "low"}
    assert parsed.warnings == ()
    for field in fields:
        assert (refusal(chat(**{field: 5}), allowing)[0] or "").startswith(field)


def test_functions_are_refused() -> None:
    assert refusal(chat(functions=[{"name": "f"}]))[0] == "functions"
    assert "functions" not in take(chat(functions=[])).params


# Names, limits, streams, logprobs.


@pytest.mark.parametrize(
    ("fields", "limit"),
    [
        ({}, None),
        ({"max_completion_tokens": 5}, 5),
        ({"max_tokens": 9, "max_completion_tokens": 5}, 5),
        ({"max_tokens": 9, "max_completion_tokens": None}, 9),
        ({"max_tokens": 9, "max_completion_tokens": -1}, 9),
    ],
)
def test_the_limit(fields: dict[str, Any], limit: int | None) -> None:
    parsed = take(chat(**fields))
    assert parsed.max_tokens == limit
    assert parsed.params.get("max_tokens") == limit
    assert "max_completion_tokens" not in parsed.params


def test_the_limit_is_clamped_by_the_rules() -> None:
    parsed = take(chat(max_tokens=100), Rules(max_tokens=10))
    assert (parsed.max_tokens, parsed.normalized) == (10, ("max_tokens",))


def test_n_of_one_is_dropped() -> None:
    assert "n" not in take(chat(n=1)).params
    assert "n" not in take(chat(n=1.0)).params


@pytest.mark.parametrize(
    ("options", "usage"),
    [(None, False), ({}, False), ({"include_usage": None}, False), ({"include_usage": True}, True)],
)
def test_stream_options(options: Any, usage: bool) -> None:
    parsed = take(chat(stream=True, stream_options=options))
    assert parsed.stream
    assert parsed.include_usage is usage
    assert not {"stream", "stream_options", "model"} & parsed.params.keys()


@pytest.mark.parametrize(("model", "name"), [(None, ""), ("", ""), ("gpt-4o", "gpt-4o")])
def test_the_model_as_the_client_named_it(model: Any, name: str) -> None:
    assert take(chat(model=model)).model == name


@pytest.mark.parametrize(
    ("make", "fields", "wanted", "sent"),
    [
        (chat, {}, False, {}),
        (chat, {"logprobs": False}, False, {"logprobs": False}),
        (chat, {"logprobs": True, "top_logprobs": 3}, True, {"logprobs": True, "top_logprobs": 3}),
        (chat, {"top_logprobs": 3}, True, {"top_logprobs": 3}),
        (completion, {"logprobs": 0}, True, {"logprobs": True, "top_logprobs": 0}),
        (completion, {"logprobs": 5}, True, {"logprobs": True, "top_logprobs": 5}),
        (completion, {"logprobs": 50}, True, {"logprobs": True, "top_logprobs": 11}),
        (completion, {"logprobs": 5, "top_logprobs": 2}, True, {"logprobs": True, "top_logprobs": 2}),
        (completion, {"logprobs": True}, True, {"logprobs": True}),
    ],
)
def test_logprobs(make: Any, fields: dict[str, Any], wanted: bool, sent: dict[str, Any]) -> None:
    parsed = take(make(**fields))
    assert parsed.wants_logprobs is wanted
    assert {name: parsed.params[name] for name in ("logprobs", "top_logprobs") if name in parsed.params} == sent


def test_a_count_as_logprobs_is_for_completions_only() -> None:
    assert refusal(chat(logprobs=5))[0] == "logprobs"
    assert refusal(completion(logprobs=-1))[0] == "logprobs"
    assert refusal(completion(logprobs=1.5))[0] == "logprobs"


@pytest.mark.parametrize("prompt", ["", None, [], ["a"] * 17, [1, 2], [[1, 2]], 5, {}, True])
def test_prompts_that_are_refused(prompt: Any) -> None:
    assert refusal({"prompt": prompt})[0] == "prompt"


@pytest.mark.parametrize("prompt", [["a", ""], ["a", 5], ["a", None], ["a", ["b"]]])
def test_a_prompt_of_several_that_is_refused(prompt: Any) -> None:
    assert refusal({"prompt": prompt})[0] == "prompt[1]"


def test_several_prompts_and_choices_become_parts_in_the_order_of_openai() -> None:
    assert take(completion()).parts == ()
    several = take({"prompt": ["a", "b"], "n": 2, "seed": 2**64 - 1})
    assert several.parts == (
        {"prompt": "a", "seed": 2**64 - 1},
        {"prompt": "a", "seed": 0},
        {"prompt": "b", "seed": 2**64 - 1},
        {"prompt": "b", "seed": 0},
    )
    assert (several.copies, several.params["prompt"]) == (2, "a")
    assert take({"prompt": ["a", "b"]}).parts == ({"prompt": "a"}, {"prompt": "b"})
    assert take(chat(n=3)).parts == ({}, {}, {})
    assert take(chat(n=1.0)).parts == ()
    assert refusal({"prompt": ["a"] * 9, "n": 2})[0] == "n"


def test_what_only_the_first_model_allows_is_not_taken_to_another() -> None:
    body = chat(adapters="x", reasoning_effort="low", chat_template_kwargs={"chat_template": "y", "a": 1})
    parsed = take(body, Rules(allow=frozenset(ALLOWABLE)))
    assert parsed.params["adapters"] == "x"
    less = fit_allowed(parsed, frozenset())
    assert "adapters" not in less.params
    assert less.params["chat_template_kwargs"] == {"a": 1, "reasoning_effort": "low"}
    assert fit_allowed(parsed, frozenset(ALLOWABLE)) is parsed


def test_a_list_of_one_prompt_is_a_prompt() -> None:
    parsed = take({"prompt": ["hi"]})
    assert (parsed.params, parsed.normalized, parsed.prompt_chars) == ({"prompt": "hi"}, ("prompt",), 2)


def test_prompt_chars_counts_everything_the_model_will_read() -> None:
    plain = take(chat()).prompt_chars
    assert plain >= 2
    assert take(chat(tools=[TOOL])).prompt_chars > plain + 20
    assert take({"messages": [{"role": "assistant", "tool_calls": [CALL] * 10}]}).prompt_chars >= 10 * len('f{"a": 1}')


# The vocabulary.


def test_with_a_known_vocabulary_ids_and_top_k_stay_inside_it() -> None:
    assert take(chat(logit_bias={"999": 5, "007": -1}), KNOWN_VOCAB).params["logit_bias"] == {"999": 5, "7": -1}
    assert refusal(chat(logit_bias={"1000": 5}), KNOWN_VOCAB)[0] == "logit_bias"
    assert take(chat(top_k=999), KNOWN_VOCAB).normalized == ()
    clamped = take(chat(top_k=1000), KNOWN_VOCAB)
    assert (clamped.params["top_k"], clamped.normalized) == (999, ("top_k",))


def test_with_an_unknown_vocabulary_biases_are_refused() -> None:
    assert refusal(chat(logit_bias={"5": 1}))[0] == "logit_bias"


def test_the_bounds_can_wait_until_the_model_is_known() -> None:
    first = take(chat(logit_bias={"5": 1}, top_k=5000), Rules(defer_vocab=True))
    assert first.params["top_k"] == 5000
    later = fit_vocab(first, 6000)
    assert later is first
    assert fit_vocab(first, 300).params["top_k"] == 299
    assert first.params["top_k"] == 5000
    with pytest.raises(RequestError):
        fit_vocab(first, 5)


# Bytes.


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b'{"messages": [}',
        b"\xff\xfe",
        b'{"messages": "\xff"}',
        b"[" * 100_000,
        b'{"a":' * 5000 + b"1" + b"}" * 5000,
        b'{"a": ' + b"1" * 5000 + b"}",
        b"{'a': 1}",
        b"\x1f\x8b\x08\x00",
    ],
)
def test_bodies_that_are_no_json_object(body: bytes) -> None:
    with pytest.raises(RequestError) as caught:
        parse(body, Kind.CHAT)
    assert caught.value.error.code is Code.INVALID_REQUEST
    assert caught.value.error.param is None
    assert "body" in caught.value.error.message


def test_a_byte_order_mark_and_doubled_keys_are_read_as_python_would() -> None:
    body = b'\xef\xbb\xbf{"prompt": "a", "prompt": "b", "seed": 1, "seed": 2}'
    assert parse(body, Kind.COMPLETION).params == {"prompt": "b", "seed": 2}


def test_what_templates_may_write_into_the_prompt_is_bounded_and_counted() -> None:
    def kwargs(size: int) -> dict[str, Any]:
        return chat(chat_template_kwargs={"date_string": "x" * size})

    assert take(kwargs(4096)).prompt_chars >= 4096
    assert refusal(kwargs(4097))[0] == "chat_template_kwargs.date_string"
    call = {**CALL, "id": "x" * 257}
    assert refusal({"messages": [{"role": "assistant", "tool_calls": [call]}]})[0] == "messages[0].tool_calls[0].id"
    tool = {"role": "tool", "content": "x", "tool_call_id": "x" * 257}
    assert refusal({"messages": [tool]})[0] == "messages[0].tool_call_id"


def test_token_ids_are_called_what_they_are() -> None:
    for prompt in ([5] * 50, [[5] * 50]):
        assert "token ids are not supported" in refusal({"prompt": prompt})[1]

"""Sampling fields, value by value: what is sent for it, or that it is refused by name."""

import json
from typing import Any

import pytest

from gateway.api.errors import Code, RequestError
from gateway.api.kinds import Kind
from gateway.request import DEFAULT_RULES, ParsedRequest, Rules, parse

HI = [{"role": "user", "content": "hi"}]
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


# field, value sent by the client, value sent on (ABSENT: left out), noted as changed
ABSENT = object()
FIELDS: list[tuple[str, Any, Any, bool]] = [
    ("temperature", 0.7, 0.7, False),
    ("temperature", 0, 0, False),
    ("temperature", 2, 2, False),
    ("temperature", 1e-320, 0, True),
    ("temperature", None, ABSENT, False),
    ("top_p", 1, 1, False),
    ("top_p", 0.0, 0.0, False),
    ("top_k", 40, 40, False),
    ("top_k", 40.0, 40, True),
    ("top_k", -1, ABSENT, True),
    ("top_k", 0, 0, False),
    ("top_k", 100_000, 128, True),
    ("min_p", 0.05, 0.05, False),
    ("xtc_probability", 0, 0.0, True),
    ("xtc_probability", 1, 1.0, True),
    ("xtc_probability", 0.5, 0.5, False),
    ("xtc_threshold", 0, 0.0, True),
    ("xtc_threshold", 0.1, 0.1, False),
    ("xtc_threshold", 0.9, 0.5, True),
    ("xtc_threshold", 1, 0.5, True),
    ("repetition_penalty", 1.1, 1.1, False),
    ("repetition_penalty", 0, 0, False),
    ("presence_penalty", -2, -2, False),
    ("frequency_penalty", 2.0, 2.0, False),
    ("repetition_context_size", 64, 64, False),
    ("repetition_context_size", 2**40, 1_000_000, True),
    ("presence_context_size", 20.0, 20, True),
    ("frequency_context_size", 2**63, 1_000_000, True),
    ("num_draft_tokens", 3, 3, False),
    ("num_draft_tokens", 5000, 64, True),
    ("max_tokens", 1, 1, False),
    ("max_tokens", 3.0, 3, True),
    ("max_tokens", -1, ABSENT, True),
    ("max_tokens", 2_000_000, 1_000_000, True),
    ("top_logprobs", 0, 0, False),
    ("top_logprobs", 11, 11, False),
    ("top_logprobs", 20, 11, True),
    ("top_logprobs", -1, ABSENT, True),
    ("logprobs", True, True, False),
    ("logprobs", None, ABSENT, False),
    ("seed", 7, 7, False),
    ("seed", 1.0, 1, True),
    ("seed", -1, ABSENT, True),
    ("seed", -2, 2**64 - 2, True),
    ("seed", 2**64 - 1, 2**64 - 1, False),
    ("seed", None, ABSENT, False),
    ("stop", "END", ["END"], False),
    ("stop", ["a", "b"], ["a", "b"], False),
    ("stop", ["a", "", "a"], ["a"], True),
    ("stop", "", ABSENT, True),
    ("stop", [], ABSENT, False),
    ("stop", ["\ud83d"], ["�"], True),
    ("logit_bias", {}, ABSENT, False),
]


@pytest.mark.parametrize("case", FIELDS, ids=lambda case: f"{case[0]}={case[1]!r}"[:60])
@pytest.mark.parametrize("make", [chat, completion])
def test_a_value_that_can_be_sent(make: Any, case: tuple[str, Any, Any, bool]) -> None:
    field, given, sent, noted = case
    parsed = take(make(**{field: given}))
    assert repr(parsed.params.get(field, ABSENT)) == repr(sent)  # repr: 1 and 1.0 are not the same to mlx_lm
    assert (field in parsed.normalized) is noted


REFUSED: list[tuple[str, Any]] = [
    *((name, "0.7") for name in ("temperature", "top_p", "min_p", "presence_penalty", "xtc_probability")),
    *((name, True) for name in ("temperature", "top_k", "max_tokens", "seed", "xtc_threshold", "top_logprobs")),
    *((name, float("nan")) for name in ("temperature", "top_p", "min_p", "xtc_threshold", "max_tokens", "seed")),
    *((name, float("inf")) for name in ("temperature", "repetition_penalty", "frequency_penalty", "top_k")),
    *((name, 10**400) for name in ("temperature", "presence_penalty", "max_tokens", "top_k", "seed", "top_logprobs")),
    *((name, [1]) for name in ("temperature", "max_tokens", "logprobs", "seed", "logit_bias", "num_draft_tokens")),
    *((name, {}) for name in ("temperature", "max_tokens", "stop", "seed", "stream", "model")),
    ("temperature", -0.1),
    ("temperature", 101),
    ("top_p", 1.01),
    ("top_p", -1),
    ("min_p", 2),
    ("xtc_probability", 1.5),
    ("xtc_threshold", -0.1),
    ("xtc_threshold", 1.5),
    ("repetition_penalty", -1),
    ("repetition_penalty", 1e-300),
    ("presence_penalty", 1e39),
    ("frequency_penalty", -101),
    ("top_k", -2),
    ("top_k", 1.5),
    ("max_tokens", 0),
    ("max_tokens", -2),
    ("max_tokens", "3"),
    ("max_tokens", 10**30),
    ("max_completion_tokens", 0),
    ("max_completion_tokens", "many"),
    ("repetition_context_size", -1),
    ("num_draft_tokens", -1),
    ("top_logprobs", -2),
    ("seed", "7"),
    ("seed", 2**64),
    ("max_tokens", 2**64),
    ("stop", 5),
    ("stop", True),
    ("stop", ["x" * 5000]),
    ("stop", [f"{i}" for i in range(129)]),
    ("logit_bias", {"-1": 1}),
    ("logit_bias", {"x": 1}),
    ("logit_bias", {"1_0": 1}),
    ("logit_bias", {str(2**31): 1}),
    ("logit_bias", "x"),
    ("n", 17),
    ("n", 1.5),
    ("n", 0),
    ("n", "1"),
    ("n", True),
    ("stream", 1),
    ("stream", "true"),
    ("stream_options", True),
    ("model", 5),
    ("model", "\ud800"),
]


@pytest.mark.parametrize(("field", "given"), REFUSED)
@pytest.mark.parametrize("make", [chat, completion])
def test_a_value_that_is_refused_by_name(make: Any, field: str, given: Any) -> None:
    param, message = refusal(make(**{field: given}), KNOWN_VOCAB)
    assert param == field
    assert message.startswith(field)
    assert len(message) < 400


def test_members_are_named_with_their_place() -> None:
    assert refusal(chat(stop=["a", 1]))[0] == "stop[1]"
    assert refusal(chat(stop=["a", None]))[0] == "stop[1]"
    assert refusal(chat(logit_bias={"5": float("nan")}))[0] == "logit_bias.5"
    assert refusal(chat(logit_bias={"5": 101}))[0] == "logit_bias.5"
    assert refusal(chat(logit_bias={"5": "1"}))[0] == "logit_bias.5"
    assert refusal(chat(stream_options={"include_usage": 1}))[0] == "stream_options.include_usage"


def test_a_message_says_what_was_expected_and_got_and_what_to_do() -> None:
    assert refusal(chat(temperature="0.7"))[1] == (
        'temperature: expected a number from 0 to 100, got the string "0.7"; send it without quotes'
    )

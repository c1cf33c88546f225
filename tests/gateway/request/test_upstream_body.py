"""What goes to the backend: the client's fields, the operator's, and what the gateway always sets."""

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gateway.api.kinds import Kind
from gateway.request import operator_problems, parse, upstream_body
from gateway.request.tools import RESERVED


@dataclass(frozen=True)
class Request:
    defaults: Mapping[str, Any] = field(default_factory=dict)
    force: Mapping[str, Any] = field(default_factory=dict)
    drop: Sequence[str] = ()


def sent(fields: dict[str, Any], rules: Request, stream: bool = False) -> dict[str, Any]:
    parsed = parse(json.dumps({"model": "alias", "prompt": "hi", **fields}).encode(), Kind.COMPLETION)
    body = json.loads(upstream_body(parsed, model="/models/one", stream=stream, request_rules=rules))
    assert isinstance(body, dict)
    return body


def test_the_model_and_the_stream_are_the_gateways() -> None:
    plain = sent({"stream": True, "stream_options": {}}, Request())
    assert plain == {"prompt": "hi", "model": "/models/one", "stream": False}
    streamed = sent({"stream": False}, Request(), stream=True)
    assert streamed == plain | {"stream": True, "stream_options": {"include_usage": True}}


def test_defaults_yield_to_the_client_and_force_does_not() -> None:
    rules = Request(defaults={"temperature": 0.5, "top_p": 0.9}, force={"seed": 1, "min_p": 0.1})
    body = sent({"temperature": 1, "seed": 9, "top_p": None}, rules)
    assert {name: body[name] for name in ("temperature", "top_p", "seed", "min_p")} == {
        "temperature": 1,
        "top_p": 0.9,
        "seed": 1,
        "min_p": 0.1,
    }


def test_drop_comes_last_but_spares_the_essentials() -> None:
    rules = Request(
        defaults={"top_p": 0.9}, force={"seed": 1}, drop=["seed", "top_p", "temperature", "prompt", "model"]
    )
    assert sent({"temperature": 1}, rules) == {"prompt": "hi", "model": "/models/one", "stream": False}


def test_the_newer_name_of_max_tokens_means_the_same_to_the_operator() -> None:
    assert sent({"max_tokens": 5}, Request(defaults={"max_completion_tokens": 9}))["max_tokens"] == 5
    assert sent({}, Request(defaults={"max_completion_tokens": 9}))["max_tokens"] == 9
    assert sent({"max_tokens": 5}, Request(force={"max_completion_tokens": 9}))["max_tokens"] == 9
    assert "max_tokens" not in sent({"max_tokens": 5}, Request(drop=["max_completion_tokens"]))


def test_the_operators_values_are_made_to_fit_too() -> None:
    rules = Request(defaults={"xtc_probability": 1, "model": "x", "temperature": None}, force={"xtc_threshold": 0.9})
    body = sent({}, rules)
    assert repr(body["xtc_probability"]) == "1.0"
    assert body["xtc_threshold"] == 0.5
    assert body["model"] == "/models/one"
    assert "temperature" not in body


def test_template_variables_are_merged_one_by_one() -> None:
    messages = [{"role": "user", "content": "hi"}]
    body = {"messages": messages, "chat_template_kwargs": {"a": 1, "b": 1, "c": 1}}
    parsed = parse(json.dumps(body).encode(), Kind.CHAT)
    rules = Request(
        defaults={"chat_template_kwargs": {"b": 0, "d": 0}},
        force={"chat_template_kwargs": {"c": 2}},
    )
    out = json.loads(upstream_body(parsed, model="m", stream=False, request_rules=rules))
    assert out["chat_template_kwargs"] == {"a": 1, "b": 1, "c": 2, "d": 0}
    assert parsed.params["chat_template_kwargs"] == {"a": 1, "b": 1, "c": 1}


def test_problems_of_the_operators_values_are_all_told() -> None:
    assert operator_problems({"temperature": 0.7, "chat_template_kwargs": {"enable_thinking": False}}) == ()
    problems = operator_problems({"temperature": "hot", "top_p": 2, "chat_template_kwargs": {"tokenize": False}})
    assert [problem.partition(":")[0] for problem in problems] == [
        "temperature",
        "top_p",
        "chat_template_kwargs.tokenize",
    ]


def test_tools_and_roles_of_the_operator_are_checked_too() -> None:
    assert (
        operator_problems({"tools": [{"type": "function", "function": {"name": "f"}}], "role_mapping": {"a": "b"}})
        == ()
    )
    assert len(operator_problems({"tools": 5, "role_mapping": ["user"]})) == 2


def test_every_parameter_of_apply_chat_template_is_reserved() -> None:
    from transformers import PreTrainedTokenizerBase  # noqa: PLC0415 - heavy

    parameters = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    named = {name for name, parameter in parameters.items() if parameter.kind is not parameter.VAR_KEYWORD}
    assert named <= RESERVED | {"chat_template"}

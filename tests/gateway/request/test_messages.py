"""Messages, tools and template variables: what is sent for them, or which place in them is named."""

import json
from typing import Any

import pytest

from gateway.api.errors import Code, RequestError
from gateway.api.kinds import Kind
from gateway.request import DEFAULT_RULES, ParsedRequest, Rules, parse
from gateway.request.values import MENDED_AT_ONCE

BILLED = "x-anthropic-billing-header: cc_version=2.1.0; cch=4af21;"


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


HI = [{"role": "user", "content": "hi"}]
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": HI, **fields}


def take(body: dict[str, Any], rules: Rules = DEFAULT_RULES) -> ParsedRequest:
    kind = Kind.CHAT if "messages" in body else Kind.COMPLETION
    return parse(json.dumps(body).encode(), kind, rules=rules)


def refusal(body: dict[str, Any], rules: Rules = DEFAULT_RULES) -> tuple[str | None, str]:
    with pytest.raises(RequestError) as caught:
        take(body, rules)
    assert caught.value.error.code is Code.INVALID_REQUEST
    return caught.value.error.param, caught.value.error.message


# Messages.


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "user", "content": ["a"] * 4097}, "messages[0].content"),
        ({"role": "user", "content": "a", **{f"k{i}": 1 for i in range(63)}}, "messages[0]"),
        ({"role": "assistant", "tool_calls": [CALL] * 1025}, "messages[0].tool_calls"),
    ],
)
def test_every_list_and_object_of_a_message_has_a_bound(message: dict[str, Any], param: str) -> None:
    where, said = refusal({"messages": [message]})
    assert where == param
    assert "at most" in said


def test_half_an_emoji_in_a_long_text_is_mended() -> None:
    before = "x" * (MENDED_AT_ONCE - 1)
    parsed = take(chat(messages=[{"role": "user", "content": before + "\ud83d\udc00"[:1] + "y"}]))
    assert parsed.params["messages"][0]["content"] == before + "\ufffdy"


MESSAGES: list[tuple[list[Any], list[dict[str, Any]]]] = [
    (HI, HI),
    ([{"role": "developer", "content": "d"}, *HI], [{"role": "system", "content": "d"}, *HI]),
    (
        [{"role": "system", "content": "a"}, *HI, {"role": "developer", "content": "b"}],
        [{"role": "system", "content": "a\n\nb"}, *HI],
    ),
    ([*HI, {"role": "system", "content": "s"}], [{"role": "system", "content": "s"}, *HI]),
    ([{"role": "system", "content": f"{BILLED}\na\nb"}, *HI], [{"role": "system", "content": "a\nb"}, *HI]),
    ([{"role": "system", "content": [_text(BILLED), _text("a")]}, *HI], [{"role": "system", "content": "a"}, *HI]),
    ([{"role": "system", "content": [_text(f"{BILLED}\na")]}, *HI], [{"role": "system", "content": "a"}, *HI]),
    (
        [{"role": "system", "content": [_text("a"), _text(BILLED)]}, *HI],
        [{"role": "system", "content": f"a{BILLED}"}, *HI],
    ),
    ([{"role": "user", "content": f"{BILLED}\na"}], [{"role": "user", "content": f"{BILLED}\na"}]),
    ([{"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "input_text", "text": "i"}]}], HI),
    ([{"role": "user", "content": [{"type": "refusal", "refusal": "hi"}]}], HI),
    ([{"role": "user", "content": ["hi"]}], HI),
    ([{"role": "user", "content": []}], [{"role": "user", "content": ""}]),
    ([{"role": "user", "content": "hi", "cache_control": {"type": "ephemeral"}}], HI),
    ([{"role": "user", "content": "hi", "name": None, "tool_calls": None}], HI),
    ([{"role": "user", "content": "hi", "name": "ann"}], [{"role": "user", "content": "hi", "name": "ann"}]),
    ([{"role": "user", "content": "\ud83d!"}], [{"role": "user", "content": "�!"}]),
    ([{"role": "assistant", "content": None}, *HI], [{"role": "assistant", "content": ""}, *HI]),
    (
        [{"role": "assistant", "content": None, "tool_calls": [CALL]}],
        [{"role": "assistant", "content": "", "tool_calls": [CALL]}],
    ),
    ([{"role": "assistant", "tool_calls": []}, *HI], [{"role": "assistant", "content": ""}, *HI]),
    (
        [{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": ""}}]}],
        [
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{}"}}],
            }
        ],
    ),
    (
        [{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"a": [1]}}}]}],
        [
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": '{"a":[1]}'}}],
            }
        ],
    ),
    (
        [{"role": "tool", "tool_call_id": "c1", "content": "42"}],
        [{"role": "tool", "tool_call_id": "c1", "content": "42"}],
    ),
    ([{"role": "function", "name": "f", "content": "42"}], [{"role": "tool", "name": "f", "content": "42"}]),
    (
        [{"role": "assistant", "content": "a", "reasoning_content": "r"}],
        [{"role": "assistant", "content": "a", "reasoning_content": "r"}],
    ),
]


@pytest.mark.parametrize(("given", "sent"), MESSAGES)
def test_messages_that_can_be_sent(given: list[Any], sent: list[dict[str, Any]]) -> None:
    assert take({"messages": given}).params["messages"] == sent


def said(content: Any, role: str = "user") -> list[Any]:
    return [{"role": role, "content": content}]


def called(**function: Any) -> list[Any]:
    return [{"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]}]


BAD_MESSAGES: list[tuple[Any, str]] = [
    ([], "messages"),
    (None, "messages"),
    ("hi", "messages"),
    ({}, "messages"),
    ([None], "messages[0]"),
    (["hi"], "messages[0]"),
    ([*HI, {"content": "x"}], "messages[1].role"),
    ([{"role": None, "content": "x"}], "messages[0].role"),
    ([{"role": "robot", "content": "x"}], "messages[0].role"),
    ([{"role": ["user"], "content": "x"}], "messages[0].role"),
    (said(None), "messages[0].content"),
    (said(None, "system"), "messages[0].content"),
    (said(5), "messages[0].content"),
    (said({"type": "text", "text": "x"}), "messages[0].content"),
    (said([5]), "messages[0].content[0]"),
    (said([{"type": "text"}]), "messages[0].content[0].text"),
    (said([{"type": "text", "text": None}]), "messages[0].content[0].text"),
    (said([{"text": "x"}]), "messages[0].content[0].type"),
    (said([{"type": [], "text": "x"}]), "messages[0].content[0].type"),
    (said([{"type": "image_url", "image_url": {"url": "http://10.0.0.1/"}}]), "messages[0].content[0].type"),
    (said([{"type": "input_image", "image_url": "http://10.0.0.1/"}]), "messages[0].content[0].type"),
    (said([{"type": "input_audio", "input_audio": {}}]), "messages[0].content[0].type"),
    (said([{"type": "file", "file": {}}]), "messages[0].content[0].type"),
    ([{"role": "user", "content": "x", "name": 5}], "messages[0].name"),
    ([{"role": "tool", "content": "x", "tool_call_id": 5}], "messages[0].tool_call_id"),
    ([{"role": "tool", "content": {"a": 1}}], "messages[0].content"),
    ([{"role": "assistant", "function_call": {"name": "f"}}], "messages[0].function_call"),
    ([{"role": "assistant", "tool_calls": {}}], "messages[0].tool_calls"),
    ([{"role": "assistant", "tool_calls": [5]}], "messages[0].tool_calls[0]"),
    ([{"role": "assistant", "tool_calls": [{"type": "custom"}]}], "messages[0].tool_calls[0].type"),
    ([{"role": "assistant", "tool_calls": [{"id": "c"}]}], "messages[0].tool_calls[0].function"),
    (called(arguments="{}"), "messages[0].tool_calls[0].function.name"),
    (called(name="", arguments="{}"), "messages[0].tool_calls[0].function.name"),
    (called(name="f", arguments='{"a":'), "messages[0].tool_calls[0].function.arguments"),
    (called(name="f", arguments="[1]"), "messages[0].tool_calls[0].function.arguments"),
    (called(name="f", arguments='{"a": NaN}'), "messages[0].tool_calls[0].function.arguments"),
    (called(name="f", arguments="\ufeff{}"), "messages[0].tool_calls[0].function.arguments"),
    (called(name="f", arguments='{"a":' + "[" * 100 + "]" * 100 + "}"), "messages[0].tool_calls[0].function.arguments"),
    (called(name="f", arguments="[" * 100_000), "messages[0].tool_calls[0].function.arguments"),
    (called(name="f", arguments=5), "messages[0].tool_calls[0].function.arguments"),
]


@pytest.mark.parametrize(("given", "param"), BAD_MESSAGES)
def test_messages_that_are_refused_with_their_place(given: Any, param: str) -> None:
    assert refusal({"messages": given})[0] == param


def test_a_merged_system_message_is_noted() -> None:
    two = [{"role": "system", "content": "a"}, *HI, {"role": "system", "content": "b"}]
    assert "messages.system" in take({"messages": two}).normalized
    assert "messages.system" in take({"messages": [*two[::2], *HI]}).normalized
    assert take({"messages": [{"role": "system", "content": "a"}, *HI]}).normalized == ()


# Tools and template variables.


def test_tools_are_kept_with_what_the_parsers_need() -> None:
    bare = {"type": "function", "function": {"name": "f", "strict": True, "parameters": None}}
    odd = {"type": "function", "function": {"name": "g", "parameters": {"properties": {"x": True}, "required": ["x"]}}}
    sent = take(chat(tools=[TOOL, bare, odd])).params["tools"]
    assert sent[0] == TOOL
    assert sent[1]["function"] == {"name": "f", "strict": True, "parameters": {"type": "object", "properties": {}}}
    assert sent[2]["function"]["parameters"] == {"type": "object", "properties": {"x": {}}, "required": ["x"]}
    assert "tools" not in take(chat(tools=[])).params
    assert "tools" not in take(chat(tools=None)).params


BAD_TOOLS: list[tuple[Any, str]] = [
    ({}, "tools"),
    ([5], "tools[0]"),
    ([{"type": "web_search"}], "tools[0].type"),
    ([{"function": {"name": "f"}}], "tools[0].type"),
    ([{"type": "function", "name": "f"}], "tools[0].function"),
    ([{"type": "function", "function": {}}], "tools[0].function.name"),
    ([TOOL, {"type": "function", "function": {"name": ""}}], "tools[1].function.name"),
    ([{"type": "function", "function": {"name": "f", "description": 5}}], "tools[0].function.description"),
    ([{"type": "function", "function": {"name": "f", "parameters": []}}], "tools[0].function.parameters"),
    (
        [{"type": "function", "function": {"name": "f", "parameters": {"properties": []}}}],
        "tools[0].function.parameters.properties",
    ),
    (
        [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"x": 1}}}}],
        "tools[0].function.parameters.properties.x",
    ),
    ([{"type": "function", "function": {"name": "f", "x": float("nan")}}], "tools"),
    ([{"type": "function", "function": {"name": "f", "x": "\ud800"}}], "tools"),
    ([{"type": "function", "function": {"name": "f", "x": 10**400}}], "tools"),
    ([TOOL] * 513, "tools"),
]


@pytest.mark.parametrize(("given", "param"), BAD_TOOLS)
def test_tools_that_are_refused_with_their_place(given: Any, param: str) -> None:
    assert refusal(chat(tools=given))[0] == param


def test_tools_nested_too_deeply_are_refused() -> None:
    deep: Any = "x"
    for _ in range(70):
        deep = [deep]
    assert refusal(chat(tools=[{"type": "function", "function": {"name": "f", "x": deep}}]))[0] == "tools"


def test_tool_choice_none_takes_the_tools_away_and_required_warns() -> None:
    none = take(chat(tools=[TOOL], tool_choice="none"))
    assert "tools" not in none.params
    assert none.normalized == ("tools",)
    assert take(chat(tools=[TOOL], tool_choice="auto")).warnings == ()
    required = take(chat(tools=[TOOL], tool_choice="required"))
    assert required.params["tools"] == [TOOL]
    assert len(required.warnings) == 1


def test_template_variables_that_can_be_sent() -> None:
    variables = {"enable_thinking": False, "effort": "low", "budget": 5, "share": 0.5}
    assert take(chat(chat_template_kwargs=variables)).params["chat_template_kwargs"] == variables
    assert "chat_template_kwargs" not in take(chat(chat_template_kwargs={})).params
    assert "chat_template_kwargs" not in take(chat(chat_template_kwargs={"enable_thinking": None})).params


@pytest.mark.parametrize(
    "name",
    [
        "tools",
        "tokenize",
        "add_generation_prompt",
        "continue_final_message",
        "return_dict",
        "messages",
        "a-b",
        "",
        "__x",
    ],
)
def test_reserved_template_variables_are_refused(name: str) -> None:
    assert (refusal(chat(chat_template_kwargs={name: True}))[0] or "").startswith("chat_template_kwargs")


@pytest.mark.parametrize("value", [[1], {"a": 1}, float("nan"), 10**400, "\ud800"])
def test_template_variables_are_scalars(value: Any) -> None:
    assert refusal(chat(chat_template_kwargs={"x": value}))[0] == "chat_template_kwargs.x"


def test_a_template_of_the_clients_own_is_stripped_unless_allowed() -> None:
    body = chat(chat_template_kwargs={"chat_template": "{{ 1 }}"})
    stripped = take(body)
    assert "chat_template_kwargs" not in stripped.params
    assert len(stripped.warnings) == 1
    allowed = take(body, Rules(allow=frozenset({"chat_template"})))
    assert allowed.params["chat_template_kwargs"] == {"chat_template": "{{ 1 }}"}

"""How many values a body may have, told without parsing it."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.api.errors import RequestError
from gateway.api.kinds import Kind
from gateway.request import parse
from gateway.request.size import LARGE, MANY, MAX_VALUES, PIECE, count_values, is_costly, is_costly_body, most_values

JSON = st.recursive(
    st.none() | st.integers() | st.text(st.sampled_from('ab,[{"\\\n')),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.sampled_from('a,"\\')), inner),
    max_leaves=30,
)


def values(tree: Any) -> tuple[int, int]:
    """All of them, and how many are empty containers."""
    inner = list(tree.values()) if isinstance(tree, dict) else tree if isinstance(tree, list) else []
    counted = [values(one) for one in inner]
    empty = isinstance(tree, dict | list) and not tree
    return 1 + sum(one for one, _ in counted), empty + sum(one for _, one in counted)


@given(JSON, st.booleans())
def test_exactly_but_for_containers_that_are_empty(tree: Any, spaced: bool) -> None:
    body = json.dumps(tree, indent=1 if spaced else None).encode()
    count, empty = values(tree)
    assert count_values(body, 0) == count + empty
    assert most_values(body) >= count + empty


@given(JSON)
def test_a_few_values_are_never_said_to_be_fewer(tree: Any) -> None:
    assert count_values(json.dumps(tree).encode()) >= values(tree)[0]


@given(st.integers(0, 9), st.lists(st.sampled_from([b"\\\\", b'\\"', b",", b"x"]), max_size=9).map(b"".join))
def test_strings_across_pieces(before: int, text: bytes) -> None:
    """Whatever a cut falls on."""
    body = b'["' + b"x" * (PIECE - 2 - before) + text + b'", [1, 2]' + b", 3" * MANY + b"]"
    assert count_values(body) == 1 + 1 + 1 + 2 + MANY


def test_what_is_costly() -> None:
    assert not is_costly(LARGE, MANY)
    assert is_costly(LARGE + 1, 0)
    assert is_costly(0, MANY + 1)
    assert not is_costly_body(b"[" + b"1," * (MANY - 2))
    assert is_costly_body(b"[" + b"1," * MANY)
    assert is_costly_body(b" " * (LARGE + 1))


@pytest.mark.parametrize(
    "body",
    [
        b'["' + b"," * 50 + b'"]',
        b'["' + b'\\",' * 50 + b'"]',
        b'["' + b"\\" * 50 + b'[,,,,,,,,,,,"]',
        b'{"a": "' + b"[" * 50,
    ],
    ids=["commas", "escaped quotes", "escaped backslashes", "cut short"],
)
def test_what_stands_in_strings_does_not_count(body: bytes) -> None:
    assert count_values(b"[1" + b",1" * MANY + b"," + body + b"]") == 1 + 1 + MANY + 2


def test_a_body_with_too_many_is_refused_before_it_is_parsed() -> None:
    body = b'{"messages": [{"role": "user", "content": "hi"}], "metadata": [' + b"[]," * MAX_VALUES
    with pytest.raises(RequestError) as refused:  # it is not even JSON, which nobody gets to see
        parse(body, Kind.CHAT)
    assert (refused.value.error.status, str(MAX_VALUES) in refused.value.error.message) == (400, True)


def calls(*arguments: str) -> bytes:
    made = [{"type": "function", "function": {"name": "f", "arguments": each}} for each in arguments]
    body = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "tool_calls": made}]}
    return json.dumps(body).encode()


def test_the_arguments_of_all_tool_calls_share_one_bound() -> None:
    """With a bound for each, a small compressed body had 15 million values."""
    quarter = '{"a": [' + "0," * (MAX_VALUES // 4 - 100) + "0]}"
    parsed = parse(calls(quarter, quarter, quarter), Kind.CHAT)
    assert MAX_VALUES // 2 < parsed.values < MAX_VALUES
    assert parsed.costly
    with pytest.raises(RequestError) as refused:
        parse(calls(*[quarter] * 5), Kind.CHAT)
    assert refused.value.error.param == "messages[1].tool_calls[4].function.arguments"


def test_a_comma_that_is_escaped_twice_counts() -> None:
    """In the body there is none, in the arguments there are too many."""
    body = calls('{"a": [' + "[]," * (MAX_VALUES // 2) + "1]}").replace(b",", b"\\u002c").replace(b"[]", b"\\u005b]")
    with pytest.raises(RequestError):
        parse(calls("x").replace(b"x", body), Kind.CHAT)


def test_a_small_body_of_many_values_is_costly() -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "metadata": [1] * MANY}
    assert parse(json.dumps(body).encode(), Kind.CHAT).costly
    assert not parse(calls('{"a": 1}'), Kind.CHAT).costly


def test_large_requests_of_agents_pass() -> None:
    """Hundreds of tools, thousands of messages with calls, and much text."""
    parameters = {"type": "object", "properties": {f"p{i}": {"type": "string", "enum": ["a", "b"]} for i in range(8)}}
    tools = [{"type": "function", "function": {"name": f"f{i}", "parameters": parameters}} for i in range(500)]
    call = {
        "id": "c",
        "type": "function",
        "function": {"name": "f1", "arguments": '{"p1": "a", "p2": ["b", {"x": 1}]}'},
    }
    turn = [
        {"role": "user", "content": [{"type": "text", "text": "Read it, [then] {write}. \n" * 30}]},
        {"role": "assistant", "content": None, "tool_calls": [call, call]},
        {"role": "tool", "tool_call_id": "c", "content": "a, b, c\n" * 600},
    ]
    parsed = parse(json.dumps({"messages": turn * 3000, "tools": tools}).encode(), Kind.CHAT)
    assert len(parsed.params["messages"]) == 9000


def test_arguments_of_a_tool_call_have_the_same_bound() -> None:
    """They are JSON within a string, parsed by itself."""
    call = {"type": "function", "function": {"name": "f", "arguments": '{"a": [' + "[]," * MAX_VALUES + "1"}}
    body = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "tool_calls": [call]}]}
    with pytest.raises(RequestError) as refused:
        parse(json.dumps(body).encode(), Kind.CHAT)
    assert refused.value.error.param == "messages[1].tool_calls[0].function.arguments"
    assert str(MAX_VALUES) in refused.value.error.message

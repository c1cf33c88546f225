"""How many values a body may have, told without parsing it."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.api.errors import RequestError
from gateway.api.kinds import Kind
from gateway.request import parse
from gateway.request.size import MAX_VALUES, has_too_many_values

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
    assert not has_too_many_values(body, count + empty)
    assert has_too_many_values(body + b" " * (count + 1), count + empty - 1) or empty + count == 1


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
    assert not has_too_many_values(body, 10)


def test_a_body_with_too_many_is_refused_before_it_is_parsed() -> None:
    body = b'{"messages": [{"role": "user", "content": "hi"}], "metadata": [' + b"[]," * MAX_VALUES
    with pytest.raises(RequestError) as refused:  # it is not even JSON, which nobody gets to see
        parse(body, Kind.CHAT)
    assert (refused.value.error.status, str(MAX_VALUES) in refused.value.error.message) == (400, True)


def test_arguments_of_a_tool_call_have_the_same_bound() -> None:
    """They are JSON within a string, parsed by itself."""
    call = {"type": "function", "function": {"name": "f", "arguments": '{"a": [' + "[]," * MAX_VALUES + "1"}}
    body = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "tool_calls": [call]}]}
    with pytest.raises(RequestError) as refused:
        parse(json.dumps(body).encode(), Kind.CHAT)
    assert refused.value.error.param == "messages[1].tool_calls[0].function.arguments"
    assert str(MAX_VALUES) in refused.value.error.message

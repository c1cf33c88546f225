"""A JSON object member by member gives what json.loads gives, and refuses what it refuses."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.memory.json_reader import JsonReader

LEAVES = st.none() | st.booleans() | st.integers() | st.text()
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=10)


def read(text: str) -> dict[str, Any]:
    reader = JsonReader(text)
    found = {name: reader.value() for name in reader.members()}
    reader.end()
    return found


@given(st.dictionaries(st.text(), VALUES), st.sampled_from([None, 1]))
def test_it_reads_what_json_reads(value: dict[str, Any], indent: int | None) -> None:
    text = json.dumps(value, indent=indent)
    assert read(text) == value
    assert read(f" \n{text}\t  ") == value


def test_members_of_members() -> None:
    reader = JsonReader('{"a": {"x": 1, "y": [2]}, "b": {}, "c": 3}')
    found: dict[str, Any] = {}
    for name in reader.members():
        found[name] = reader.value() if name == "c" else {inner: reader.value() for inner in reader.members()}
    reader.end()
    assert found == {"a": {"x": 1, "y": [2]}, "b": {}, "c": 3}


WHOLE = '{"a": 1, "b": [true, "x"], "c": {"d": null}}'


@pytest.mark.parametrize(
    "text", ["", "[]", "3", "{1: 2}", '{"a" 1}', '{"a": 1,}', '{"a": 1 "b": 2}', WHOLE + "x", '{"a": }', "{,}"]
)
def test_another_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected|Expecting"):
        read(text)


def test_a_text_cut_at_any_character_is_refused() -> None:
    for end in range(len(WHOLE)):
        with pytest.raises(ValueError, match=r"expected|Expecting|Unterminated"):
            read(WHOLE[:end])
    assert read(WHOLE) == json.loads(WHOLE)

"""What servers list at /v1/models."""

import pytest

from backends.diagnosis.model_list import knows, listed, shown


@pytest.mark.parametrize(
    ("body", "names"),
    [
        (b'{"object": "list", "data": [{"id": "a"}, {"id": "b"}]}', {"a", "b"}),
        (b'{"data": [{"id": "a", "aliases": ["c", 1]}, {"id": 2}, "x", null]}', {"a", "c"}),
        (b'[{"id": "a"}]', {"a"}),
        (b'{"data": []}', set()),
    ],
)
def test_names(body: bytes, names: set[str]) -> None:
    assert listed(body) == frozenset(names)


@pytest.mark.parametrize("body", [b"", b"{}", b"<html>", b'{"data": null}', b'"a"', b"[" * 10**5])
def test_no_list(body: bytes) -> None:
    assert listed(body) is None


def test_a_name_without_its_tag() -> None:
    names = frozenset({"qwen3:latest", "gemma:2b"})
    assert (knows(names, "qwen3"), knows(names, "qwen3:latest"), knows(names, "gemma")) == (True, True, False)


def test_shown() -> None:
    assert shown(frozenset()) == "none"
    assert shown(frozenset({"b", "a"})) == "a, b"
    assert shown(frozenset("abcdefg")) == "a, b, c, d, e and 2 more"

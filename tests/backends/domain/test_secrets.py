"""The secrets of the config are replaced in what others write."""

import time

import pytest

from backends.domain.secrets import NO_SECRETS, Secrets


@pytest.mark.parametrize(
    ("secrets", "text", "told"),
    [
        (["sk-1.*"], "the key sk-1.* is bad", "the key *** is bad"),
        (["sk-1.*"], "sk-1.*sk-1.*", "******"),
        (["sk-1.*"], "sk-1xx", "sk-1xx"),
        (["abc", "abcdef"], "abcdef abc", "*** ***"),
        (["", "k", "ab"], "k ab", "k ab"),
        ([], "anything", "anything"),
    ],
)
def test_hidden(secrets: list[str], text: str, told: str) -> None:
    assert Secrets(secrets).hide(text) == told


def test_none() -> None:
    assert NO_SECRETS.hide("anything") == "anything"


def test_it_does_not_show_itself() -> None:
    assert "sk-123" not in repr(Secrets(["sk-123"]))


def test_its_time_is_linear() -> None:
    began = time.perf_counter()
    Secrets(["a" * 40 + "b"]).hide("a" * 100_000)
    assert time.perf_counter() - began < 1.0

"""No text that others wrote can do anything to a terminal."""

import json
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.cli.terminal import printable, printable_json


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, naïve, 日本語 😀 👩‍💻\tand a tab\n", "plain, naïve, 日本語 😀 👩‍💻\tand a tab\n"),
        ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
        ("\x9b31m", r"\x9b31m"),
        ("50%\r100%\x08\x7f", r"50%\x0d100%\x08\x7f"),
        ("abc\u202edef\u2066", r"abc\u202edef\u2066"),
        ("\u2028\ud800", r"\u2028\ud800"),
    ],
)
def test_what_a_terminal_would_obey_is_shown_instead(text: str, shown: str) -> None:
    assert printable(text) == shown


@given(st.text())
def test_no_control_character_is_left(text: str) -> None:
    left = {unicodedata.category(c) for c in printable(text) if c not in "\t\n"}
    assert left.isdisjoint({"Cc", "Cs", "Zl", "Zp"})
    assert printable(printable(text)) == printable(text)


@given(st.dictionaries(st.text(), st.lists(st.text())))
def test_json_keeps_its_value(value: dict[str, list[str]]) -> None:
    text = printable_json(json.dumps(value, ensure_ascii=False))
    assert json.loads(text) == value
    assert printable(text) == text

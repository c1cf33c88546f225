"""Looking a line up in the table gives what trying every row in order gives."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from backends.diagnosis.literals import MIN_LITERAL_CHARS, literals
from backends.diagnosis.signature import Signature
from backends.diagnosis.signatures import SEARCHED_CHARS, SIGNATURES, match
from tests.backends.diagnosis.corpus import CORPUS, lines_of


def first(line: str) -> Signature | None:
    return next((signature for signature in SIGNATURES if signature.pattern.search(line)), None)


def test_every_line_of_the_corpus_is_found() -> None:
    lines = {line for row in CORPUS for line in lines_of(row.text) if len(line) <= 2 * SEARCHED_CHARS}
    assert len(lines) > 300
    for line in lines:
        assert match(line) is first(line)


@pytest.mark.parametrize("signature", SIGNATURES, ids=lambda signature: signature.name)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(data=st.data())
def test_no_row_is_overlooked(signature: Signature, data: st.DataObject) -> None:
    """Whatever a pattern matches holds one of its literals."""
    line = data.draw(st.from_regex(signature.pattern))[: 2 * SEARCHED_CHARS]
    assert match(line) is first(line)


@pytest.mark.parametrize("signature", SIGNATURES, ids=lambda signature: signature.name)
def test_every_alternative_has_a_literal(signature: Signature) -> None:
    assert all(len(text) >= MIN_LITERAL_CHARS for text in literals(signature.pattern.pattern))


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (r"\[Errno 28\]|[Dd]isk (?:quota|limit) exceeded", {"[Errno 28]", " exceeded"}),
        (r"long text|longer text", {"long text", "longer text"}),
        (r"abcde?fghi", {"abcd"}),
        (r"abcd(?:efghij)?", {"abcd"}),
        (r"(?:abcd|efgh) +x", {"abcd", "efgh"}),
        (r"\(0{7}8:", {"(00000008:"}),
        (r"(?<!No )\bmemory\b(?! killer)", {"memory"}),
        (r"abcd+ef", {"abcd"}),
        (r"abcde{0,3}fgh", {"abcd"}),
        (r"abcd[|)(]efghi", {"efghi"}),
        (r"ab.cd(?:wxyz|a(?:bcde|fghi))\d", {"wxyz", "bcde", "fghi"}),
        (r"(?:ab|a(?:b|c)x)-long-er", {"-long-er"}),
    ],
)
def test_literals(pattern: str, expected: set[str]) -> None:
    assert literals(pattern) == expected


@pytest.mark.parametrize("pattern", ["abc", "abcd|abc", "(?:abcd)?", "[a-z]{4}", "(?:abcd|)x", "abcd*", ""])
def test_a_pattern_without_literals_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match="literal characters"):
        literals(pattern)


def test_a_group_that_captures_is_refused() -> None:
    with pytest.raises(ValueError, match="captures"):
        literals("(abcd)")

"""No line makes a pattern slow: each pattern is fed lines that are made for it, short and twice as long.

Made for it: the literals and character classes of its own source, repeated, behind each other and behind what the
pattern begins with, so that much of it matches at each place and the rest fails at the end. Where such a line takes
far more than twice the time of one half as long, the pattern is not linear. Real lines are cut before (``READ_CHARS``).
"""

import re
import string
import time
from collections.abc import Callable, Iterator

import pytest

from backends.diagnosis import dead_model, error_answers, findings, log_parser, signatures_process
from backends.diagnosis.dead_model import MAX_TEXT_CHARS
from backends.diagnosis.log_parser import READ_CHARS, LogParser
from backends.diagnosis.signatures import SEARCHED_CHARS, SIGNATURES, match
from tests.backends.diagnosis.corpus import ACCESS, RAW, STAMP

MODULES = (dead_model, error_answers, findings, log_parser, signatures_process)
MATCHED = {  # used with ``match`` only: at the start of a line
    "_ACCESS_LINE", "_ANSWERED", "_COMPLETION", "_EXCEPTION", "_FIELD_NAME", "_INTERRUPTED", "_LIBRARY_ERROR_START",
    "_PREFILL_BEGUN", "_CRASHED", "_GONE", "_TOO_BIG",
}  # fmt: skip
LENGTH = 2 * READ_CHARS  # characters: no longer line is read
LIMIT = 0.005  # seconds for one of them; linear ones take 0.01 to 0.5 ms
CLASSES = (
    "a",
    "A",
    "0",
    " ",
    "_",
    ".",
    "-",
    "/",
    '"',
    "'",
    "[",
    "]",
    "(",
    ")",
    "é",
    "\t",
    "a.",
    "A.",
    "aA",
    "a A",
    "0.",
)

Search = Callable[[str], object]


def patterns() -> Iterator[tuple[str, str, Search]]:
    """Name, source, and how it is used."""
    for signature in SIGNATURES:
        yield signature.name, signature.pattern.pattern, signature.pattern.search
    for module in MODULES:
        for name, value in vars(module).items():
            if isinstance(value, re.Pattern):
                use = value.match if name in MATCHED else value.search
                yield f"{module.__name__.rpartition('.')[2]}.{name}", value.pattern, use


PATTERNS = list(patterns())


def pieces(source: str) -> list[str]:
    """Literal runs of a pattern's source."""
    plain = re.sub(r"\\[a-zA-Z]|\(\?(?:[:=!]|<[=!])|\[\^?[^\]]*\]|\{[\d,]+\}", "\0", source)
    plain = re.sub(r"\\(.)", r"\1", plain)
    return [piece for piece in re.split(r"[\0()|?*+^$]+", plain) if piece]


def lines_for(source: str, length: int) -> Iterator[str]:
    literals = pieces(source)
    units = [*CLASSES, *literals, *(piece + filler for piece in literals for filler in ("a", "0", " "))]
    starts = ["", *literals[:3]]
    for unit in units:
        for start in starts:
            yield (start + unit * (length // len(unit) + 1))[:length]
    yield (string.printable * length)[:length]


def took(work: Callable[[], object]) -> float:
    """Seconds, the least of three: another process may have the core."""
    times = []
    for _ in range(3):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
        if times[-1] < LIMIT:
            break
    return min(times)


@pytest.mark.parametrize(("name", "source", "use"), PATTERNS, ids=[name for name, _, _ in PATTERNS])
def test_no_line_makes_a_pattern_slow(name: str, source: str, use: Search) -> None:
    length = LENGTH if "." in name else 2 * SEARCHED_CHARS  # the table is given less of a line
    length = MAX_TEXT_CHARS if name.startswith("dead_model.") else length
    for line in lines_for(source, length):
        seconds = took(lambda: use(line))  # noqa: B023 - called at once
        assert seconds < LIMIT, f"{name}: {seconds * 1000:.1f} ms for {line[:60]!r}…"


def test_the_helper_finds_a_quadratic_pattern() -> None:
    quadratic = re.compile(r"\S+ - - \[")
    assert any(took(lambda: quadratic.search(line)) > LIMIT for line in lines_for(quadratic.pattern, 4 * LENGTH))  # noqa: B023


@pytest.mark.parametrize("size", [3 * READ_CHARS, 1 << 20])
@pytest.mark.parametrize(
    "start", ["", ACCESS, ACCESS + '"POST /', f"{STAMP} - ERROR - ", RAW, "HTTP body: ", "Error: "]
)
def test_a_line_costs_no_more_because_it_is_long(start: str, size: int) -> None:
    for unit in ("a", "A.a", '" 200 x', " - - [", "Error: ", "0"):
        line = (start + unit * (size // len(unit) + 1))[:size]
        for before in ([], [RAW], ["Exception occurred during processing of request from ('127.0.0.1', 1)"]):
            parser = LogParser()
            for one in before:
                parser.feed(one)
            seconds = took(lambda: parser.feed(line))  # noqa: B023
            assert seconds < 2 * LIMIT, f"{seconds * 1000:.1f} ms for {line[:60]!r}…"
    assert took(lambda: match("x" * size)) < LIMIT


def test_the_status_at_the_end_of_a_long_line_is_read() -> None:
    parser = LogParser()
    parser.feed(f'{ACCESS}"POST /v1/chat/completions?{"x" * 9000} HTTP/1.1" 200 -')
    assert parser.reading().served

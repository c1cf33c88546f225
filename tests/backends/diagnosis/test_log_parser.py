"""One parser per life: fed line by line, read at any time, bounded in time and memory."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.diagnosis.findings import Reading
from backends.diagnosis.log_parser import LogParser, read
from backends.diagnosis.verdict import text_cause
from backends.domain.failure import HARMLESS, Cause
from tests.backends.diagnosis.corpus import (
    ABORT,
    ACCESS,
    CORPUS,
    DIED,
    OOM,
    PARTS,
    POSTED,
    RAW,
    REFUSED,
    STAMP,
    lines_of,
)

OPENS = "Exception occurred during processing of request from ('127.0.0.1', 5)"
DASHES = "-" * 40
LOG_WINDOW = 10


def fed(lines: Sequence[str], window: int | None = None, *, reading_between: bool = False) -> LogParser:
    parser = LogParser(window)
    for line in lines:
        parser.feed(line)
        if reading_between:
            parser.reading()
            parser.reading(since=parser.position // 2)
    return parser


# -- a reading changes nothing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(len(CORPUS)))
def test_readings_in_between_change_nothing_in_the_corpus(number: int) -> None:
    lines = lines_of(CORPUS[number].text)
    assert fed(lines, reading_between=True).reading() == read(lines)


@given(st.lists(PARTS | st.text(max_size=30), max_size=40), st.sampled_from([None, 3, LOG_WINDOW]))
def test_readings_in_between_change_nothing(lines: list[str], window: int | None) -> None:
    parser = fed(lines, window, reading_between=True)
    assert parser.reading() == fed(lines, window).reading() == parser.reading()


@given(st.lists(PARTS | st.text(max_size=30), max_size=40))
def test_every_reading_is_that_of_the_lines_so_far(lines: list[str]) -> None:
    parser = LogParser()
    for n, line in enumerate(lines, start=1):
        parser.feed(line)
        assert parser.reading() == read(lines[:n])


def test_an_open_block_is_read_as_if_it_ended_here_and_goes_on() -> None:
    parser = fed([OPENS, "Traceback (most recent call last):", ABORT + OOM])
    assert text_cause(parser.reading()) is Cause.OOM
    parser.feed("ValueError: no")
    parser.feed(DASHES)
    assert text_cause(parser.reading()) is Cause.BAD_REQUEST, "it was closed: part of the request's own traceback"


# -- what is new -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "number", [i for i, row in enumerate(CORPUS) if not row.silent and row.expected is not Cause.NONE]
)
def test_every_finding_of_the_corpus_is_announced(number: int) -> None:
    """``findings`` is what a watcher goes by: no cause may appear without it."""
    parser, cause = LogParser(), Cause.NONE
    for line in lines_of(CORPUS[number].text):
        before = parser.findings
        parser.feed(line)
        now = text_cause(parser.reading())
        assert parser.findings > before or now is cause or now in HARMLESS
        cause = now
    assert cause is CORPUS[number].expected


# -- since -------------------------------------------------------------------------------------------------------------


def test_hits_up_to_a_line_are_left_out() -> None:
    parser = fed([DIED + OOM, "[Errno 28] No space left on device"])
    assert [text_cause(parser.reading(since)) for since in range(3)] == [Cause.OOM, Cause.DISK_FULL, Cause.NONE]


def test_the_region_is_known_that_a_later_part_begins_in() -> None:
    """A part read by itself would take a client's words for the server's own."""
    parser = fed([RAW + "{", ABORT + OOM, "Killed: 9"])
    assert parser.reading(since=1) == Reading(printed=True)


# -- bounds ------------------------------------------------------------------------------------------------------------


def test_what_is_older_than_the_window_is_forgotten() -> None:
    parser = fed([DIED + OOM, *["all is well"] * (LOG_WINDOW - 1)], LOG_WINDOW)
    assert text_cause(parser.reading()) is Cause.OOM
    parser.feed("all is well")
    assert text_cause(parser.reading()) is Cause.NONE


def test_that_it_has_served_is_remembered() -> None:
    assert fed([POSTED, *["all is well"] * 2 * LOG_WINDOW], LOG_WINDOW).reading().served


@pytest.mark.parametrize("opening", [RAW + "x", OPENS])
def test_a_region_that_is_never_closed_ends_with_the_window(opening: str) -> None:
    """Its end may be lost, where two threads write at the same time."""
    inside = fed([opening, *["x"] * (LOG_WINDOW - 2), "[Errno 28] No space left on device"], LOG_WINDOW)
    after = fed([opening, *["x"] * (LOG_WINDOW - 1), "[Errno 28] No space left on device"], LOG_WINDOW)
    assert text_cause(inside.reading()) is not Cause.DISK_FULL
    assert text_cause(after.reading()) is Cause.DISK_FULL


def test_a_block_that_outlasts_the_window_leaves_its_last_words() -> None:
    lines = [OPENS, *["x"] * (LOG_WINDOW - 3), ABORT + OOM, "x", "x", "x"]
    parser = fed(lines, LOG_WINDOW)
    assert text_cause(parser.reading()) is Cause.OOM


@given(st.lists(PARTS, min_size=50, max_size=200))
def test_what_is_kept_is_bounded(lines: list[str]) -> None:
    parser = fed(lines, LOG_WINDOW)
    held = len(parser._main.hits) + len(parser._main.doubtful)
    if parser._block is not None:
        held += len(parser._block.last_output.hits)
    assert held <= 4 * LOG_WINDOW, "a line gives two hits at most, a block one more"


# Long lines for each pattern; 200 kB would take a quadratic one minutes.
LONG = 200_000
LINES = [
    ("a", ""),
    ("a", " - - [x - INFO - "),
    ("a ", ""),
    ("A", ""),
    ("a.", ""),
    ("a.A", ""),
    ("x - - [", ""),
    (" - - [", ""),
    ("x - - [03/Oct/2026 09:14:07] ", ""),
    ("2026-10-03 09:14:07,311 - ", ""),
    ("2026", ""),
    ("\t", ""),
    (" ", "x"),
    ("'", ""),
    ("Exception in thread ", ""),
    ("libc++abi", ""),
    ("skip", ""),
    ("INFO", ""),
    (f"{ACCESS}", ""),
]
STARTS = ["", ACCESS + '"', ACCESS + '"POST /', ACCESS + '"POST /x" 200 ', STAMP + " - ERROR - ", "HTTP body: {"]


@pytest.mark.timeout(30)
@pytest.mark.parametrize("before", [[], [RAW + "x"], [OPENS], [f"{STAMP} - DEBUG - x"]], ids=len)
@pytest.mark.parametrize("start", STARTS)
def test_no_line_takes_more_than_its_length(before: list[str], start: str) -> None:
    for unit, end in [*LINES, ('" 200 ', ""), ('" 200 x', " "), ('"', ""), ('" 200 x ', "y z")]:
        parser = fed(before)
        parser.feed(start + unit * (LONG // len(unit)) + end)
        parser.reading()


def test_an_access_line_is_told_by_its_last_status() -> None:
    forged = ACCESS + '"POST /v1/chat/completions" 200 - HTTP/1.1" 503 -'
    assert text_cause(read([forged])) is Cause.WEDGE
    assert text_cause(read([RAW + "x", forged.replace("503", "400"), DIED + OOM])) is Cause.OOM
    assert text_cause(read([RAW + "x", "x " + REFUSED, DIED + OOM])) is Cause.BAD_REQUEST


def test_the_ports_of_lost_clients() -> None:
    other = OPENS.replace("('127.0.0.1', 5)", "('::1', 50123, 0, 0)")
    block = [DASHES, OPENS, "Traceback (most recent call last):", "BrokenPipeError: [Errno 32] Broken pipe", DASHES]
    parser = fed([*block, DASHES, other, DASHES, *block[:1], OPENS.replace("('127.0.0.1', 5)", "x")])
    assert list(parser.lost_clients) == [5, 50123]
    assert list(fed([f"{STAMP} - ERROR - JSONDecodeError: x - Raw body: ", *block]).lost_clients) == [], (
        "a client's own"
    )


def test_the_ports_of_clients_that_are_lost_together() -> None:
    """Each part of such a line is a write of its own."""
    opens, one, two = OPENS.split(" (", maxsplit=1)[0], " ('127.0.0.1', 1)", " ('127.0.0.1', 2)"
    for lines in (
        [DASHES, opens + one, DASHES, opens + two, "", "Traceback (most recent call last):", DASHES],
        [DASHES, opens + one, opens + two, "Traceback (most recent call last):"],
        [DASHES + opens + opens + one, two],
        [DASHES + opens, one + two],
        [DASHES + DASHES, "", opens + one + f"{STAMP} - INFO - Prompt processing progress: 1/2", opens + two],
    ):
        assert list(fed(lines).lost_clients) == [1, 2]

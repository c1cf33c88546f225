"""Verdicts over the corpus in data/failures.jsonl, and the rules that weigh text against exit status and probes."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.diagnosis.log_parser import read
from backends.diagnosis.signatures import SIGNATURES
from backends.diagnosis.verdict import Evidence, judge, parse_exit, text_cause
from backends.domain.failure import HARMLESS, Blame, Cause, Reason
from backends.domain.state import Health
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


def told(lines: Sequence[str] = (), **more: Any) -> Evidence:
    return Evidence(read(lines), **more)


@pytest.mark.parametrize("number", range(len(CORPUS)))
def test_corpus(number: int) -> None:
    row = CORPUS[number]
    verdict = judge(told(lines=lines_of(row.text), returncode=row.returncode))
    assert verdict.cause is row.expected, verdict
    assert verdict.backend_failed is (row.expected not in HARMLESS and not row.trying)


@pytest.mark.parametrize("number", [i for i, row in enumerate(CORPUS) if not row.silent])
def test_corpus_without_exit_status(number: int) -> None:
    assert text_cause(read(lines_of(CORPUS[number].text))) is CORPUS[number].expected


def test_corpus_has_every_cause_that_output_can_show() -> None:
    beyond = {Cause.STALLED, Cause.START_TIMEOUT, Cause.UNREACHABLE}  # seen by the gateway, never printed
    assert {row.expected for row in CORPUS} == set(Cause) - beyond


@pytest.mark.parametrize(
    "number", [i for i, row in enumerate(CORPUS) if row.expected not in HARMLESS and not row.silent]
)
def test_any_failure_text_in_a_bad_body_is_a_bad_request(number: int) -> None:
    """Whatever a client sends as invalid JSON, it proves nothing, at the time or once service has gone on."""
    body = [line for line in lines_of(CORPUS[number].text) if not line.startswith(ACCESS)]
    for after in ([], [POSTED], [POSTED, POSTED]):
        cause = text_cause(read([RAW + "{", *body, REFUSED, *after]))
        assert cause is Cause.BAD_REQUEST


@pytest.mark.parametrize(
    "number", [i for i, row in enumerate(CORPUS) if row.expected not in HARMLESS and not row.silent]
)
def test_a_forgery_before_it_hides_no_real_failure(number: int) -> None:
    row = CORPUS[number]
    forged = [RAW + "{", ABORT + OOM, "Killed: 9", "zsh: segmentation fault", REFUSED]
    assert judge(told(lines=[*forged, *lines_of(row.text)], returncode=row.returncode)).cause is row.expected


@pytest.mark.parametrize(
    ("code", "cause"), [(-6, "native_crash"), (-11, "native_crash"), (-9, "killed"), (None, "bad_request")]
)
def test_a_log_that_ends_in_a_clients_words_is_judged_by_its_exit_status(code: int | None, cause: str) -> None:
    assert judge(told(lines=[RAW + "x", ABORT + OOM], returncode=code)).cause == cause


def test_what_stood_before_an_open_region_still_counts() -> None:
    lines = [DIED + OOM, RAW + "x", ABORT + "[Event::wait] Timed out"]
    assert judge(told(lines=lines, returncode=-9)).cause is Cause.OOM


def test_a_forged_end_of_region_does_not_let_last_words_through() -> None:
    lines = [RAW + "x", REFUSED, ABORT + OOM, REFUSED, POSTED]
    assert text_cause(read(lines)) is Cause.BAD_REQUEST
    assert judge(told(lines=lines, returncode=-11)).cause is Cause.NATIVE_CRASH


def test_a_specific_cause_beats_its_wrapper() -> None:
    verdict = judge(told(lines=[DIED + OOM + ".", "Traceback (most recent call last):", f"RuntimeError: {OOM}."]))
    assert verdict.cause is Cause.OOM
    assert verdict.evidence[0] == f"RuntimeError: {OOM}."


def test_frames_of_one_traceback_say_nothing_of_another() -> None:
    init = ["Traceback (most recent call last):", "    group = mx.distributed.init()", "ValueError: parse error"]
    other = ["Traceback (most recent call last):", "    config = json.load(file)", "ValueError: parse error"]
    assert judge(told([*init, *other], returncode=1)).cause is Cause.DISTRIBUTED
    assert judge(told(other, returncode=1)).cause is Cause.LOAD_FAILURE
    memory = [*init[:2], "RuntimeError: [malloc] Unable to allocate 9 bytes."]
    assert judge(told(memory, returncode=1)).cause is Cause.OOM, "what the last line names counts"


RETRIES = [
    "Trying to resume download...",
    "Error while downloading from https://h/x: HTTPSConnectionPool(host='h', port=443): Read timed out.",
    "Error while downloading from https://h/x: Consistency check failed",
    "'(MaxRetryError('Max retries exceeded with url: /x'), '(id 1)')' thrown while requesting GET https://h/x",
    "2026-10-03 09:14:07,311 - WARNING - Error while downloading from https://h/x: Read timed out.",
]


@pytest.mark.parametrize("line", RETRIES)
@pytest.mark.parametrize("code", [None, 1])
def test_a_retry_in_progress_is_told_as_one(code: int | None, line: str) -> None:
    verdict = judge(told([line], returncode=code))
    assert verdict.cause is Cause.DOWNLOAD
    assert verdict.backend_failed is (code is not None)
    assert verdict.goes_on is (code is None)
    assert ("is being tried again" in verdict.message) is (code is None)


def test_advice_during_a_load_speaks_of_no_prompt() -> None:
    for starting, words in ((True, "does not fit beside"), (False, "send a shorter one")):
        assert words in judge(told([OOM], returncode=-6, starting=starting)).advice


def test_an_empty_prompt_is_told_as_what_it_is() -> None:
    """The lines as mlx-lm 0.32.2 prints them. The status alone would be a wedge without a reason."""
    died = f"{STAMP} - ERROR - mlx_lm.server generation thread died: Sequence 0 has an empty prompt."
    health = f'{ACCESS}"GET /health HTTP/1.1" 503 -'
    verdict = judge(
        told([POSTED, died, "ValueError: Sequence 0 has an empty prompt.", health], health=Health.UNAVAILABLE)
    )
    assert (verdict.cause, verdict.blame, verdict.reason) == (Cause.WEDGE, Blame.BACKEND, Reason.EMPTY_PROMPT)
    assert "prompt cache" in verdict.message
    assert "change a character" in verdict.advice
    assert "empty prompt" in verdict.evidence[0]


def test_a_kill_from_outside_is_memory_where_the_machine_was_short_of_it() -> None:
    killed = judge(told(lines=[POSTED], returncode=-9))
    short = judge(told(lines=[POSTED], returncode=-9, memory_short=True))
    assert [killed.cause, short.cause] == [Cause.KILLED, Cause.OOM]


@pytest.mark.parametrize(
    ("evidence", "cause"),
    [
        (told(health=Health.UNAVAILABLE), Cause.WEDGE),
        (told(lines=[DIED + OOM, POSTED], health=Health.UNAVAILABLE), Cause.OOM),
        (told(lines=[RAW + "x", ABORT + OOM, REFUSED], health=Health.UNAVAILABLE), Cause.WEDGE),
        (told(lines=[POSTED], health=Health.OK), Cause.NONE),
        (told(lines=["x"], returncode=1, starting=True), Cause.LOAD_FAILURE),
        (told(lines=[POSTED], returncode=1), Cause.NATIVE_CRASH),
        (told(lines=["usage: x"], returncode=2), Cause.DEPENDENCY),
    ],
)
def test_probes_and_statuses(evidence: Evidence, cause: Cause) -> None:
    assert judge(evidence).cause is cause


def test_one_requests_failure_is_not_the_backends_death() -> None:
    lines = [
        "-" * 40,
        "Exception occurred during processing of request from ('127.0.0.1', 5)",
        f"RuntimeError: {OOM}.",
        "-" * 40,
    ]
    verdict = judge(told(lines=lines))
    assert (verdict.cause, verdict.blame) == (Cause.OOM, Blame.REQUEST)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("-6", -6),
        ("134", -6),
        ("139", -11),
        ("137", -9),
        ("SIGABRT", -6),
        ("sigsegv", -11),
        ("ABRT", -6),
        ("signal 6", -6),
        ("Signal: 9", -9),
        (" 1 ", 1),
        ("0", 0),
        ("127", 127),
        ("143", -15),
        ("128", 128),
        ("160", 160),
        ("255", 255),
    ],
)
def test_parse_exit(text: str, code: int) -> None:
    assert parse_exit(text) == code


@pytest.mark.parametrize("text", ["", "abc", "SIGNOPE", "256", "-65", "1.5", "6 signal", "signal"])
def test_parse_exit_says_what_it_wants(text: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        parse_exit(text)


@given(st.lists(PARTS | st.text(max_size=30), max_size=12), st.sampled_from([None, 0, 1, -6, -9, -11, -15]))
def test_any_log_gets_a_verdict_with_lines_it_really_has(lines: list[str], code: int | None) -> None:
    verdict = judge(told(lines=lines, returncode=code))
    assert verdict.backend_failed is (verdict.cause not in HARMLESS and not verdict.goes_on)
    if verdict.goes_on:
        assert code is None
        assert verdict.cause in (Cause.DOWNLOAD, Cause.DISTRIBUTED)
    assert verdict.message
    assert not verdict.message.endswith(".")
    if code in (-11, -6) and verdict.cause is Cause.NONE:
        assert code == -6


def test_rows_are_distinct_and_have_sources() -> None:
    assert len({signature.name for signature in SIGNATURES}) == len(SIGNATURES)
    assert all(signature.source for signature in SIGNATURES)

"""Verdicts over the corpus in data/failures.jsonl, and the rules that weigh text against exit status and probes."""

import json
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.diagnosis.signatures import SIGNATURES, match
from backends.diagnosis.verdict import Evidence, judge, parse_exit, text_cause
from backends.domain.failure import HARMLESS, Aftermath, Blame, Cause
from backends.domain.state import Health
from backends.process.output import LineSplitter
from backends.upstream.exchange import Fault


class Row(NamedTuple):
    text: str
    expected: Cause
    returncode: int | None
    silent: bool  # the text alone cannot tell


def _lines(text: str) -> list[str]:
    splitter = LineSplitter()
    return [*splitter.feed(text.encode()), *splitter.flush()]


def _corpus() -> list[Row]:
    path = Path(__file__).parents[2] / "data" / "failures.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [
        Row(
            row["text"],
            Cause(row["expected"]),
            None if row["exit"] is None else parse_exit(str(row["exit"])),
            row["by_exit_alone"],
        )
        for row in rows
    ]


CORPUS = _corpus()
OOM = (
    "[METAL] Command buffer execution failed: Insufficient Memory "
    "(00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)"
)
ABORT = "libc++abi: terminating due to uncaught exception of type std::runtime_error: "
STAMP = "2026-10-03 09:14:07,311"
ACCESS = "127.0.0.1 - - [03/Oct/2026 09:14:07] "
POSTED = ACCESS + '"POST /v1/chat/completions HTTP/1.1" 200 -'
REFUSED = ACCESS + '"POST /v1/chat/completions HTTP/1.1" 400 -'
RAW = f"{STAMP} - ERROR - JSONDecodeError: Expecting value: line 1 column 1 (char 0) - Raw body: "
DIED = f"{STAMP} - ERROR - mlx_lm.server generation thread died: "


@pytest.mark.parametrize("number", range(len(CORPUS)))
def test_corpus(number: int) -> None:
    row = CORPUS[number]
    verdict = judge(Evidence(lines=_lines(row.text), returncode=row.returncode))
    assert verdict.cause is row.expected, verdict
    assert verdict.backend_failed is (row.expected not in HARMLESS)


@pytest.mark.parametrize("number", [i for i, row in enumerate(CORPUS) if not row.silent])
def test_corpus_without_exit_status(number: int) -> None:
    assert text_cause(_lines(CORPUS[number].text))[0] is CORPUS[number].expected


def test_corpus_has_every_cause_that_output_can_show() -> None:
    beyond = {Cause.STALLED, Cause.START_TIMEOUT, Cause.UNREACHABLE}  # seen by the gateway, never printed
    assert {row.expected for row in CORPUS} == set(Cause) - beyond


@pytest.mark.parametrize(
    "number", [i for i, row in enumerate(CORPUS) if row.expected not in HARMLESS and not row.silent]
)
def test_any_failure_text_in_a_bad_body_is_a_bad_request(number: int) -> None:
    """Whatever a client sends as invalid JSON, it proves nothing, at the time or once service has gone on."""
    body = [line for line in _lines(CORPUS[number].text) if not line.startswith(ACCESS)]
    for after in ([], [POSTED], [POSTED, POSTED]):
        cause, _ = text_cause([RAW + "{", *body, REFUSED, *after])
        assert cause is Cause.BAD_REQUEST


@pytest.mark.parametrize(
    "number", [i for i, row in enumerate(CORPUS) if row.expected not in HARMLESS and not row.silent]
)
def test_a_forgery_before_it_hides_no_real_failure(number: int) -> None:
    row = CORPUS[number]
    forged = [RAW + "{", ABORT + OOM, "Killed: 9", "zsh: segmentation fault", REFUSED]
    assert judge(Evidence(lines=[*forged, *_lines(row.text)], returncode=row.returncode)).cause is row.expected


@pytest.mark.parametrize(
    ("code", "cause"), [(-6, "native_crash"), (-11, "native_crash"), (-9, "killed"), (None, "bad_request")]
)
def test_a_log_that_ends_in_a_clients_words_is_judged_by_its_exit_status(code: int | None, cause: str) -> None:
    assert judge(Evidence(lines=[RAW + "x", ABORT + OOM], returncode=code)).cause == cause


def test_what_stood_before_an_open_region_still_counts() -> None:
    lines = [DIED + OOM, RAW + "x", ABORT + "[Event::wait] Timed out"]
    assert judge(Evidence(lines=lines, returncode=-9)).cause is Cause.OOM


def test_a_forged_end_of_region_does_not_let_last_words_through() -> None:
    lines = [RAW + "x", REFUSED, ABORT + OOM, REFUSED, POSTED]
    assert text_cause(lines)[0] is Cause.BAD_REQUEST
    assert judge(Evidence(lines=lines, returncode=-11)).cause is Cause.NATIVE_CRASH


def test_a_specific_cause_beats_its_wrapper() -> None:
    verdict = judge(Evidence(lines=[DIED + OOM + ".", "Traceback (most recent call last):", f"RuntimeError: {OOM}."]))
    assert (verdict.cause, verdict.aftermath) == (Cause.OOM, Aftermath.WEDGED)
    assert verdict.evidence[0] == f"RuntimeError: {OOM}."


@pytest.mark.parametrize("code", [0, -15, -2, -9, -6])
def test_our_own_stop_is_no_failure(code: int) -> None:
    lines = [POSTED, "terminate called without an active exception"]
    verdict = judge(Evidence(lines=lines, returncode=code, stop_requested=True))
    assert (verdict.cause, verdict.backend_failed, verdict.blame) == (Cause.NONE, False, Blame.GATEWAY)


def test_a_kill_we_sent_is_ours_and_another_is_not() -> None:
    ours = judge(Evidence(lines=[POSTED], returncode=-9, signals_sent=frozenset({15, 9})))
    theirs = judge(Evidence(lines=[POSTED], returncode=-9))
    short = judge(Evidence(lines=[POSTED], returncode=-9, memory_short=True))
    assert [ours.cause, theirs.cause, short.cause] == [Cause.NONE, Cause.KILLED, Cause.OOM]


def test_a_crash_while_stopping_still_names_its_cause() -> None:
    verdict = judge(Evidence(lines=[POSTED, ABORT + OOM], returncode=-6, stop_requested=True))
    assert verdict.cause is Cause.OOM


@pytest.mark.parametrize(
    ("evidence", "cause", "aftermath"),
    [
        (Evidence(alive=True, health=Health.UNAVAILABLE), Cause.WEDGE, Aftermath.WEDGED),
        (Evidence(lines=[DIED + OOM, POSTED], alive=True, health=Health.UNAVAILABLE), Cause.OOM, Aftermath.WEDGED),
        (
            Evidence(lines=[RAW + "x", ABORT + OOM, REFUSED], alive=True, health=Health.UNAVAILABLE),
            Cause.WEDGE,
            Aftermath.WEDGED,
        ),
        (Evidence(alive=True, health=Health.OK, fault=Fault.STALLED), Cause.STALLED, Aftermath.UNKNOWN),
        (Evidence(alive=True, starting=True, fault=Fault.STALLED), Cause.START_TIMEOUT, Aftermath.UNKNOWN),
        (Evidence(fault=Fault.REFUSED, health=Health.REFUSED), Cause.UNREACHABLE, Aftermath.UNKNOWN),
        (
            Evidence(lines=[POSTED], alive=True, health=Health.OK, answer=(404, '{"error": "generation thread died"}')),
            Cause.WEDGE,
            Aftermath.UNKNOWN,
        ),
        (Evidence(lines=[POSTED], alive=True, health=Health.OK), Cause.NONE, Aftermath.ALIVE),
        (Evidence(lines=["x"], returncode=1, starting=True), Cause.LOAD_FAILURE, Aftermath.EXITED),
        (Evidence(lines=[POSTED], returncode=1), Cause.NATIVE_CRASH, Aftermath.EXITED),
        (Evidence(lines=["usage: x"], returncode=2), Cause.DEPENDENCY, Aftermath.EXITED),
    ],
)
def test_probes_and_statuses(evidence: Evidence, cause: Cause, aftermath: Aftermath) -> None:
    verdict = judge(evidence)
    assert verdict.cause is cause
    if aftermath is not Aftermath.UNKNOWN:
        assert verdict.aftermath is aftermath


def test_one_requests_failure_is_not_the_backends_death() -> None:
    lines = [
        "-" * 40,
        "Exception occurred during processing of request from ('127.0.0.1', 5)",
        f"RuntimeError: {OOM}.",
        "-" * 40,
    ]
    verdict = judge(Evidence(lines=lines))
    assert (verdict.cause, verdict.aftermath, verdict.blame) == (Cause.OOM, Aftermath.ALIVE, Blame.REQUEST)


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


PARTS = st.sampled_from(
    [
        RAW + "x",
        REFUSED,
        POSTED,
        ABORT + OOM,
        DIED + "x",
        "-" * 40,
        "Exception occurred during processing of request from x",
        "ValueError: x",
        f"{STAMP} - DEBUG - x",
        f"{STAMP} - ERROR - Invalid Request Body: [",
        "\t1",
        "]",
        "KeyboardInterrupt",
        "",
        'HTTP body: {"error": 1}',
        f"{STAMP} - INFO - Starting httpd at 127.0.0.1 on port 1...",
        "BrokenPipeError: [Errno 32] x",
    ]
)


@given(st.lists(PARTS | st.text(max_size=30), max_size=12), st.sampled_from([None, 0, 1, -6, -9, -11, -15]))
def test_any_log_gets_a_verdict_with_lines_it_really_has(lines: list[str], code: int | None) -> None:
    verdict = judge(Evidence(lines=lines, returncode=code))
    assert verdict.backend_failed is (verdict.cause not in HARMLESS)
    assert verdict.message
    assert not verdict.message.endswith(".")
    if code in (-11, -6) and verdict.cause is Cause.NONE:
        assert code == -6


UNITS = [
    "cuda",
    "cuA ",
    "[ring] ",
    "exit code ",
    "panic(cpu ",
    " ",
    "a",
    "Tokenizer class x",
    "No such file or directory: '",
    "Download ",
    "Expected shape ",
    '127.0.0.1 - - [03/Oct/2026 09:14:07] "',
    STAMP + " - ",
    "memory guard ",
    "xet ",
]


@pytest.mark.slow  # together half a minute
@pytest.mark.timeout(60)
@pytest.mark.parametrize("unit", UNITS)
def test_no_line_makes_a_pattern_explode(unit: str) -> None:
    line = unit * (60_000 // len(unit))
    for signature in SIGNATURES:
        signature.pattern.search(line[:8192])
    match(line)
    judge(Evidence(lines=[line]))


def test_rows_are_distinct_and_have_sources() -> None:
    assert len({signature.name for signature in SIGNATURES}) == len(SIGNATURES)
    assert all(signature.source for signature in SIGNATURES)

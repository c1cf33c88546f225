"""What a process tells of itself, and what it is told: one line each."""

import json
from typing import Any

import pytest

from backends.domain.engine_command import BoundPromptCache, EngineCommand, ReleasePool, SetLimits, encoded
from backends.domain.report import EngineReport, parse_report

FIGURES: dict[str, Any] = {
    "active": 3,
    "pooled": 2,
    "peak": 5,
    "working_set": None,
    "generating": True,
    "reading": 1,
    "decoding": 2,
    "longest": 49000,
    "cached_sequences": 10,
    "cached_bytes": 1 << 40,
    "fixes": {"linear prompt cache search": "on"},
}


def line(**changed: Any) -> bytes:
    return json.dumps(FIGURES | changed).encode() + b"\n"


def test_a_report_is_read_whole() -> None:
    assert parse_report(line()) == EngineReport(**FIGURES)


def test_what_a_version_does_not_tell_is_not_known() -> None:
    assert parse_report(b'{"active": 1, "pooled": 0, "peak": 1}') == EngineReport(1, 0, 1)
    assert parse_report(line(reading=None, decoding=None, generating=None)).reading is None


def test_fields_of_a_later_version_are_ignored() -> None:
    assert parse_report(line(more=[1])) == EngineReport(**FIGURES)


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"3",
        b"{}",
        b'{"active": 1, "pooled": 0}',
        b"[" * 60000,
        line()[:40],
        line(active="3"),
        line(active=True),
        line(active=-1),
        line(active=1.5),
        line(peak=1 << 62),
        line(peak=float("nan")),
        line(longest=-1),
        line(cached_bytes="1"),
        line(generating=1),
        line(fixes=[]),
        line(fixes={"a": 1}),
        line(fixes={"a\nb": "on"}),
        line(fixes={"a": "x" * 65}),
        line(fixes={str(n): "on" for n in range(65)}),
    ],
)
def test_what_is_no_report_is_refused(garbage: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - of any text
        parse_report(garbage)


@pytest.mark.parametrize(
    ("command", "fields"),
    [
        (ReleasePool(), {"do": "release_pool"}),
        (SetLimits(cache=1, memory=2), {"do": "limits", "cache": 1, "memory": 2}),
        (SetLimits(memory=2), {"do": "limits", "cache": None, "memory": 2}),
        (BoundPromptCache(size=3, entries=4), {"do": "prompt_cache", "bytes": 3, "entries": 4}),
    ],
)
def test_a_command_is_one_line(command: EngineCommand, fields: dict[str, Any]) -> None:
    text = encoded(command)
    assert (json.loads(text), text.count(b"\n"), text[-1:]) == (fields, 1, b"\n")

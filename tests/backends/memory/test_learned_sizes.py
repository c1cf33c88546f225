"""The most that each model was seen to take: kept in a file, which is written beside the event loop."""

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import pytest

from backends.domain.spec import Launch
from backends.memory.learned_sizes import high_water_marks, idle_sizes
from backends.process.learned import MAX_VALUES
from backends.process.state_folder import MAX_SIZE
from tests.lives import until

OTHER = Launch(("other",))
LAUNCH = Launch(("server", "--model", "m", "--port", "{port}"))


def test_peaks_outlive_the_gateway_and_belong_to_the_flags(tmp_path: Path) -> None:
    for footprint in (700, 600):
        peaks = high_water_marks(tmp_path)
        peaks.note(LAUNCH, footprint)
        peaks.save()
    assert high_water_marks(tmp_path).get(LAUNCH) == 700
    assert high_water_marks(tmp_path).get(replace(LAUNCH, argv=(*LAUNCH.argv, "--kv-bits", "8"))) is None


NESTED = "[" * 200_000
WRONG = [
    "",
    "[]",
    "{",
    NESTED,
    '{"a":' * 100_000,
    '{"a": ' + "9" * 5000 + "}",
    "\xff",
    "5",
    "null",
    " " * (MAX_SIZE + 1),
]


@pytest.mark.parametrize("contents", WRONG, ids=range(len(WRONG)))
def test_a_file_that_is_not_valid_is_set_aside_with_a_word(
    tmp_path: Path, contents: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "memory.json"
    path.write_text(contents, encoding="latin-1")
    peaks = high_water_marks(tmp_path)
    assert peaks.get(LAUNCH) is None
    assert "set aside" in caplog.text
    assert (tmp_path / "memory.corrupt").read_text(encoding="latin-1") == contents
    peaks.note(LAUNCH, 5)
    peaks.save()
    assert high_water_marks(tmp_path).get(LAUNCH) == 5


@pytest.mark.parametrize("peak", [10**18, 101, 0, -5, True, 5.0, "5", None, [5]])
def test_a_mark_that_no_process_can_have_is_dropped_with_a_word(
    tmp_path: Path, peak: object, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "memory.json"
    peaks = high_water_marks(tmp_path)
    peaks.note(LAUNCH, 7)
    peaks.note(OTHER, 8)
    peaks.save()
    marks = json.loads(path.read_text())
    path.write_text(json.dumps({key: peak if mark == 7 else mark for key, mark in marks.items()}))
    again = high_water_marks(tmp_path, total=100)
    assert (again.get(LAUNCH), again.get(OTHER)) == (None, 8)
    assert "dropped" in caplog.text


def test_a_mark_never_asks_for_more_than_can_be_free() -> None:
    peaks = high_water_marks(total=100)
    peaks.note(LAUNCH, 98)
    assert peaks.get(LAUNCH) == 75
    peaks.note(OTHER, 30)
    assert peaks.get(OTHER) == 30


def test_the_last_idle_size_counts(tmp_path: Path) -> None:
    sizes = idle_sizes(tmp_path, total=100)
    for size in (60, 50, 0, 101):
        sizes.note(LAUNCH, size)
    assert sizes.get(LAUNCH) == 50
    sizes.save()
    assert idle_sizes(tmp_path).get(LAUNCH) == 50


def test_the_oldest_marks_are_dropped(tmp_path: Path) -> None:
    peaks = high_water_marks(tmp_path)
    for number in range(MAX_VALUES + 1):
        peaks.note(Launch((str(number),)), 5)
        peaks.note(Launch(("0",)), 5 + number)  # in use
    peaks.save()
    again = high_water_marks(tmp_path)
    assert [again.get(Launch((name,))) is None for name in ("0", "1", str(MAX_VALUES))] == [False, True, False]


def test_no_link_is_followed(tmp_path: Path) -> None:
    """Neither to be read, nor to be written."""
    target = tmp_path / "target"
    target.write_text('{"precious": 5}')
    path = tmp_path / "memory.json"
    path.symlink_to(target)
    path.with_suffix(".tmp").symlink_to(target)
    peaks = high_water_marks(tmp_path)
    peaks.note(LAUNCH, 5)
    peaks.save()
    assert target.read_text() == '{"precious": 5}'
    assert not path.is_symlink()
    assert high_water_marks(tmp_path).get(LAUNCH) == 5


def test_a_file_that_cannot_be_written_costs_only_what_was_learned(tmp_path: Path) -> None:
    peaks = high_water_marks(tmp_path / "gone")
    peaks.note(LAUNCH, 5)
    peaks.save()
    assert peaks.get(LAUNCH) == 5


async def test_a_mark_that_rises_is_written_beside_the_event_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "memory.json"
    peaks = high_water_marks(tmp_path)
    saving = asyncio.ensure_future(peaks.keep_saved())
    for footprint in range(100, 200):
        peaks.note(LAUNCH, footprint)
    assert not path.exists(), "to note is not to write"
    await until(lambda: high_water_marks(tmp_path).get(LAUNCH) == peaks.get(LAUNCH))
    peaks.note(LAUNCH, 400)
    await until(lambda: high_water_marks(tmp_path).get(LAUNCH) == 400)
    saving.cancel()
    written = path.stat().st_mtime_ns
    peaks.note(LAUNCH, 401)  # too little
    peaks.save()
    assert path.stat().st_mtime_ns == written
    assert json.loads(path.read_text())

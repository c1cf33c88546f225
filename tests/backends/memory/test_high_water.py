"""The most that each model was seen to take: kept in a file, which is written beside the event loop."""

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import pytest

from backends.domain.spec import Launch
from backends.memory.high_water import HighWaterMarks
from tests.lives import until

LAUNCH = Launch(("server", "--model", "m", "--port", "{port}"))


def test_peaks_outlive_the_gateway_and_belong_to_the_flags(tmp_path: Path) -> None:
    path = tmp_path / "memory.json"
    for footprint in (700, 600):
        peaks = HighWaterMarks(path)
        peaks.note(LAUNCH, footprint)
        peaks.save()
    assert HighWaterMarks(path).get(LAUNCH) == 700
    assert HighWaterMarks(path).get(replace(LAUNCH, argv=(*LAUNCH.argv, "--kv-bits", "8"))) is None


@pytest.mark.parametrize("contents", ["", "[]", "{", '{"a": "x"}'])
def test_a_file_that_cannot_be_read_is_begun_anew(tmp_path: Path, contents: str) -> None:
    path = tmp_path / "memory.json"
    path.write_text(contents)
    peaks = HighWaterMarks(path)
    assert peaks.get(LAUNCH) is None
    peaks.note(LAUNCH, 5)
    peaks.save()
    assert HighWaterMarks(path).get(LAUNCH) == 5


def test_a_file_that_cannot_be_written_costs_only_what_was_learned(tmp_path: Path) -> None:
    peaks = HighWaterMarks(tmp_path / "gone" / "memory.json")
    peaks.note(LAUNCH, 5)
    peaks.save()
    assert peaks.get(LAUNCH) == 5


async def test_a_mark_that_rises_is_written_beside_the_event_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "memory.json"
    peaks = HighWaterMarks(path)
    saving = asyncio.ensure_future(peaks.keep_saved())
    for footprint in range(100, 200):
        peaks.note(LAUNCH, footprint)
    assert not path.exists(), "to note is not to write"
    await until(lambda: HighWaterMarks(path).get(LAUNCH) == peaks.get(LAUNCH))
    peaks.note(LAUNCH, 400)
    await until(lambda: HighWaterMarks(path).get(LAUNCH) == 400)
    saving.cancel()
    written = path.stat().st_mtime_ns
    peaks.note(LAUNCH, 401)  # too little
    peaks.save()
    assert path.stat().st_mtime_ns == written
    assert json.loads(path.read_text())

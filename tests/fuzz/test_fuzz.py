"""The targets under hypothesis; and, where it is installed, for a few seconds under atheris."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz import targets

SECONDS = int(os.environ.get("FUZZ_SECONDS", "10"))
RUNNER = Path(__file__).with_name("run_atheris.py")


@st.composite
def spoilt(draw: st.DrawFn, seeds: tuple[bytes, ...]) -> bytes:
    """Real ones: put together, and with some bytes changed, lost or added."""
    data = bytearray(b"".join(draw(st.lists(st.sampled_from(seeds), min_size=1, max_size=3))))
    for _ in range(draw(st.integers(0, 4))):
        place = draw(st.integers(0, len(data)))
        data[place : place + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
    return bytes(data)


@given(st.binary(min_size=4, max_size=4), st.binary(max_size=200) | spoilt(targets.STREAMS))
@settings(max_examples=400)
def test_streams(head: bytes, body: bytes) -> None:
    targets.stream(head + body)


@given(st.sampled_from([b"\0", b"\1"]), st.binary(max_size=200) | spoilt(targets.BODIES))
@settings(max_examples=400)
def test_bodies(head: bytes, body: bytes) -> None:
    targets.parsed(head + body)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris has wheels for Linux on x86 only")
@pytest.mark.timeout(SECONDS + 120)
@pytest.mark.parametrize("target", ["stream", "intake"])
def test_guided_by_coverage(target: str, tmp_path: Path) -> None:
    command = [sys.executable, str(RUNNER), target, str(tmp_path), f"-max_total_time={SECONDS}"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert ended.returncode == 0, ended.stderr[-4000:]
    assert "Done " in ended.stderr

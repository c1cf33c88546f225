"""A model that may not be read is told as that, at each step that meets it first."""

import codecs
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from backends.domain.failure import Blame, Cause
from backends.domain.spec import Launch
from backends.memory.access import denied, unreadable
from backends.replica.preflight import preflight
from gateway.cli.check import check

NOBODY = 65534
DENIALS = {
    "the folder": "model",
    "a folder above": "",
    "the config": "model/config.json",
    "weights": "model/model.safetensors",
}


@contextmanager
def unprivileged() -> Iterator[None]:
    """Root may read everything."""
    if os.geteuid() != 0:
        yield
        return
    codecs.lookup("utf-8-sig")  # Python's own files may not be readable for others: what is read later is loaded now
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def home() -> Iterator[Path]:
    """Where anybody may read; pytest's own folders are for their user only."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    (folder / "home" / "model").mkdir(parents=True)
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    weights = len(header).to_bytes(8, "little") + header + b"1234"
    (folder / "home" / "model" / "model.safetensors").write_bytes(weights)
    (folder / "home" / "model" / "config.json").write_text("{}")
    yield folder / "home"
    for path in (folder / "home", folder / "home" / "model"):
        path.chmod(0o755)
    shutil.rmtree(folder)


@pytest.mark.parametrize("what", ["model", "", "model/model.safetensors"])
def test_a_launch(home: Path, what: str) -> None:
    (home / what).chmod(0)
    with unprivileged():
        failure = preflight(Launch((), model_folder=str(home / "model")))
    assert failure is not None
    assert (failure.cause, failure.blame) == (Cause.LOAD_FAILURE, Blame.OPERATOR)
    assert "may not be read by user" in failure.message
    assert "download" not in failure.message


@pytest.mark.parametrize("what", DENIALS.values(), ids=DENIALS)
def test_check(home: Path, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = home.parent / "config.yaml"
    config.write_text(f"models:\n  m:\n    model: {home / 'model'}\n")
    (home / what).chmod(0)
    with unprivileged():
        assert check(config) == 1
    assert "may not be read by user" in capsys.readouterr().err


def test_a_config_that_may_not_be_read(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = home / "config.yaml"
    config.write_text("models: {}")
    config.chmod(0)
    with unprivileged():
        assert check(config) == 2
    assert "a file that may not be read" in capsys.readouterr().err


def test_the_privacy_settings_of_macos_are_named_with_the_program() -> None:
    error = PermissionError(errno.EPERM, "Operation not permitted", "/Users/me/Documents/model")
    assert "Full Disk Access" in denied(error, platform="darwin")
    assert "chmod" in denied(error, platform="linux")
    assert "chmod" in denied(PermissionError(errno.EACCES, "Permission denied", "/Users/you"), platform="darwin")


def test_a_disk_that_fails_is_no_reason_to_download_again() -> None:
    message = unreadable(OSError(errno.EIO, "Input/output error", "/Volumes/x/config.json"), "/Volumes/x")
    assert message == "/Volumes/x/config.json cannot be read: Input/output error; check the disk that it is on"

"""What is known to be wrong before a spawn, and which words are filled in."""

import os
import socket
from pathlib import Path

import pytest

from backends.domain.failure import Aftermath, Blame, Cause
from backends.domain.spec import Launch
from backends.process.ports import free_port
from backends.replica.preflight import downloads, filled, preflight

EMPTY = (2).to_bytes(8, "little") + b"{}"  # of a safetensors file without tensors


def test_nothing_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(EMPTY)
    assert preflight(Launch(("x",))) is None
    assert preflight(Launch(("x",), port=free_port("127.0.0.1"), model_folder=str(tmp_path))) is None


def test_weights_that_were_cut_short(tmp_path: Path) -> None:
    """mlx before 0.30 loads them, and serves garbage."""
    (tmp_path / "model.safetensors").write_bytes(EMPTY[:-1])
    failure = preflight(Launch(("x",), model_folder=str(tmp_path)))
    assert failure is not None
    assert (failure.cause, failure.blame) == (Cause.LOAD_FAILURE, Blame.OPERATOR)
    assert "model.safetensors" in failure.message


@pytest.mark.parametrize("kind", ["missing", "a file"])
def test_a_model_folder_that_is_none(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "model"
    if kind == "a file":
        folder.touch()
    failure = preflight(Launch(("x",), model_folder=str(folder)))
    assert failure is not None
    assert (failure.cause, failure.blame, failure.aftermath) == (
        Cause.MODEL_NOT_FOUND,
        Blame.OPERATOR,
        Aftermath.EXITED,
    )
    assert str(folder) in failure.message


def test_a_port_that_is_taken_names_its_holder() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        failure = preflight(Launch(("x",), port=port))
    assert failure is not None
    assert (failure.cause, failure.blame) == (Cause.PORT_IN_USE, Blame.MACHINE)
    assert f"port {port} is taken by" in failure.message
    assert f"(pid {os.getpid()})" in failure.message


def test_what_is_still_to_be_downloaded(tmp_path: Path) -> None:
    launch = Launch(("x",), env={"HF_HUB_CACHE": str(tmp_path)}, model="org/name")
    assert downloads(launch)
    snapshot = tmp_path / "models--org--name" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    assert downloads(launch)
    (snapshot / "model.safetensors").write_bytes(EMPTY)
    assert not downloads(launch)
    assert not downloads(Launch(("x",))), "a command, or a local folder"


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("--port={port}", "--port=81"),
        ("{host}:{port}/{model}", "h:81/a{b}"),
        ('{"a": 1}', '{"a": 1}'),
        ("{other} {", "{other} {"),
    ],
)
def test_what_is_filled_in_and_what_stays(word: str, expected: str) -> None:
    assert filled(word, {"host": "h", "port": "81", "model": "a{b}"}) == expected

"""What a start rests on: what changes it, and what does not."""

import os
import sys
from pathlib import Path

import pytest

from backends.domain.spec import Launch
from backends.process import ports
from backends.replica.basis import basis


def test_a_folder_that_appears_and_changes(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    launch = Launch((sys.executable,), model_folder=str(folder))
    seen = [basis(launch)]
    assert basis(launch) == seen[0]
    folder.mkdir()
    seen.append(basis(launch))
    (folder / "config.json").write_text("{")
    seen.append(basis(launch))
    (folder / "config.json").write_text("{}")
    seen.append(basis(launch))
    os.utime(folder / "config.json", ns=(0, 0))
    seen.append(basis(launch))
    assert basis(launch) == seen[-1]
    assert len(set(seen)) == len(seen)


def test_a_snapshot_that_appears_in_the_hub_cache(tmp_path: Path) -> None:
    launch = Launch((sys.executable,), env={"HF_HUB_CACHE": str(tmp_path)}, model="org/name")
    before = basis(launch)
    snapshot = tmp_path / "models--org--name" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    assert basis(launch) != before


def test_a_program_that_is_installed(tmp_path: Path) -> None:
    program = tmp_path / "server"
    launch = Launch((str(program),))
    before = basis(launch)
    program.touch()
    assert basis(launch) != before


def test_what_the_command_line_names(tmp_path: Path) -> None:
    script, adapters = tmp_path / "server.py", tmp_path / "adapters"
    launch = Launch(
        (sys.executable, str(script), f"--adapter-path={adapters}", "--draft-model", "org/draft", "--port", "{port}"),
        env={"HF_HUB_CACHE": str(tmp_path)},
    )
    seen = [basis(launch)]
    assert basis(launch) == seen[0]
    script.touch()
    seen.append(basis(launch))
    script.chmod(0o755)
    seen.append(basis(launch))
    adapters.mkdir()
    seen.append(basis(launch))
    (adapters / "adapters.safetensors").touch()
    seen.append(basis(launch))
    snapshot = tmp_path / "models--org--draft" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    seen.append(basis(launch))
    assert basis(launch) == seen[-1]
    assert len(set(seen)) == len(seen)


def test_a_package_in_the_environment_of_the_program(tmp_path: Path) -> None:
    program, packages = tmp_path / "bin" / "python", tmp_path / "lib" / "python3.12" / "site-packages"
    program.parent.mkdir()
    program.symlink_to(sys.executable)
    packages.mkdir(parents=True)
    launch = Launch((str(program), "-m", "server"))
    before = basis(launch)
    (packages / "server").mkdir()
    assert basis(launch) != before


def test_words_that_are_no_paths(tmp_path: Path) -> None:
    words = ("", "-", "--x", "a/b\0c", "\0", "x" * 5000, "{port}", "--y=", "../..", "é/ü")
    launch = Launch((sys.executable, *words), env={"HF_HUB_CACHE": str(tmp_path)})
    assert basis(launch) == basis(launch)


def test_an_address_that_comes_up(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = Launch((sys.executable,), host="203.0.113.7")
    before = basis(launch)
    monkeypatch.setattr(ports, "free_port", lambda _: 9000)
    assert basis(launch) != before

"""What a start rests on: what changes it, and what does not."""

import os
import sys
from pathlib import Path

from backends.domain.spec import Launch
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

"""Files in the state folder: private when written, distrusted when read."""

import os
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest

from backends.process import state_folder
from backends.process.run_record import RunRecord, read
from backends.process.state_folder import MAX_SIZE, NotTrusted


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_folder_that_others_could_read_is_closed_with_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    folder.chmod(0o777)
    run_record = RunRecord(tmp_path)
    assert mode(folder) == 0o700
    assert "was open to other users" in caplog.text
    run_record.close()


def test_what_is_created_is_private(tmp_path: Path) -> None:
    state_folder.make_private(tmp_path / "state" / "run")
    assert (mode(tmp_path / "state"), mode(tmp_path / "state" / "run")) == (0o700, 0o700)
    path = tmp_path / "state" / "file.json"
    state_folder.write(path, b"5")
    assert (mode(path), state_folder.read(path)) == (0o600, b"5")


@pytest.mark.parametrize("kind", ["link", "file"])
def test_a_folder_that_is_none_is_refused(tmp_path: Path, kind: str) -> None:
    (tmp_path / "elsewhere").mkdir()
    folder = tmp_path / "run"
    if kind == "link":
        folder.symlink_to(tmp_path / "elsewhere")
    else:
        folder.touch()
    with pytest.raises(NotTrusted, match=f"{folder} is not a folder .*; remove it"):
        RunRecord(tmp_path)
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_state_folder_on_another_disk_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "state").symlink_to(tmp_path / "disk")
    run_record = RunRecord(tmp_path / "state")
    assert (tmp_path / "disk" / "run").is_dir()
    run_record.close()


def test_what_belongs_to_another_user_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir()
    path = tmp_path / "file"
    path.touch()
    seen = os.stat_result((0o100600, 1, 1, 1, 4711, 0, 0, 0, 0, 0))
    monkeypatch.setattr(state_folder, "os", SimpleNamespace(**{**vars(os), "fstat": lambda _: seen}))
    with pytest.raises(NotTrusted, match="another user"):
        state_folder.read(path)
    monkeypatch.setattr(state_folder, "os", SimpleNamespace(**{**vars(os), "geteuid": lambda: 4711}))
    with pytest.raises(NotTrusted, match="another user"):
        state_folder.make_private(tmp_path / "run")


@pytest.mark.parametrize("kind", ["link", "dangling", "fifo", "folder", "large"])
def test_what_is_no_small_regular_file_is_set_aside(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    path, target = tmp_path / "1-1-0123abcd.json", tmp_path / "target"
    match kind:
        case "link":
            target.write_text("{}")
            path.symlink_to(target)
        case "dangling":
            path.symlink_to(target)
        case "fifo":
            os.mkfifo(path)  # to open it would wait for a writer
        case "folder":
            path.mkdir()
        case _:
            path.write_bytes(b" " * (MAX_SIZE + 1))
    assert read(path) is None
    assert "is not valid" in caplog.text
    assert not os.path.lexists(path)
    assert os.path.lexists(path.with_suffix(".corrupt"))


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.json"
    state_folder.write(path, b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space"):
        state_folder.write(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]

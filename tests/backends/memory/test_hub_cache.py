"""Which folder of the hub's cache a model is read from: that which mlx_lm loads. The layout is made by hand."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from backends.memory.hub_cache import cache_dir, folders
from gateway.config import parse
from gateway.forward.body_workers import BodyWorkers
from gateway.plan import rules
from gateway.sizing import need
from tests.backends.memory.test_estimate import tensors

VARIABLES = ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME")
CONFIG = (
    '{"vocab_size": %d, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "hidden_size": 8}'
)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def snapshot(cache: Path, commit: str, *, vocab: int = 5, at: float = 1000.0, ref: str = "") -> Path:
    """As ``hf download org/m`` leaves it. ``ref``: the branch or tag that names the commit."""
    repo = cache / "models--org--m"
    folder = repo / "snapshots" / commit
    folder.mkdir(parents=True)
    for name, contents in (("config.json", CONFIG % vocab), ("model.safetensors", tensors(vocab))):
        blob = repo / "blobs" / f"{commit}-{name}"
        blob.parent.mkdir(exist_ok=True)
        blob.write_bytes(contents if isinstance(contents, bytes) else contents.encode())
        (folder / name).symlink_to(blob)
    os.utime(folder, (at, at))
    if ref:
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / ref).write_text(commit)
    return folder


def test_main_is_read_and_no_other_revision(home: Path) -> None:
    cache = home / ".cache" / "huggingface" / "hub"
    snapshot(cache, "aaa", at=3000.0)
    main = snapshot(cache, "bbb", at=1000.0, ref="main")
    snapshot(cache, "ccc", at=2000.0, ref="v2")
    assert list(folders("org/m")) == [main]


def test_without_a_main_the_newest_comes_first(home: Path) -> None:
    cache = home / ".cache" / "huggingface" / "hub"
    made = {commit: snapshot(cache, commit, at=at) for commit, at in (("aaa", 1.0), ("bbb", 3.0), ("ccc", 2.0))}
    assert list(folders("org/m")) == [made["bbb"], made["ccc"], made["aaa"]]
    (cache / "models--org--m" / "refs").mkdir()
    (cache / "models--org--m" / "refs" / "main").write_text("gone")
    assert next(folders("org/m")) == made["bbb"]


def test_what_is_not_there(home: Path, tmp_path: Path) -> None:
    assert list(folders("org/m")) == []
    assert list(folders("")) == []
    assert list(folders("a/b/c")) == []
    assert list(folders(str(tmp_path / "m"))) == [tmp_path / "m"], "a folder is not looked for"


@pytest.mark.parametrize(
    ("env", "cache"),
    [
        ({}, ".cache/huggingface/hub"),
        ({"XDG_CACHE_HOME": "~/xdg"}, "xdg/huggingface/hub"),
        ({"HF_HOME": "~/hf"}, "hf/hub"),
        ({"HF_HOME": "$HOME/hf", "XDG_CACHE_HOME": "/no"}, "hf/hub"),
        ({"HUGGINGFACE_HUB_CACHE": "~/old"}, "old"),
        ({"HF_HUB_CACHE": "~/cache", "HUGGINGFACE_HUB_CACHE": "~/old", "HF_HOME": "/no"}, "cache"),
        ({"HF_HUB_CACHE": "${HOME}/a/$UNKNOWN", "HF_HOME": "/no"}, "a/$UNKNOWN"),
    ],
)
def test_the_cache_lies_where_huggingface_hub_has_it(home: Path, env: dict[str, str], cache: str) -> None:
    environ = {**os.environ, **env}
    told = subprocess.run(
        [sys.executable, "-c", "from huggingface_hub import constants; print(constants.HF_HUB_CACHE)"],
        env=environ,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    assert cache_dir(environ) == Path(told) == home / cache


@pytest.mark.parametrize("env", [{"HF_HOME": "~/own"}, {"HF_HUB_CACHE": "~/own/hub"}, {"HOME": "{home}/own"}])
async def test_a_model_with_an_environment_of_its_own(
    home: Path, monkeypatch: pytest.MonkeyPatch, env: dict[str, str]
) -> None:
    own = home / "own" / (".cache/huggingface/hub" if "HOME" in env else "hub")
    monkeypatch.setenv("HF_HOME", str(home / "ours"))
    if "HOME" in env:
        monkeypatch.delenv("HF_HOME")
        env = {"HOME": str(home / "own")}
    snapshot(home / "ours" / "hub", "aaa", vocab=5, ref="main")
    theirs = snapshot(own, "bbb", vocab=7, ref="main")
    assert list(folders("org/m", env)) == [theirs]
    words = ", ".join(f'{name}: "{value}"' for name, value in env.items())
    config = parse(f"models: {{m: {{model: org/m, env: {{{words}}}}}}}", "c.yaml", {})
    parts = need(config.models[0]).parts
    assert parts is not None
    assert parts.weights == 7
    assert await rules(config, BodyWorkers())["m"].vocab_size() == 7


def test_the_command_line_does_not_wait_for_its_import() -> None:
    heavy = "import sys, gateway.cli.check, gateway.app; sys.exit('huggingface_hub.file_download' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", heavy], check=False).returncode == 0

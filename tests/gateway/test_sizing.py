"""What ``check`` tells of the memory that models will need."""

import json
from pathlib import Path
from typing import Any

import pytest

from backends.instrument import engine_source
from backends.memory.estimate import RUNTIME, kv_bytes
from backends.memory.units import memory
from backends.replica import load_times
from gateway.cli.check import check
from gateway.config import Config, parse
from gateway.plan import launch_of
from gateway.sizing import SizeCache, budget, need, shares
from tests.backends.memory.test_estimate import LLAMA, tensors


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    (folder / "model.safetensors").write_bytes(tensors(10**6))
    return folder


def config(folder: Path, budget: str = "auto", **keys: Any) -> Config:
    model = {"model": str(folder), **keys}
    return parse(json.dumps({"models": {"m": model}, "memory": {"budget": budget}}), "c.yaml", {})


def test_of_a_folder(folder: Path) -> None:
    told = need(config(folder, max_context=512).models[0])
    assert told.parts is not None
    assert (told.parts.weights, told.parts.context) == (10**6, 512)
    assert told.size == told.parts.total == int(1.08 * 10**6) + kv_bytes(LLAMA, 512) + told.parts.prefill + RUNTIME


def test_a_draft_model_and_an_adapter_count(folder: Path, tmp_path: Path) -> None:
    (folder / "adapters.safetensors").write_bytes(tensors(7))
    draft = tmp_path / "draft"
    draft.mkdir()
    (draft / "model.safetensors").write_bytes(tensors(20))
    args = {"draft-model": str(draft), "adapter-path": str(folder)}
    told = need(config(folder, server_args=args).models[0])
    assert told.parts is not None
    assert told.parts.weights == 10**6 + 27


def test_flags_that_change_the_cache(folder: Path) -> None:
    plain = need(config(folder, max_context=4096).models[0]).parts
    args = {"kv-bits": 4, "quantized-kv-start": 0, "prompt-cache-size": 2, "prefill-step-size": 64}
    packed = need(config(folder, max_context=4096, server_args=args).models[0]).parts
    assert plain is not None
    assert packed is not None
    assert packed.kv < 0.3 * plain.kv
    assert 4 * 64 * 4096 * 2 < packed.prefill <= plain.prefill


def test_flags_that_change_the_batch(folder: Path) -> None:
    def readers(**args: int) -> int:
        parts = need(config(folder, server_args=args).models[0]).parts
        return 0 if parts is None or parts.batch is None else parts.batch.readers

    assert (readers(), readers(**{"prompt-concurrency": 16}), readers(**{"decode-concurrency": 4})) == (8, 16, 4)


def test_what_the_operator_says_wins(folder: Path) -> None:
    assert need(config(folder, memory="3GB").models[0]).size == 3 * 10**9


@pytest.mark.parametrize("contents", [b"[]", b"{}", b"{"])
def test_a_config_of_something_else(folder: Path, contents: bytes) -> None:
    (folder / "config.json").write_bytes(contents)
    told = need(config(folder).models[0])
    assert (told.size, told.broken) == (None, False)
    assert told.why


def test_budgets(folder: Path) -> None:
    assert budget(config(folder)) is None
    assert budget(config(folder, "3GB")) == 3 * 10**9
    half, whole = budget(config(folder, "50%")), budget(config(folder, "100%"))
    assert half is not None
    assert whole is not None
    assert abs(2 * half - whole) <= 2


def test_the_scheduler_is_told_what_was_measured_and_no_file_is_read_for_it(folder: Path) -> None:
    one = config(folder)
    sizes = SizeCache(one)
    told = sizes.estimates()["m"]
    assert told() is None
    sizes.measure("m")
    expected = need(one.models[0]).size
    assert told() == expected
    (folder / "config.json").unlink()
    assert told() == expected
    sizes.measure("m")
    assert told() is None


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return path


def test_the_table(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = f"""\
memory: {{budget: 1GiB}}
models:
  two: {{model: {folder}, replicas: 2}}
  big: {{model: {folder}, memory: 2GiB, load: on_demand}}
  own: {{command: [server, --port, "{{port}}"], idle_unload: 5m}}
  far: {{urls: ["http://127.0.0.1:1"]}}
"""
    assert check(written(tmp_path, text)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("ok, 4 model(s), 5 backend(s)")
    two, big, own, far = (line.split() for line in lines[3:7])
    assert two[:6] == ["two", "1", "MiB", "2", "MiB", "at"]
    size = memory(need(config(folder).models[0]).size or 0)
    assert " ".join(two[-11:]) == f"2 32, by memory {size} 256 MiB, 512 prompts eager"
    assert " ".join(big[7:18]) == f"2.00 GiB (as the config says) 1 32, by memory {size.split()[0]}"
    assert "?" in own
    assert " ".join(own[-7:]) == "memory:) 1 8 - - eager, idle_unload"
    assert " ".join(far) == "far - - 0 MiB (runs elsewhere) 1 8 - - -"
    assert any(line.endswith("GiB of 1.00 GiB (memory.budget): does NOT fit") for line in lines)
    assert "not counted, for lack of an estimate: own" in lines
    assert "big alone does NOT fit" in lines


def test_shares(folder: Path) -> None:
    """Of those that stay, beside the need of the largest that comes and goes; and of that one, beside all."""
    text = f"""
memory: {{budget: 12GiB}}
models:
  two: {{model: {folder}, replicas: 2, server_args: {{prompt-cache-bytes: 64MB}}}}
  one: {{model: {folder}}}
  some: {{model: {folder}, load: on_demand, memory: 700MiB}}
  open: {{model: {folder}, load: on_demand, server_args: {{prompt-cache-bytes: null, prompt-cache-size: 3}}}}
"""
    whole = parse(text, "c.yaml", {})
    needs = [(model, need(model)) for model in whole.models]
    parts = needs[0][1].parts
    assert parts is not None
    found = shares(whole, needs)
    assert found["two"].prompt_cache == 64 * 10**6
    assert found["two"].total == parts.base + found["two"].batch + 64 * 10**6
    assert (found["open"].prompt_cache, found["open"].entries) == (3 * parts.kv, 3)
    assert found["some"].total <= 700 << 20
    assert found["one"].prompt_cache > 256 << 20
    assert abs(2 * found["two"].total + found["one"].total - ((12 << 30) - parts.total)) <= 3, "to the byte, rounded"


def test_advice_on_replicas(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two that take much of the memory; and the pause of one, once a gateway has measured its load."""
    monkeypatch.setenv("MLX_GATEWAY_STATE_DIR", str(tmp_path))
    text = f"memory: {{budget: 8MB}}\nmodels: {{two: {{model: {folder}, replicas: 2}}, one: {{model: {folder}}}}}"
    times = load_times.load_times(tmp_path)
    assert check(written(tmp_path, text)) == 0
    assert "two: 2 replicas hold the weights 2 times (1 MiB each" in (said := capsys.readouterr().out)
    assert "not known before its first start" in said
    assert "pause" not in said
    times.note(launch_of(config(folder).models[0]), 11.0)
    times.save()
    assert check(written(tmp_path, text)) == 0
    said = capsys.readouterr().out
    assert "One replica restarts in about 12 s; requests wait for it" in said
    assert "one: a crash of its one replica is a pause of about 12 s" in said


def test_engine_fixes_that_do_not_fit(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(settings: str = "") -> str:
        assert check(written(tmp_path, f"models: {{m: {{model: {folder}{settings}}}}}")) == 0
        return "".join(line for line in capsys.readouterr().out.splitlines() if "engine fixes" in line)

    assert told() == ""
    package = engine_source.installed()
    assert package is not None
    (tmp_path / "models").mkdir()
    (tmp_path / "server.py").write_bytes((package / "server.py").read_bytes().replace(b"budget=0.5", b"budget=0.4"))
    (tmp_path / "models" / "cache.py").write_bytes((package / "models" / "cache.py").read_bytes())
    monkeypatch.setattr(engine_source, "installed", lambda: tmp_path)
    assert told().startswith("engine fixes not applied, since mlx-lm ")
    assert told().endswith(" has another source there: admission_budget")
    assert told(", engine_fixes: off") == told(", instrument: off") == ""


def test_a_model_that_cannot_be_loaded(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert check(written(tmp_path, f"models: {{m: {{model: {folder}, memory: 1GiB}}}}")) == 1
    said = capsys.readouterr()
    assert "cannot be loaded" in said.out
    assert f"m: {file} was cut short" in said.err

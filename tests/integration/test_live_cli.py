"""The command line, as typed."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from signal import SIGTERM

import psutil
import pytest

from tests.integration import harness
from tests.integration.harness import (
    HASTY_RESTART,
    QUICK_RESTART,
    Gateway,
    command,
    environment,
    fake,
    launched,
    spawn,
    supervised,
    wait_until,
    write_config,
)
from tests.integration.wire import chat, whole

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[2]
ABORT = (
    "libc++abi: terminating due to uncaught exception of type std::runtime_error: [METAL] Command buffer execution"
    " failed: Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)\n"
)


def run(*args: str, folder: Path, given: str = "") -> "subprocess.CompletedProcess[str]":
    env = {**environment(folder), "COLUMNS": "200"}
    return subprocess.run(
        command(*args), input=given, capture_output=True, text=True, env=env, cwd=folder, timeout=60, check=False
    )


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    models = {"tiny": fake(replicas=2, restart=QUICK_RESTART), "dead": fake("exit-at-start", restart=HASTY_RESTART)}
    with launched({"models": models}, tmp_path_factory.mktemp("cli"), ready=False) as running:
        running.await_state("tiny:0", "ready")
        running.await_state("tiny:1", "ready")
        running.await_state("dead:0", "failed")
        yield running


# -- looking at one that runs ------------------------------------------------------------------------------------------


def test_status(gateway: Gateway, tmp_path: Path) -> None:
    done = run("status", "--url", gateway.url, folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    lines = {name: next(line for line in done.stdout.splitlines() if name in line) for name in ("tiny:0", "dead:0")}
    assert "ready" in lines["tiny:0"]
    assert str(gateway.backend("tiny:0")["pid"]) in lines["tiny:0"]
    assert "failed" in lines["dead:0"]
    assert "dependency" in lines["dead:0"]
    assert "degraded" in done.stdout


def test_status_of_nobody(tmp_path: Path) -> None:
    done = run("status", "--url", "http://127.0.0.1:9", folder=tmp_path)
    assert done.returncode == 1
    assert "no gateway answers at http://127.0.0.1:9" in done.stderr


def test_logs(gateway: Gateway, tmp_path: Path) -> None:
    one = run("logs", "tiny:0", "--url", gateway.url, folder=tmp_path)
    assert one.returncode == 0
    assert "Starting httpd at 127.0.0.1" in one.stdout
    every = run("logs", "--url", gateway.url, folder=tmp_path)
    assert "tiny:1 | " in every.stdout
    assert "dead:0 | ModuleNotFoundError: No module named 'mlx'" in every.stdout
    unknown = run("logs", "nobody:0", "--url", gateway.url, folder=tmp_path)
    assert unknown.returncode == 1
    assert "tiny:0" in unknown.stderr


def test_logs_follow(gateway: Gateway, tmp_path: Path) -> None:
    """What comes later is shown as it comes, also of the next life."""
    args = command("logs", "tiny:1", "--follow", "--url", gateway.url)
    path = tmp_path / "followed"
    with path.open("wb") as out:
        process = subprocess.Popen(args, stdout=out, env=environment(tmp_path), cwd=tmp_path)
    try:
        wait_until(lambda: "Starting httpd" in path.read_text())
        pid = gateway.signal_backend("tiny:1", SIGTERM)
        gateway.await_life("tiny:1", pid)
        wait_until(lambda: path.read_text().count("Starting httpd") == 2)
    finally:
        process.terminate()
        process.wait()


# -- starting ----------------------------------------------------------------------------------------------------------


def test_wrong_config(tmp_path: Path) -> None:
    """Every problem at once, with its line; nothing is started. The same from ``check``."""
    (tmp_path / "config.yaml").write_text(
        "server:\n  prot: 8080\n  max_body: lots\nmodels:\n  tiny:\n    modle: x\n    replicas: 0\n"
    )
    for name in ("serve", "check"):
        done = run(name, folder=tmp_path)
        assert done.returncode == 2
        assert done.stdout == ""
        for line, word in ((2, "port"), (3, "max_body"), (6, "model"), (7, "replicas")):
            assert any(
                problem.startswith(f"config.yaml:{line}: ") and word in problem for problem in done.stderr.splitlines()
            ), (line, word, done.stderr)
        assert not (tmp_path / "state").exists()


def test_no_config(tmp_path: Path) -> None:
    done = run("serve", "nowhere.yaml", folder=tmp_path)
    assert done.returncode == 2
    assert "nowhere.yaml" in done.stderr


def test_wrong_usage(tmp_path: Path) -> None:
    for args in ((), ("dance",), ("serve", "--port", "seven"), ("serve", "--prot", "7")):
        assert run(*args, folder=tmp_path).returncode == 2


def test_port_in_use(gateway: Gateway, tmp_path: Path) -> None:
    port = gateway.url.rpartition(":")[2]
    write_config(tmp_path, {"models": {"tiny": fake()}})
    done = run("serve", "--port", port, folder=tmp_path)
    assert done.returncode == 1
    assert port in done.stderr
    assert str(gateway.process.pid) in done.stderr  # who holds it
    assert "--port" in done.stderr  # and what to do
    assert "Traceback" not in done.stderr


def test_open_to_the_world_without_keys(tmp_path: Path) -> None:
    write_config(tmp_path, {"models": {"tiny": fake()}})
    done = run("serve", "--host", "0.0.0.0", "--port", "0", folder=tmp_path)  # noqa: S104 it must refuse
    assert done.returncode == 2
    assert "api_keys" in done.stderr


def test_state_folder_that_cannot_be_written(tmp_path: Path) -> None:
    write_config(tmp_path, {"models": {"tiny": fake()}})
    (tmp_path / "state").write_text("a file, not a folder")
    done = run("serve", "--port", "0", folder=tmp_path)
    assert done.returncode == 1
    assert "MLX_GATEWAY_STATE_DIR" in done.stderr
    assert "Traceback" not in done.stderr


def test_check_accepts(tmp_path: Path) -> None:
    write_config(tmp_path, {"models": {"tiny": fake(replicas=2)}})
    done = run("check", folder=tmp_path)
    assert done.returncode == 0
    assert "1 model(s), 2 backend(s)" in done.stdout


def test_shipped_config(tmp_path: Path) -> None:
    done = run("check", str(REPOSITORY / "config.yaml"), folder=tmp_path)
    assert done.returncode == 0, done.stderr


# -- without a gateway -------------------------------------------------------------------------------------------------


def test_explain(tmp_path: Path) -> None:
    told = json.loads(run("explain", "--exit", "-6", "--json", folder=tmp_path, given=ABORT).stdout)
    assert (told["cause"], told["code"], told["backend_failed"]) == ("oom", "backend_oom", True)
    assert told["evidence"] == [ABORT.strip()]
    (tmp_path / "output").write_text(ABORT)
    done = run("explain", "output", "--exit", "134", folder=tmp_path)
    assert done.returncode == 0
    assert "oom" in done.stdout
    assert run("explain", "nowhere", folder=tmp_path).returncode == 2
    assert run("explain", "--exit", "soon", folder=tmp_path, given=ABORT).returncode == 2


def test_schema(tmp_path: Path) -> None:
    schema = json.loads(run("schema", folder=tmp_path).stdout)
    assert schema["properties"].keys() == {"server", "memory", "defaults", "models"}


def test_broken_pipe(gateway: Gateway, tmp_path: Path) -> None:
    shell = f"{' '.join(command('schema'))} | head -n 1"
    done = subprocess.run(shell, shell=True, capture_output=True, text=True, env=environment(tmp_path), check=False)  # noqa: S602 fixed text
    assert (done.stdout, done.stderr) == ("{\n", "")


# -- the demo ----------------------------------------------------------------------------------------------------------


def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It makes its model, says what to try, answers, and gets over the loss of a backend."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    gateway = spawn(["demo", "--port", "0"], tmp_path)
    with supervised(gateway):
        gateway.await_listening()
        wait_until(lambda: "Stop with Ctrl-C" in gateway.log)
        for hint in (f"curl -N {gateway.url}/v1/chat/completions", f'OpenAI(base_url="{gateway.url}/v1"', "kill -9"):
            assert hint in gateway.log
        assert whole(gateway.ask(chat("hello", max_tokens=20)))
        gateway.await_health()
        pid = gateway.signal_backend("tiny:0", 9)
        assert whole(gateway.ask(chat("hello", max_tokens=20, stream=True)))
        gateway.await_life("tiny:0", pid)
    assert (home / ".cache" / "mlx-gateway" / "tiny-llama" / "model.safetensors").is_file()


def test_what_a_backend_inherits(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All variables but the gateway's secrets, and no module of the working directory."""
    monkeypatch.setenv("GATEWAY_TEST_KEY", "secret-of-the-gateway")
    monkeypatch.setenv("GATEWAY_TEST_OTHER", "for-everybody")
    for decoy in ("mlx_lm.py", "random.py", "transformers.py"):
        (tmp_path / decoy).write_text("raise SystemExit('imported from the working directory')")
    config = {
        "server": {"api_keys": ["${GATEWAY_TEST_KEY}"]},
        "models": {"tiny": {"model": str(tiny_model)}, "other": fake()},
    }
    args = [str(Path(sys.executable).with_name("mlx-gateway")), "serve", str(write_config(tmp_path, config))]
    monkeypatch.setattr(harness, "command", lambda *rest: [*args, *rest])
    gateway = spawn(["--port", "0"], tmp_path)
    gateway.http.headers["x-api-key"] = "secret-of-the-gateway"
    with supervised(gateway):
        gateway.await_listening()
        gateway.await_health()
        for name in ("tiny:0", "other:0"):
            inherited = psutil.Process(gateway.backend(name)["pid"]).environ()
            assert "secret-of-the-gateway" not in inherited.values()
            assert inherited["GATEWAY_TEST_OTHER"] == "for-everybody"

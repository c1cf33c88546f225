"""``http.uvicorn_protocol`` builds on undocumented names of uvicorn: its tests, on the versions inside the bound.

Each version is installed beside the environment, into a folder that comes first on the path. Needs a package index.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TESTS = ["tests/gateway/http/test_uvicorn_protocol.py", "tests/gateway/cli/test_server.py"]
LOWEST, MIDDLE, NEWEST = "0.34.0", "0.44.0", "0.54.0"


def installer() -> list[str]:
    if shutil.which("uv") is not None:
        return ["uv", "pip", "install", "--python", sys.executable]
    pip = [sys.executable, "-m", "pip"] if importlib.util.find_spec("pip") else [shutil.which("pip") or "pip"]
    return [*pip, "install", "--disable-pip-version-check"]


def test_the_bound_is_that_of_the_versions_here() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (bound,) = [one for one in project["dependencies"] if one.startswith("uvicorn")]
    low, high = LOWEST.rpartition(".")[0], f"0.{int(NEWEST.split('.')[1]) + 1}"
    assert bound == f"uvicorn>={low},<{high}"


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("version", [LOWEST, MIDDLE, NEWEST])
def test_a_version_inside_the_bound(version: str, tmp_path: Path) -> None:
    install = [*installer(), "--no-deps", "--target", str(tmp_path), f"uvicorn=={version}"]
    try:
        subprocess.run(install, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"cannot be installed here: {error}")
    environ = {**os.environ, "PYTHONPATH": str(tmp_path)}
    ask = [sys.executable, "-c", "import uvicorn; print(uvicorn.__version__)"]
    seen = subprocess.run(ask, env=environ, cwd=ROOT, capture_output=True, text=True, check=True)
    assert seen.stdout.strip() == version
    run = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS]
    done = subprocess.run(run, env=environ, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]

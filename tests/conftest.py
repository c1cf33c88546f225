"""Shared fixtures: a tiny real model, and gateways that run as processes of their own."""

import gc
import os
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
from hypothesis import HealthCheck, is_hypothesis_test, settings

from tests.integration.harness import RUNNING, Gateway, launched
from tests.integration.wire import Json

# The speed of the machine is no property of the code.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")

LOG_LINES = 60  # lines of a gateway's log that a failure report shows

Launch = Callable[..., Gateway]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with random weights that mlx_lm.server can load."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    subprocess.run([sys.executable, "-m", "gateway.cli.demo_model.model", str(folder)], check=True)
    return folder


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    """``launch(config, ready=True)`` → Gateway, stopped after the test."""
    with ExitStack() as stack:
        count = 0

        def start(config: Json, *, ready: bool = True) -> Gateway:
            nonlocal count
            count += 1
            return stack.enter_context(launched(config, tmp_path / f"gateway{count}", ready=ready))

        yield start


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """Asserts that no process of this test outlives it."""
    before = set(psutil.Process().children(recursive=True))
    yield
    _, left = psutil.wait_procs(set(psutil.Process().children(recursive=True)) - before, timeout=2.0)
    for process in left:
        process.kill()
    assert left == []


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """The fast tests wait more than they compute; the slow ones wait a third of their time for servers."""
    cores = os.cpu_count() or 1
    return 2 * cores if config.option.markexpr == "not slow" else cores + cores // 2


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, so that the many short ones are left to fill the end of the run. Properties do
    not count for the coverage."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    for item in items:
        if is_hypothesis_test(getattr(item, "function", None)):  # hundreds of examples, each three times as slow
            item.add_marker("no_cover")


def pytest_collection_finish() -> None:
    """Some tests collect garbage to assert that none is left; frozen objects, such as imported modules, are skipped."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        for gateway in RUNNING:
            tail = "\n".join(gateway.log.splitlines()[-LOG_LINES:])
            report.sections.append((f"log of the gateway in {gateway.folder}", tail))
    return report

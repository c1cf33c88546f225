"""The benchmarks' own tools: their upstream is understood, and their load counts what there is."""

from pathlib import Path

import pytest

from benchmarks.__main__ import SCENARIOS, Scenario, measure, table
from benchmarks.targets import started

pytestmark = pytest.mark.slow


def test_a_scenario_against_the_upstream_and_the_gateway(tmp_path: Path) -> None:
    scenarios = {
        "json-1": Scenario("BENCH n=5", 2, 1.0),
        "streams-200": Scenario("BENCH n=100000 gap=0.01", 5, 1.0, stream=True, hold=True),
    }
    with started([], tmp_path) as targets:
        assert [target.name for target in targets] == ["direct", "mlx-gateway"]
        for name, scenario in scenarios.items():
            runs = {target.name: [measure(target, scenario, scenario.seconds)] for target in targets}
            for run in (rounds[0] for rounds in runs.values()):
                assert run["errors"] == 0
                assert run["chunks" if scenario.hold else "requests"] > 5
                assert run["delay" if scenario.hold else "latency"]
            assert runs["mlx-gateway"][0]["memory"] > 0
            assert f"| mlx-gateway | {'-'} |" in table(name, runs)


def test_every_scenario_can_be_told_apart_by_its_name() -> None:
    assert all(scenario.hold == name.startswith("streams") for name, scenario in SCENARIOS.items())

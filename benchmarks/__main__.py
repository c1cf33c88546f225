"""Measures the gateway's overhead, and that of the installed peers: ``uv run python -m benchmarks``.

Every scenario runs against every target in turn, several rounds in rotated order, so that changes in the machine's
speed affect all targets. Load and upstream share one processor, the target has another (on Linux; elsewhere they are
not pinned). Prints medians with their range; the ratios are of runs of the same round.
"""

import argparse
import json
import platform
import random
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.targets import PEERS, Target, started

Run = dict[str, Any]


@dataclass(frozen=True)
class Scenario:
    """``prompt``: instructions for the upstream; ``hold``: endless streams instead of a closed loop; ``bulk``:
    characters of text before the prompt."""

    prompt: str
    clients: int
    seconds: float
    stream: bool = False
    hold: bool = False
    bulk: int = 0


SCENARIOS = {
    "json-1": Scenario("BENCH n=20", 1, 2),
    "json-32": Scenario("BENCH n=20", 32, 3),
    "first-1": Scenario("BENCH n=2 gap=0.001", 1, 2, stream=True),
    "streams-200": Scenario("BENCH n=100000 gap=0.05", 200, 4, stream=True, hold=True),
    "streams-1000": Scenario("BENCH n=100000 gap=0.25", 1000, 4, stream=True, hold=True),
    "streams-4000": Scenario("BENCH n=100000 gap=1", 4000, 5, stream=True, hold=True),
    "body-20k": Scenario("BENCH n=20", 4, 2, bulk=20_000),
    "body-200k": Scenario("BENCH n=20", 4, 3, bulk=200_000),
}


def body(scenario: Scenario) -> str:
    draw = random.Random(1)
    bulk = "".join(draw.choice('abcdefghijkl mnop\n"é') for _ in range(scenario.bulk))
    messages = [{"role": "user", "content": bulk + scenario.prompt}]
    request = {"model": "bench", "messages": messages, "max_tokens": 256, "temperature": 0.7}
    return json.dumps(request | ({"stream": True} if scenario.stream else {}))


def measure(target: Target, scenario: Scenario, seconds: float) -> Run:
    order = {
        "port": target.port,
        "body": body(scenario),
        "clients": scenario.clients,
        "seconds": seconds,
        "pids": target.pids,
        "hold": scenario.hold,
        "warm_up": 2.0 if scenario.hold else 0.5,
        "cpu": 0 if sys.platform == "linux" else None,
    }
    command = [sys.executable, "-m", "benchmarks.load"]
    with tempfile.TemporaryFile() as out:  # observed: a pipe lost the end of a long result
        subprocess.run(command, input=json.dumps(order).encode(), stdout=out, check=True)
        out.seek(0)
        result: Run = json.load(out)
    return result


def cost(run: Run) -> float | None:
    """Microseconds of CPU per request; for held streams, per chunk."""
    units = run["requests"] or run["chunks"]
    return 1e6 * run["cpu"] / units if units and run["cpu"] else None


def quantile(values: Sequence[float], q: float) -> float | None:
    """``values`` in seconds, the result in milliseconds."""
    return 1000 * sorted(values)[int(q * (len(values) - 1))] if values else None


Figure = Callable[[Run], float | None]


def figures(scenario: Scenario) -> dict[str, Figure]:
    key = "delay" if scenario.hold else "first" if scenario.stream else "latency"
    return {
        "cpu us": cost,
        "p50 ms": lambda run: quantile(run[key], 0.5),
        "p99 ms": lambda run: quantile(run[key], 0.99),
        "per s": lambda run: (run["chunks"] if scenario.hold else run["requests"]) / run["elapsed"],
        "MB": lambda run: run["memory"] / 1e6 or None,
        "errors": lambda run: run["errors"],
    }


def spread(values: Sequence[float | None], form: str = "{:.3g}") -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    middle, low, high = statistics.median(known), min(known), max(known)
    return f"{form.format(middle)} [{form.format(low)}-{form.format(high)}]"


def table(name: str, runs: dict[str, list[Run]]) -> str:
    scenario = SCENARIOS[name]
    columns = figures(scenario)
    lines = [f"\n### {name}: `{scenario.prompt}`, {scenario.clients} clients\n"]
    lines.append("| target | cpu / nginx | added p50 ms | " + " | ".join(columns) + " |")
    lines.append("|---" * (len(columns) + 3) + "|")
    for target, rounds in runs.items():
        ratios = [
            ours / theirs if ours and theirs else None
            for ours, theirs in zip(map(cost, rounds), map(cost, runs.get("nginx", rounds)), strict=True)
        ]
        p50 = columns["p50 ms"]
        added = [
            ours - bare if ours is not None and bare is not None else None
            for ours, bare in zip(map(p50, rounds), map(p50, runs["direct"]), strict=True)
        ]
        shown = [spread(ratios, "{:.2f}") if "nginx" in runs else "-", spread(added, "{:+.2f}")]
        shown += [spread([figure(run) for run in rounds]) for figure in columns.values()]
        lines.append(f"| {target} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def interleaved(targets: list[Target], name: str, rounds: int) -> dict[str, list[Run]]:
    scenario = SCENARIOS[name]
    runs: dict[str, list[Run]] = {target.name: [] for target in targets}
    for number in range(rounds):
        turn = number % len(targets)
        for target in targets[turn:] + targets[:turn]:
            runs[target.name].append(measure(target, scenario, scenario.seconds))
    return runs


def soak(target: Target, minutes: float) -> str:
    """Memory and CPU cost over time, to show growth."""
    lines = [f"\n### soak of {target.name}: json-32 for {minutes:g} minutes\n", "| minute | cpu us | MB | errors |"]
    lines.append("|---" * 4 + "|")
    for minute in range(max(1, round(minutes))):
        run = measure(target, SCENARIOS["json-32"], 60 * min(1.0, minutes))
        lines.append(f"| {minute + 1} | {spread([cost(run)])} | {run['memory'] / 1e6:.1f} | {run['errors']} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenarios", default=",".join(SCENARIOS), help="default: all, %(default)s")
    parser.add_argument("--peers", default=",".join(PEERS), help="those that are installed; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--soak", type=float, default=0.0, metavar="MINUTES", help="then load the gateway alone for so long"
    )
    args = parser.parse_args()
    names = [name for name in args.scenarios.split(",") if name]
    for unknown in set(names) - set(SCENARIOS):
        parser.error(f"--scenarios: no {unknown!r}; valid: {', '.join(SCENARIOS)}")
    peers = [name for name in args.peers.split(",") if name]
    for unknown in set(peers) - set(PEERS):
        parser.error(f"--peers: no {unknown!r}; valid: {', '.join(PEERS)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # leaves the contexts, which end the started processes
    say(f"{platform.platform()}, Python {platform.python_version()}, {args.rounds} rounds")
    with tempfile.TemporaryDirectory() as folder, started(peers, Path(folder)) as targets:
        for name in names:
            say(table(name, interleaved(targets, name, args.rounds)))
        if args.soak:
            say(soak(targets[1], args.soak))


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()

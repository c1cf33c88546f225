"""How much of the conversations of several agents is found again in the prompt cache, by the size of that cache:

    uv run python -m benchmarks.prompt_cache [--agents 4 12] [--turns 6] [--tokens 5000]

Each agent continues its conversation turn by turn, with a title job between two turns, over two replicas of one
gateway. Each row is a gateway of its own with the same load: what was the default (4 GB, ten prompts), what is chosen
from the share of the memory now, and both to scale: 4 GB hold one conversation of 28 000 tokens of Qwen3-4B, and the
size in the row holds as many of these conversations.

Reusable is what a turn shares with the turn before: its prompt, and the answer. Two processors are shared by all, so
that times mean something only beside those of the other rows.
"""

import argparse
import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from backends.memory.estimate import kv_bytes
from backends.memory.share import Appetite, Claimant, capacity, divide, split
from benchmarks import real

GB = 10**9
KIB = 1024
REPLICAS = 2
ANSWER = 12  # tokens
TITLE = "Write a title of at most five words for this: "
MAC = 48 * GB
QWEN = Appetite(base=int(2.3 * GB * 1.08) + (512 << 20), sequence=8192 * 144 * KIB, token=144 * KIB)
ONE_OF_QWEN = 28_000 * 144 * KIB  # bytes: what 4 GB hold


@dataclass(slots=True)
class Found:
    """Tokens; ``first``: seconds until the first token of each turn but the first."""

    reusable: int = 0
    cached: int = 0
    first: list[float] = field(default_factory=list)
    lost: int = 0
    why: str = ""  # the first of them
    longest: int = 0
    sizes: str = ""
    seconds: float = 0.0

    @property
    def share(self) -> float:
        return self.cached / max(1, self.reusable)


def to_scale(of_qwen: int, conversation: int) -> int:
    """Bytes for the demo model that hold as many conversations as ``of_qwen`` bytes of Qwen3-4B."""
    return int(of_qwen / ONE_OF_QWEN * conversation)


def on_mac(replicas: int) -> int:
    """Bytes that are chosen for Qwen3-4B on a Mac of 48 GB where other programs hold 8 GB."""
    whole = capacity(total=MAC, available=MAC - 8 * GB, held=0, budget=None, working_set=None)
    claimants = [Claimant(f"q:{n}", "q", QWEN, resident=True) for n in range(replicas)]
    return split(divide(whole, claimants)["q:0"], QWEN).prompt_cache


LITERAL = {"default before": "{prompt-cache-bytes: 4GB, prompt-cache-size: 10}", "default now": "{}"}


def scaled(conversation: int) -> dict[str, str]:
    """``server_args`` by the name of the row. ``conversation``: bytes of one, at its end."""
    old, now = to_scale(ONE_OF_QWEN, conversation), to_scale(on_mac(REPLICAS), conversation)
    return {
        "before, to scale": f"{{prompt-cache-bytes: {old}, prompt-cache-size: 10}}",
        "now, to scale (48 GB Mac)": f"{{prompt-cache-bytes: {now}}}",
    }


async def agent(http: httpx.AsyncClient, url: str, name: int, *, order: argparse.Namespace, found: Found) -> None:
    messages = [{"role": "user", "content": real.text_of(order.tokens // 2, f"agent{name} ")}]
    grown = max(16, order.tokens // 2 // max(1, order.turns - 1))
    before = 0
    for turn in range(order.turns):
        answer = await real.ask(http, url, messages, tokens=ANSWER, model="m")
        if answer.error:
            found.lost, found.why = found.lost + 1, found.why or answer.error
            return
        if turn:
            found.reusable += before
            found.cached += min(before, answer.cached_tokens)
            found.first.append(answer.first or 0.0)
        before = answer.prompt_tokens + ANSWER
        found.longest = max(found.longest, before)
        if order.titles:
            await real.ask(http, url, TITLE + str(messages[-1]["content"])[:200], tokens=ANSWER, model="m")
        messages.append({"role": "assistant", "content": answer.text})
        messages.append({"role": "user", "content": real.text_of(grown, f"turn{turn} ")})


async def load(url: str, agents: int, order: argparse.Namespace) -> Found:
    found, began = Found(), time.perf_counter()
    async with real.client() as http:
        await asyncio.gather(*(agent(http, url, name, order=order, found=found) for name in range(agents)))
        status = (await http.get(f"{url}/api/status")).json()
    shares = [backend.get("share") for backend in status["models"]["m"]["backends"]]
    found.sizes = " ".join(f"{one['prompt_cache'] / 1e6:.0f} MB/{one['entries']}" for one in shares if one)
    found.seconds = time.perf_counter() - began
    return found


def run(model: Path, folder: Path, args: str, *, agents: int, order: argparse.Namespace) -> Found:
    config = f"memory: {{budget: {order.budget}}}\nmodels:\n  m:\n    model: {model}\n    replicas: {REPLICAS}\n"
    config += f"    resume: 'off'\n    max_queue: 200\n    queue_timeout: 10m\n    server_args: {args}\n"
    with real.gateway(config, folder) as server:
        return asyncio.run(load(server.url, agents, order))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--agents", type=int, nargs="+", default=[4, 12])
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=5000, help="of a conversation, at its end")
    parser.add_argument("--budget", default="3GiB")
    parser.add_argument("--no-titles", dest="titles", action="store_false")
    order = parser.parse_args(argv)
    print(f"{'agents':>6}  {'prompt cache':27} {'found':>6} {'first p50':>9} {'p95':>7} {'all':>7}  lost  sizes")
    with real.scratch() as folder:
        model = real.model(folder)
        token = kv_bytes(json.loads((model / "config.json").read_text()), 4096) // 4096
        for agents in order.agents:
            longest = 0
            for name, args in LITERAL.items():
                longest = max(longest, show(agents, name, run(model, folder, args, agents=agents, order=order)))
            for name, args in scaled(longest * token).items():
                show(agents, name, run(model, folder, args, agents=agents, order=order))


def show(agents: int, name: str, found: Found) -> int:
    """Prints the row. Returns the longest conversation, in tokens."""
    print(
        f"{agents:6}  {name:27} {found.share:6.1%} {real.median(found.first):7.2f} s "
        f"{real.quantile(found.first, 0.95):5.2f} s {found.seconds:5.0f} s  {found.lost:4}  {found.sizes}  {found.why}",
        flush=True,
    )
    return found.longest


if __name__ == "__main__":
    main()

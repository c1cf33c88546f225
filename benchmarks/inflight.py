"""Short prompts that come at once, with ``max_inflight: auto`` and with numbers: throughput, first tokens and gaps:
``uv run python -m benchmarks.inflight``.

The settings take turns, each with a gateway of its own that is idle meanwhile. Also: what the replica told of its
limit, and how many were in its batch at most, by the report of its process.
"""

import argparse
import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import httpx

from benchmarks import real


@dataclass(slots=True)
class Seen:
    """Of one setting, over all rounds. ``members``: of the batch; ``unread``: of them, those that are read or wait in
    the engine; ``rates``: tokens/s of each round."""

    rates: list[float] = field(default_factory=list)
    firsts: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    members: int = 0
    unread: int = 0
    lost: int = 0

    def __str__(self) -> str:
        firsts = f"{real.median(self.firsts):5.2f} p95 {real.quantile(self.firsts, 0.95):5.2f} s"
        gaps = f"{1000 * real.median(self.gaps):3.0f} p95 {1000 * real.quantile(self.gaps, 0.95):4.0f} ms"
        return (
            f"{real.median(self.rates):5.0f} tokens/s, first token p50 {firsts}, gap p50 {gaps}, {self.lost} lost, in "
            f"the engine at most {self.members}, unread {self.unread}"
        )


def backend(url: str) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{url}/api/status").json()["models"]["tiny"]["backends"][0]
    return found


@contextlib.asynccontextmanager
async def watched(url: str, seen: Seen) -> AsyncIterator[None]:
    async def watch() -> None:
        while True:
            report = (await asyncio.to_thread(backend, url))["report"] or {}
            unread = report.get("reading") or 0
            seen.members = max(seen.members, unread + (report.get("decoding") or 0))
            seen.unread = max(seen.unread, unread)
            await asyncio.sleep(0.2)

    task = asyncio.ensure_future(watch())
    try:
        yield
    finally:
        task.cancel()


async def crowd(url: str, options: argparse.Namespace, name: str) -> tuple[list[real.Answer], float]:
    """Their answers, and the seconds that all took."""
    texts = [real.text_of(options.prompt, f"{name}{i}") for i in range(options.requests)]
    async with real.client() as http:
        began = time.perf_counter()
        asked = (real.ask(http, url, text, tokens=options.tokens, model="tiny") for text in texts)
        return await asyncio.gather(*asked), time.perf_counter() - began


async def turn(url: str, options: argparse.Namespace, name: str, seen: Seen) -> None:
    async with watched(url, seen):
        answers, took = await crowd(url, options, name)
    whole = [answer for answer in answers if answer.first is not None and not answer.error]
    seen.rates.append(len(whole) * options.tokens / took)
    seen.firsts += [answer.first for answer in whole if answer.first is not None]
    seen.gaps += [gap for answer in whole for gap in answer.gaps]
    seen.lost += len(answers) - len(whole)


async def run(urls: dict[str, str], options: argparse.Namespace) -> None:
    found = {setting: Seen() for setting in urls}
    for url in urls.values():
        await crowd(url, options, "w")  # the kernels are compiled
    for number in range(options.rounds):
        for setting, url in urls.items():
            await turn(url, options, f"r{number}n", found[setting])
    for setting, url in urls.items():
        limit = backend(url)["max_inflight"]
        sys.stdout.write(f"max_inflight: {setting}: {limit['requests']}, {limit['why']}\n    {found[setting]}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument("--prompt", type=int, default=60, help="tokens, about")
    parser.add_argument("--tokens", type=int, default=100, help="of an answer")
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--setting", action="append", help="a value of max_inflight; auto and 8 by default")
    options = parser.parse_args()
    with real.scratch() as folder, contextlib.ExitStack() as gateways:
        model, urls = real.model(folder, hidden=options.hidden), {}
        for setting in options.setting or ("auto", "8"):
            config = f"models: {{tiny: {{model: {model}, resume: 'off', max_inflight: {setting}}}}}"
            urls[setting] = gateways.enter_context(real.gateway(config, folder)).url
        asyncio.run(run(urls, options))


if __name__ == "__main__":
    main()

"""What a cached conversation of 20 000 tokens costs new short prompts, and a stream beside them, with and without the
engine fixes: ``uv run python -m benchmarks.engine_fixes``. About two minutes.

mlx_lm.server as it is, a gateway with the fixes off, and one with them, in turn, on one tiny model. Short prompts come
one after the other, and then several at once beside a stream; first while no conversation is cached, then beside it.
The prompts of each round leave the conversation at another place, as those of subagents and title jobs do: below a
place that was left before, the search of the original is cut short by what has been cached there since.

The bound is one for the fixed engine: twice the time, and twice the longest gap. Exit status 1 where it is exceeded.
"""

import argparse
import asyncio
import contextlib
import json
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import httpx

from benchmarks import real
from benchmarks.real import Server

BOUND = 2.0
FLAGS = ("--prompt-cache-size", "1000", "--prompt-cache-bytes", "4GB")  # nothing is evicted meanwhile
GATEWAY = """models:
  default_model:
    model: {model}
    max_inflight: 32
    resume: "off"
    engine_fixes: {fixes}
    server_args: {{prompt-cache-size: 1000, prompt-cache-bytes: 4GB}}
"""
CACHED = "word"
GONE = 0.7  # seconds until the engine has noticed that the client of a stream left
GROUP = 4  # words by which the prompts of a round are longer than those of the round before


@dataclass(slots=True)
class Figures:
    """Seconds, one for each round. ``single``: of a prompt that comes alone; ``burst``: until all that came at once
    have their answers; ``gap``: the longest of the stream beside them meanwhile."""

    single: list[float] = field(default_factory=list)
    burst: list[float] = field(default_factory=list)
    gap: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Case:
    """``prompts``: at once; ``tokens``: of the conversation, about."""

    rounds: int
    prompts: int
    tokens: int

    async def measure(self, url: str) -> tuple[Figures, Figures]:
        """Without the conversation, and beside it."""
        async with real.client() as http:
            await self._part(http, url, "warm", Figures())
            without, beside = Figures(), Figures()
            await self._part(http, url, "before", without)
            cached = await _whole(http, url, self._conversation())
            say(f"\n{cached.prompt_tokens} tokens are cached")
            await self._part(http, url, CACHED, beside)
            return without, beside

    async def _part(self, http: httpx.AsyncClient, url: str, name: str, figures: Figures) -> None:
        for number in range(self.rounds):
            figures.single.append((await _whole(http, url, self._short(2 * number, name))).seconds)
            at_once = [f"{self._short(2 * number + 1, name)} {i}" for i in range(self.prompts)]
            async with _stream(http, url, f"{name} {number}") as times:
                began = time.perf_counter()
                await asyncio.gather(*(_whole(http, url, prompt) for prompt in at_once))
                ended = time.perf_counter()
            figures.burst.append(ended - began)
            marks = [began, *(at for at in times if began < at < ended), ended]
            figures.gap.append(max(later - sooner for sooner, later in pairwise(marks)))

    def _conversation(self) -> str:
        return text(CACHED, self.tokens // 6)

    def _short(self, number: int, name: str) -> str:
        return f"{text(name, GROUP * (number + 1))} and"


def text(name: str, words: int) -> str:
    """Those of one name begin with the same words."""
    return " ".join(f"{name}{i}" for i in range(words))


async def _whole(http: httpx.AsyncClient, url: str, prompt: str) -> real.Answer:
    """Raises RuntimeError for one that is not whole."""
    answer = await real.ask(http, url, prompt)
    if answer.error:
        raise RuntimeError(answer.error)
    return answer


@contextlib.asynccontextmanager
async def _stream(http: httpx.AsyncClient, url: str, prompt: str) -> AsyncIterator[list[float]]:
    """Times at which the pieces of an endless answer come; there are some already."""
    body = {"model": "default_model", "messages": [{"role": "user", "content": f"stream {prompt}"}], "temperature": 0}
    body |= {"stream": True, "max_tokens": 100_000, "logit_bias": real.NEVER_ENDS}
    times: list[float] = []
    running = asyncio.Event()

    async def read() -> None:
        async with http.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
            async for line in response.aiter_lines():
                if line.startswith("data: {") and json.loads(line[6:]).get("choices"):
                    times.append(time.perf_counter())
                if len(times) >= 20:
                    running.set()

    reader = asyncio.create_task(read())
    await running.wait()
    yield times
    reader.cancel()
    await asyncio.gather(reader, return_exceptions=True)
    await asyncio.sleep(GONE)


def report(name: str, without: Figures, beside: Figures) -> bool:
    """Prints medians; whether all are within the bound."""
    ratios = []
    for what in ("single", "burst", "gap"):
        first, second = (real.median(getattr(figures, what)) for figures in (without, beside))
        ratios.append(second / first)
        say(f"{name:20} {what:7} {1e3 * first:7.1f} ms without, {1e3 * second:7.1f} ms beside: {ratios[-1]:6.2f}-fold")
    return max(ratios) <= BOUND


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


Start = Callable[[], contextlib.AbstractContextManager[Server]]


def servers(model: Path, folder: Path) -> dict[str, Start]:
    def gateway(fixes: str) -> Start:
        return lambda: real.gateway(GATEWAY.format(model=model, fixes=fixes), folder)

    return {
        "mlx_lm.server": lambda: real.raw(model, folder, *FLAGS),
        "gateway, fixes off": gateway('"off"'),
        "gateway": gateway("auto"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=4, help="at once; the server lets five connections wait")
    parser.add_argument("--tokens", type=int, default=20_000)
    args = parser.parse_args()
    case = Case(args.rounds, args.prompts, args.tokens)
    with real.scratch() as folder:
        within = {}
        for name, start in servers(real.model(folder), folder).items():
            with start() as server:
                within[name] = report(name, *asyncio.run(case.measure(server.url)))
    sys.exit(0 if within["gateway"] else 1)


if __name__ == "__main__":
    main()

"""A flood of requests that nobody waits for, and some people: ``uv run python -m benchmarks.flood``.

Each person asks a question, reads for a moment, and asks the next; their first tokens are measured. Then the same with
a flood of background requests: through a gateway that is told so (``x-priority: background``), through one that is told
nothing, and to raw servers. The people's p95 with the flood is to be at most 1.2 times that without it. Rounds without
and with it alternate, so that changes in the machine's speed affect both.

Where the replicas share few processors, any request slows all of them down. What that alone does is shown by raw
servers of which the first has the people to itself, while the second gets one background request after the other.
"""

import argparse
import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import httpx

from benchmarks import real

SETTLED = 2.0  # seconds until a flood is in full flow, and until the servers have noticed that its clients have left


@dataclass
class Figures:
    """``firsts``: seconds; ``done``, ``refused``: background requests."""

    firsts: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    done: int = 0
    refused: int = 0


@dataclass
class Load:
    """``people`` and ``crowd``: addresses for the people and for the flood, used in turn; ``headers``: of background
    requests; ``flood``: how many there are at a time."""

    args: argparse.Namespace
    people: Sequence[str]
    crowd: Sequence[str]
    headers: Mapping[str, str]
    flood: int
    asked: int = 0

    async def ask(
        self,
        http: httpx.AsyncClient,
        urls: Sequence[str],
        prompt: int,
        answer: int,
        *,
        headers: Mapping[str, str] = MappingProxyType({}),
    ) -> real.Answer:
        self.asked += 1
        text, url = real.text_of(prompt, f"n{self.asked}x"), urls[self.asked % len(urls)]
        return await real.ask(http, url, text, tokens=answer, headers=headers)

    async def person(self, http: httpx.AsyncClient, figures: Figures) -> None:
        loop = asyncio.get_running_loop()
        until = loop.time() + self.args.seconds
        while loop.time() < until:
            answer = await self.ask(http, self.people, self.args.question, self.args.answer)
            if answer.error or answer.first is None:
                figures.errors.append(answer.error)
            else:
                figures.firsts.append(answer.first)
            await asyncio.sleep(self.args.reads)

    async def background(self, http: httpx.AsyncClient, figures: Figures) -> None:
        while True:
            answer = await self.ask(http, self.crowd, self.args.prompt, self.args.text, headers=self.headers)
            figures.done += not answer.error
            figures.refused += bool(answer.error)
            if answer.error:
                await asyncio.sleep(1.0)

    @contextlib.asynccontextmanager
    async def flooded(self, http: httpx.AsyncClient, figures: Figures) -> AsyncIterator[None]:
        tasks = [asyncio.ensure_future(self.background(http, figures)) for _ in range(self.flood)]
        try:
            await asyncio.sleep(SETTLED)
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.sleep(SETTLED)

    async def round(self, figures: Figures, *, flooded: bool) -> None:
        async with real.client() as http, self.flooded(http, figures) if flooded else contextlib.nullcontext():
            await asyncio.gather(*(self.person(http, figures) for _ in range(self.args.people)))


def compare(what: str, load: Load) -> None:
    calm, flooded = Figures(), Figures()
    for _ in range(load.args.rounds):
        asyncio.run(load.round(calm, flooded=False))
        asyncio.run(load.round(flooded, flooded=True))
    both = (calm, flooded)
    p50 = [real.median(figures.firsts) for figures in both]
    p95 = [real.quantile(figures.firsts, 0.95) for figures in both]
    rate = flooded.done * 60 / (load.args.rounds * (load.args.seconds + SETTLED))
    sys.stdout.write(
        f"{what:20} first token p50 {p50[0]:.3f} -> {p50[1]:.3f} s, p95 {p95[0]:.3f} -> {p95[1]:.3f} s "
        f"(x {p95[1] / p95[0]:.2f}); answers {len(calm.firsts)} / {len(flooded.firsts)}, "
        f"background {rate:.0f}/min, refused {flooded.refused}, errors {calm.errors + flooded.errors}\n"
    )
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--people", type=int, default=3)
    parser.add_argument("--question", type=int, default=500, help="tokens of a person's prompt")
    parser.add_argument("--answer", type=int, default=24, help="tokens of the answer to it")
    parser.add_argument("--reads", type=float, default=2.0, help="seconds until the next question")
    parser.add_argument("--flood", type=int, default=50, help="background requests at a time")
    parser.add_argument("--prompt", type=int, default=300, help="tokens of a background request")
    parser.add_argument("--text", type=int, default=64, help="tokens of the answer to it")
    parser.add_argument("--seconds", type=float, default=30.0, help="of one round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--controls", type=int, default=2, help="0 = only the gateway with classes, 1 = one more")
    args = parser.parse_args()
    with real.scratch() as folder:
        model = real.model(folder)
        config = (
            f"models:\n  default_model: {{model: {model}, replicas: {args.replicas}, resume: 'off', "
            "queue_timeout: 600s, server_args: {prompt-cache-bytes: 64MB, max-tokens: 256}}\n"
        )
        with real.gateway(config, folder) as server:
            url = [server.url]
            compare("gateway, classes", Load(args, url, url, {"x-priority": "background"}, args.flood))
            if args.controls > 1:
                compare("gateway, one class", Load(args, url, url, {}, args.flood))
        if args.controls:
            with contextlib.ExitStack() as stack:
                urls = [stack.enter_context(real.raw(model, folder)).url for _ in range(args.replicas)]
                compare("raw, apart", Load(args, urls[:1], urls[-1:], {}, 1))
                if args.controls > 1:
                    compare("raw servers", Load(args, urls, urls, {}, args.flood))


if __name__ == "__main__":
    main()

"""One long prompt beside people who ask short things, on one replica: ``uv run python -m benchmarks.long_prompt``.

A raw mlx_lm.server and a gateway with one replica of the same model, in turn, both with a cold prompt. Each person
sends the next short request when the last is answered, until the long prompt has its first token. Prints seconds to the
first token, and whether the gateway keeps its bounds: the long prompt at most 1.5 times the raw server's alone with 1
and 3 people and 2 times with 10, the worst short request at most a third of the raw server's.
"""

import asyncio
import time
from dataclasses import dataclass, field

import httpx

from benchmarks import real

TOKENS = 7500  # of the long prompt
PAUSE = 0.05  # seconds from an answer to the next question of the same person
HEAD_START = 0.1  # seconds that the long prompt comes before the people
CROWDS = (1, 3, 10)
BOUNDS = {1: 1.5, 3: 1.5, 10: 2.0}  # times alone
WORST = 1 / 3  # of the raw server's worst short request


@dataclass(slots=True)
class Figures:
    """Seconds to the first token. ``long``, ``short``: by the number of people; ``lost``: requests without an answer,
    and what they were told."""

    alone: list[float] = field(default_factory=list)
    long: dict[int, list[float]] = field(default_factory=dict)
    short: dict[int, list[float]] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)


class Load:
    """``short_url``: of the server that the people ask, if it is another. ``every``: seconds from one question of a
    person to the next, at least: so that a server that answers sooner is not asked more."""

    def __init__(
        self, http: httpx.AsyncClient, url: str, model: str, name: str, *, short_url: str = "", every: float = 0.0
    ) -> None:
        self.figures = Figures()
        self._http, self._url, self._model = http, url, model
        self._short_url = short_url or url
        self._every = every
        self._name = name
        self._turn = 0

    async def _ask(self, url: str, text: str) -> float | None:
        answer = await real.ask(self._http, url, text, model=self._model)
        if answer.error:
            self.figures.lost.append(answer.error)
        return answer.first

    async def long(self) -> float:
        """Of a prompt that was never seen."""
        self._turn += 1
        return await self._ask(self._url, f"{self._name} {self._turn}: {real.text_of(TOKENS)}") or float("nan")

    async def alone(self) -> None:
        self.figures.alone.append(await self.long())

    async def beside(self, people: int) -> None:
        long = asyncio.create_task(self.long())
        await asyncio.sleep(HEAD_START)
        await asyncio.gather(*(self._person(name, people, long) for name in range(people)))
        self.figures.long.setdefault(people, []).append(await long)

    async def _person(self, name: int, people: int, long: "asyncio.Task[float]") -> None:
        turn = 0
        while not long.done():
            began, text = time.monotonic(), f"{name} {turn} {people} {self._turn} of {self._name}: a short one"
            first = await self._ask(self._short_url, text)
            if first is not None:
                self.figures.short.setdefault(people, []).append(first)
            turn += 1
            await asyncio.sleep(max(PAUSE, self._every - (time.monotonic() - began)))


async def measured(servers: dict[str, tuple[str, str]], rounds: int) -> dict[str, Figures]:
    """``servers``: name -> URL, model."""
    async with real.client() as http:
        loads = {name: Load(http, url, model, name) for name, (url, model) in servers.items()}
        for load in loads.values():
            await load.long()  # what the first prompt of a process pays, and the rate that the gateway learns
        for _ in range(rounds):
            for load in loads.values():
                await load.alone()
            for people in CROWDS:
                for load in loads.values():
                    await load.beside(people)
    return {name: load.figures for name, load in loads.items()}


def report(figures: dict[str, Figures]) -> list[str]:
    raw, ours = figures["raw"], figures["gateway"]
    alone = real.median(raw.alone)
    lines = [f"long prompt alone: raw {alone:.2f} s, gateway {real.median(ours.alone) / alone:.2f} x"]
    for people in CROWDS:
        parts = []
        for name, one in figures.items():
            short = one.short.get(people, [])
            middle, worst = real.median(short), max(short, default=float("nan"))
            times = real.median(one.long[people]) / alone
            parts.append(f"{name}: long {times:.2f} x alone, {len(short)} short, p50 {middle:.2f}, worst {worst:.2f} s")
        kept = real.median(ours.long[people]) <= BOUNDS[people] * alone
        share = max(ours.short.get(people, [0.0])) / max(raw.short.get(people, [0.0]))
        parts.append(f"worst / raw's {share:.2f}")
        parts.append("within bounds" if kept and share <= WORST else "OUT OF BOUNDS")
        lines.append(f"{people:2d} people: " + "; ".join(parts))
    return lines + [f"{name} lost: {why}" for name, one in figures.items() for why in one.lost]


def main() -> None:
    args = real.arguments(__doc__)
    with real.scratch() as folder:
        path = args.model or real.model(folder)
        config = f"models: {{tiny: {{model: {path}, resume: 'off', max_inflight: 16}}}}"
        with real.raw(path, folder) as raw, real.gateway(config, folder) as gateway:
            servers = {"raw": (raw.url, "default_model"), "gateway": (gateway.url, "tiny")}
            print("\n".join(report(asyncio.run(measured(servers, args.rounds)))))


if __name__ == "__main__":
    main()

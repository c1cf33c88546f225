"""Agents with long conversations over two replicas: ``uv run python -m benchmarks.agents``.

Each agent sends its turns one after the other. All begin with the same instructions, as agents of one program do; the
first turn comes with a job for a title beside it; after two of the turns a subagent with other instructions works for
two turns of its own. All of them send the session of the agent. The same trace runs through a gateway that chooses the
replica, through one where each agent is pinned by hand to a replica, and on raw servers, to which the agents are pinned
likewise. Rounds alternate, so that changes in the machine's speed affect all.

Reusable are the tokens of the last prompt of the same conversation. 95 % of them are to be found in the prompt cache,
and the first tokens (p95) are to come within 1.15 times the time that they take with agents that are pinned.
"""

import argparse
import asyncio
import contextlib
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import httpx

from benchmarks import real

Message = dict[str, str]
NAMES: dict[str, str] = {}  # of texts, to short ones, which keep their words to a few tokens
INSTRUCTIONS, TASK, MORE = 2500, 2000, 120  # tokens: of all agents, of one agent, of each further turn
SUB_INSTRUCTIONS, SUB_TASK = 900, 500
SUBAGENTS_AFTER = (2, 4)  # turns
ANSWER = 16
WARM_UP = 6  # prompts
THINKS = 0.3  # seconds between an answer and the next turn


def _text(tokens: int, name: str) -> str:
    return real.text_of(tokens, NAMES.setdefault(name, f"{len(NAMES):x}z"))


@dataclass
class Figures:
    firsts: list[float] = field(default_factory=list)
    longest: int = 0  # tokens of a prompt
    reusable: int = 0
    reused: int = 0
    errors: list[str] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)  # answers that found less than 90 % of what they could
    backends: dict[str, int] = field(default_factory=dict)

    def add(self, answer: real.Answer, reusable: int, what: str) -> None:
        if answer.error or answer.first is None:
            self.errors.append(answer.error)
            return
        self.firsts.append(answer.first)
        self.longest = max(self.longest, answer.prompt_tokens)
        self.reusable += reusable
        self.reused += min(reusable, answer.cached_tokens)
        if answer.cached_tokens < 0.9 * reusable:
            self.missed.append(f"{what}: {answer.cached_tokens} of {reusable}")
        backend = answer.headers.get("x-gateway-backend", "")
        self.backends[backend] = self.backends.get(backend, 0) + 1


@dataclass(frozen=True)
class Target:
    """``place``: (url, model) of an agent, by its number."""

    name: str
    place: Callable[[int], tuple[str, str]]
    figures: Figures = field(default_factory=Figures)


@dataclass(frozen=True)
class Agent:
    target: Target
    number: int
    name: str  # of its round, too: nothing of an earlier one is cached
    http: httpx.AsyncClient
    turns: int

    async def ask(self, messages: Sequence[Message], reusable: int) -> real.Answer:
        url, model = self.target.place(self.number)
        session = {"x-session-id": f"{self.name}-{self.number}"}
        answer = await real.ask(self.http, url, messages, tokens=ANSWER, model=model, headers=session)
        what = f"agent {self.number}, {len(messages)} messages, on {answer.headers.get('x-gateway-backend', '?')}"
        self.target.figures.add(answer, reusable, what)
        return answer

    async def converse(self, messages: list[Message], turns: int, *, subagents: bool = False) -> None:
        reusable = 0
        for turn in range(1, turns + 1):
            answer = await self.ask(messages, reusable)
            reusable = answer.prompt_tokens
            more = _text(MORE, f"{self.name}more{self.number}t{turn}s{len(messages)}")
            messages += [{"role": "assistant", "content": answer.text}, {"role": "user", "content": more}]
            await asyncio.sleep(THINKS)
            if subagents and turn in SUBAGENTS_AFTER:
                await self.converse(self._begin("sub", SUB_INSTRUCTIONS, SUB_TASK, turn), 2)

    def _begin(self, kind: str, instructions: int, task: int, turn: int = 0) -> list[Message]:
        return [
            {"role": "system", "content": _text(instructions, f"{self.name}{kind}")},
            {"role": "user", "content": _text(task, f"{self.name}{kind}{self.number}t{turn}")},
        ]

    async def run(self) -> None:
        title = [
            {"role": "system", "content": "Write a title."},
            {"role": "user", "content": f"{self.name}{self.number}"},
        ]
        main = self._begin("main", INSTRUCTIONS, TASK)
        await asyncio.sleep(random.Random(f"{self.name}{self.number}").random())
        await asyncio.gather(self.ask(title, 0), self.converse(main, self.turns, subagents=True))


async def _round(target: Target, name: str, args: argparse.Namespace) -> None:
    async with real.client() as http:
        agents = [Agent(target, number, name, http, args.turns) for number in range(args.agents)]
        await asyncio.gather(*(agent.run() for agent in agents))


async def _warm_up(target: Target) -> None:
    """Each replica has read a prompt or two: the gateway knows how long that takes."""
    async with real.client() as http:
        for number in range(WARM_UP):
            url, model = target.place(number)
            await real.ask(http, url, _text(TASK, f"warm{target.name}{number}"), model=model)


def _report(target: Target, ideal: Target) -> None:
    mine, theirs = target.figures, ideal.figures
    p50, p95 = real.median(mine.firsts), real.quantile(mine.firsts, 0.95)
    ratio = p95 / real.quantile(theirs.firsts, 0.95)
    sys.stdout.write(
        f"{target.name:18} reusable tokens cached {mine.reused / max(1, mine.reusable):.1%}, "
        f"first token p50 {p50:.3f} s, p95 {p95:.3f} s (x {ratio:.2f} of {ideal.name}); "
        f"prompts of up to {mine.longest} tokens, {len(mine.firsts)} answers by {mine.backends}, "
        f"errors {mine.errors}, missed {mine.missed}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--agents", type=int, default=4)
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cache", default="64MB", help="prompt-cache-bytes of each replica")
    parser.add_argument("--raw", type=int, default=1, help="0 = no raw servers")
    parser.add_argument("--model-keys", default="", help="more keys of the models, as in 'instrument: off'")
    args = parser.parse_args()
    with real.scratch() as folder, contextlib.ExitStack() as stack:
        model = real.model(folder)
        more = f", {args.model_keys}" if args.model_keys else ""
        cache = f"server_args: {{prompt-cache-bytes: {args.cache}}}"
        one = f"model: {model}, resume: 'off', queue_timeout: 600s, {cache}{more}"
        config = f"models:\n  two: {{replicas: 2, {one}}}\n  a: {{{one}}}\n  b: {{{one}}}\n"
        gateway = stack.enter_context(real.gateway(config, folder)).url
        flags = ("--prompt-cache-bytes", args.cache)
        raw = [stack.enter_context(real.raw(model, folder, *flags)).url for _ in range(2 if args.raw else 0)]
        targets = [
            Target("gateway", lambda _: (gateway, "two")),
            Target("gateway, pinned", lambda number: (gateway, "ab"[number % 2])),
        ]
        if raw:
            targets.append(Target("raw, pinned", lambda number: (raw[number % 2], "default_model")))
        for target in targets:
            asyncio.run(_warm_up(target))
        for turn in range(args.rounds):
            for target in targets[turn % len(targets) :] + targets[: turn % len(targets)]:
                asyncio.run(_round(target, f"r{turn}", args))
        for target in targets:
            _report(target, targets[-1])
        if args.raw:
            _report(targets[0], targets[1])


if __name__ == "__main__":
    main()

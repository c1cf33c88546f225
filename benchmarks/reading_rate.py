"""The predicted and the real time to read a prompt: ``uv run python -m benchmarks.reading_rate``.

Prompts of 500 to about 20 000 tokens, one at a time, straight to a replica that a gateway has launched, so that none is
read in slices; and one that is sent after each third of it, so that the rest is cached. Each is predicted twice: from
the prompts of less than 1000 tokens and the model's ``config.json``, and from all. Prints predicted / real.
"""

import asyncio
import json
import random
from pathlib import Path

import httpx

from backends.admission.reading_rate import ReadingRate
from backends.memory.estimate import doubled
from benchmarks import real

SIZES = (520, 600, 700, 800, 950, 1500, 2500, 4000, 6500, 10_000, 14_000, 18_000)  # tokens, about
SMALL = 1000  # tokens
GROWN = 9000  # tokens, about, of the prompt that is sent after each third

Sample = tuple[int, int, float]  # tokens, those of them that were cached, seconds


async def sample(http: httpx.AsyncClient, url: str, text: str) -> Sample:
    """Raises RuntimeError."""
    answer = await real.ask(http, url, text, tokens=1)
    if answer.first is None:
        raise RuntimeError(answer.error)
    return answer.prompt_tokens, answer.cached_tokens, answer.first


async def measured(gateway: str, rounds: int) -> list[Sample]:
    async with real.client() as http:
        (model,) = (await http.get(f"{gateway}/api/status")).json()["models"].values()
        url = model["backends"][0]["url"]
        await sample(http, url, real.text_of(2000))  # what the first prompt of a process pays
        samples: list[Sample] = []
        for turn in range(rounds):
            texts = [f"{turn} {size}: {real.text_of(size)}" for size in random.sample(SIZES, len(SIZES))]
            grown = f"{turn} grown: {real.text_of(GROWN)}"
            texts += [grown[: part * len(grown) // 3] for part in (1, 2, 3)]
            samples += [await sample(http, url, text) for text in texts]
        return samples


def learned(samples: list[Sample], model: Path) -> ReadingRate:
    rate = ReadingRate()
    rate.assume(doubled(json.loads((model / "config.json").read_bytes())))
    for one in samples:
        rate.note(*one)
    return rate


def report(samples: list[Sample], model: Path) -> list[str]:
    small, whole = learned([one for one in samples if one[0] < SMALL], model), learned(samples, model)
    lines = ["tokens  cached  seconds  from small  from all"]
    for tokens, cached, seconds in sorted(samples):
        times = (rate.seconds(tokens, cached) / seconds for rate in (small, whole))
        lines.append(f"{tokens:6d}  {cached:6d}  {seconds:7.2f}  " + "  ".join(f"{one:9.2f}" for one in times))
    return lines


def main() -> None:
    args = real.arguments(__doc__)
    with real.scratch() as folder:
        path = args.model or real.model(folder)
        with real.gateway(f"models: {{tiny: {{model: {path}, resume: 'off'}}}}", folder) as gateway:
            samples = asyncio.run(measured(gateway.url, args.rounds))
        print("\n".join(report(samples, path)))


if __name__ == "__main__":
    main()

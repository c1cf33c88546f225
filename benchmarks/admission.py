"""Prompts that fit one by one and not together, with people decoding, under an address-space limit:
``uv run python -m benchmarks.admission`` (Linux).

The limit is set on the process of mlx_lm.server once it is ready: what it has then, the room of its batch as the config
gives it, the freed buffers that it may keep, a stack for each thread that answers a request (the server starts one for
each; they count as address space), and a margin. With ``admission: auto`` nobody may fail, and nothing else
bounds the batch (``max_inflight: auto``); with ``off`` the process runs out of memory.
"""

import argparse
import asyncio
import resource
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks import real

MIB = 1 << 20
PROMPT_CACHE = 16 * MIB
IDLE = 130 * MIB  # of the process, without a batch
STACK = 8 * MIB  # of a thread
CONFIG = """
models:
  demo:
    model: {model}
    memory: {memory}
    admission: {admission}
    max_inflight: {inflight}
    queue_timeout: 10m
    env: {{MALLOC_ARENA_MAX: "1"}}
    server_args: {{prompt-cache-bytes: {cache}, prefill-step-size: 256}}
"""


def limit(pid: int, more: int) -> None:
    size = psutil.Process(pid).memory_info().vms + more
    resource.prlimit(pid, resource.RLIMIT_AS, (size, size))


def backend(url: str) -> dict[str, Any]:
    """As ``/api/status`` shows it, once its share rests on what the process has told."""
    found: dict[str, Any] = {}
    for _ in range(100):
        found = httpx.get(f"{url}/api/status").json()["models"]["demo"]["backends"][0]
        if found["share"] and found["share"]["source"] == "measured":
            return found
        time.sleep(0.2)
    raise RuntimeError(f"the process has told nothing of its memory: {found}")


async def crowd(url: str, *, prompts: int, people: int, tokens: int) -> tuple[list[real.Answer], list[real.Answer]]:
    async with real.client() as http:
        others = [
            asyncio.ensure_future(real.ask(http, url, f"person {i}", tokens=300, model="demo")) for i in range(people)
        ]
        await asyncio.sleep(1.0)
        texts = [real.text_of(tokens, f"n{i}") for i in range(prompts)]
        longs = await asyncio.gather(*(real.ask(http, url, text, tokens=20, model="demo") for text in texts))
        return longs, await asyncio.gather(*others)


def run(admission: str, folder: Path, options: argparse.Namespace) -> None:
    model = real.model(folder, hidden=options.hidden, layers=8)
    memory = IDLE + PROMPT_CACHE + options.room * MIB
    inflight = "auto" if admission == "auto" else 32
    config = CONFIG.format(model=model, memory=memory, admission=admission, inflight=inflight, cache=PROMPT_CACHE)
    with real.gateway(config, folder) as server:
        seen = backend(server.url)
        share = seen["share"]
        stacks = (options.prompts + options.people) * STACK
        limit(seen["pid"], share["total"] - share["base"] + share["pool"] + stacks + options.margin * MIB)
        began = time.monotonic()
        longs, people = asyncio.run(
            crowd(server.url, prompts=options.prompts, people=options.people, tokens=options.tokens)
        )
        after = httpx.get(f"{server.url}/api/status").json()["models"]["demo"]["backends"][0]
        failed = [answer.error for answer in (*longs, *people) if answer.error]
        waits = sorted({answer.headers.get("x-gateway-queue", "") for answer in longs} - {""})
        sys.stdout.write(
            f"admission: {admission}: {len(longs) + len(people) - len(failed)} of {len(longs) + len(people)} whole, "
            f"{after['restarts']} restarts, {time.monotonic() - began:.0f} s, {share['batch'] // MIB} MiB for "
            f"the batch, {(after['report'] or {}).get('peak', 0) // MIB} at the peak, prompts of "
            f"{max(answer.prompt_tokens for answer in longs)} tokens\n"
        )
        for line in (*failed[:3], *waits[:3], str(after.get("last_failure") or "")):
            sys.stdout.write(f"    {line}\n" if line else "")
        sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--people", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=3000)
    parser.add_argument("--room", type=int, default=400, help="MiB for the batch")
    parser.add_argument("--margin", type=int, default=100, help="MiB beyond what is counted")
    parser.add_argument("--admission", choices=("auto", "off"), action="append")
    options = parser.parse_args()
    with real.scratch() as folder:
        for admission in options.admission or ("auto", "off"):
            run(admission, folder, options)


if __name__ == "__main__":
    main()

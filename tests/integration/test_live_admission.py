"""Who shares a batch by memory, with a real server. Its memory leaves room for one of the prompts, not for two."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from backends.admission.batch import Member, peak
from backends.memory import safetensors
from backends.memory.estimate import Estimate, Flags, estimate
from tests.integration.harness import launched
from tests.integration.wire import chat, whole

pytestmark = pytest.mark.slow

PROMPTS = 4
PROMPT, ANSWER = 900, 8  # tokens, about
CONTEXT = 1024  # tokens: one request of it fits
PROMPT_CACHE = 8 << 20  # bytes


def files(model: Path) -> Estimate:
    """Without the instrument, a replica goes by them alone."""
    config = json.loads((model / "config.json").read_bytes())
    return estimate(config, safetensors.size_of(model), max_context=CONTEXT, flags=Flags(fused=False))


def test_prompts_that_fit_one_by_one_are_answered_one_after_the_other(tiny_model: Path, tmp_path: Path) -> None:
    cost, one = files(tiny_model).batch, Member(PROMPT, ANSWER)
    assert cost is not None
    room = peak(cost, [one]) * 3 // 2
    assert peak(cost, [one, one]) > room
    model = {
        "model": str(tiny_model),
        "memory": files(tiny_model).base + PROMPT_CACHE + room,
        "max_context": CONTEXT,
        "instrument": "off",
        "resume": "off",
        "server_args": {"prompt-cache-bytes": PROMPT_CACHE},
    }
    bodies = [chat(f"{number} " + "word " * (PROMPT // 2 - 8), max_tokens=ANSWER) for number in range(PROMPTS)]
    with launched({"models": {"tiny": model}}, tmp_path) as gateway, ThreadPoolExecutor(PROMPTS) as pool:
        answers = list(pool.map(gateway.ask, bodies))
    assert all(map(whole, answers))
    waits = [answer.headers.get("x-gateway-queue", "") for answer in answers]
    assert sum("waiting for memory" in wait and "the batch of 2 would need" in wait for wait in waits) == PROMPTS - 1

"""A prompt that is too much for the memory of each of two replicas, beside six that are not: it is told once it has
failed alone, and what it has taught refuses the next one. On the real mlx_lm.server, on Linux.

    pytest -m slow tests/long/test_memory_of_two.py        half a minute
"""

import sys
from pathlib import Path

import pytest

from tests.conftest import Launch
from tests.integration.harness import QUICK_RESTART
from tests.integration.limits import MemoryLimit, tokens_of
from tests.integration.test_live_blame import (
    BYSTANDERS,
    assert_refused,
    assert_told,
    await_proof,
    deaths,
    lives,
    together,
)
from tests.integration.wire import chat, whole

ROOM = 200 << 20  # bytes

pytestmark = pytest.mark.slow


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are of Linux")
def test_real_servers_with_too_little_memory(launch: Launch, tiny_model: Path, tmp_path: Path) -> None:
    """``max_context`` is beyond what the model was trained for: it is memory that is to be too little."""
    memory = MemoryLimit(tmp_path / "limit")
    model = {"model": str(tiny_model), "replicas": 2, "restart": QUICK_RESTART, "max_context": 50_000}
    real = launch({"models": {"tiny": {**model, "env": memory.env}}})
    await_proof(real)
    culprit = chat("the river and the lamp " * 6000, max_tokens=5)
    counted = tokens_of(tiny_model, culprit) - tokens_of(tiny_model, chat("hello"))
    counted += real.ask(chat("hello", max_tokens=1)).body["usage"]["prompt_tokens"]
    memory.apply(real, ["tiny:0", "tiny:1"], ROOM)
    bystanders = [chat(f"number {i}", max_tokens=2000, stream=i % 2 == 0) for i in range(BYSTANDERS)]
    before = lives(real)
    answer, answers = together(real, culprit, bystanders)
    assert_told(answer)
    assert all(whole(one) for one in answers)
    real.await_health()
    assert deaths(before, lives(real)) == 2, "one with company, one alone"
    assert_refused(real, culprit)
    longer = chat("the river and the lamp " * 7000, max_tokens=5)
    assert_refused(real, longer)
    told = real.http.get("/api/quarantine").json()
    assert told["ceilings"]["tiny"]["tokens"] == counted
    assert told["ceilings"]["tiny"]["tokens"] > told["ceilings"]["tiny"]["largest_answered"] > 0
    assert whole(real.ask(chat("hello", max_tokens=5)))

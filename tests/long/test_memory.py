"""Freed buffers are released before a model is unloaded, with real servers:

    uv run pytest -s tests/long/test_memory.py

A first gateway shows what the load leaves in the process; the budget of the second one lies between what the other
model can have with these buffers and without.
"""

import sys
import threading
import time
from pathlib import Path

from gateway.cli.demo_model.model import make_tiny_model
from tests.integration.harness import Gateway, launched, wait_until
from tests.integration.wire import Json, chat, whole

MIB = 1 << 20
MEASURED = 2.5  # seconds; a footprint is measured each second
TAKES = 64  # MiB, as configured; less than what they take, so that the footprint counts


def say(text: str) -> None:
    sys.stdout.write(f"\n{text}")


def config(folder: Path, budget: int) -> Json:
    models = {
        name: {"model": str(folder / name), "load": "on_demand", "resume": "off", "admission": "off"} for name in "ab"
    }
    return {"memory": {"budget": budget}, "defaults": {"memory": f"{TAKES}MiB"}, "models": models}


def status(gateway: Gateway) -> Json:
    found: Json = gateway.http.get("/api/status").json()["models"]["a"]["backends"][0]
    return found


def crowd(gateway: Gateway) -> tuple[int, int]:
    """Bytes that the process of ``a`` holds after it, and of these in freed buffers."""
    assert whole(gateway.ask(chat("hello", "a", max_tokens=4)))
    bodies = [chat(f"w{n} " * 600, "a", max_tokens=40) for n in range(6)]
    threads = [threading.Thread(target=gateway.ask, args=(body,)) for body in bodies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wait_until(lambda: (seen := status(gateway)["report"]) and not (seen["reading"] or seen["decoding"]))
    return settled(gateway)


def settled(gateway: Gateway) -> tuple[int, int]:
    """Once the footprint has been measured again, and before an idle pool is released."""
    time.sleep(MEASURED)
    found = status(gateway)
    return found["memory"], found["report"]["pooled"]


def test_a_pool_is_released_and_the_model_stays(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "a", hidden=128, layers=4)
    make_tiny_model(tmp_path / "b")
    with launched(config(tmp_path, 4 << 30), tmp_path / "first", ready=False) as gateway:
        gateway.await_health()
        held, pooled = crowd(gateway)
    say(f"first: holds {held // MIB} MiB, of it {pooled // MIB} in freed buffers")
    budget = held - pooled // 2 + TAKES * MIB
    with launched(config(tmp_path, budget), tmp_path / "second", ready=False) as gateway:
        gateway.await_health()
        held, pooled = crowd(gateway)
        say(f"second: holds {held // MIB} MiB, of it {pooled // MIB} in freed buffers; the budget is {budget // MIB}")
        pid = gateway.backend("a:0")["pid"]
        assert whole(gateway.ask(chat("hello", "b", max_tokens=4)))
        say(f"then: holds {status(gateway)['memory'] // MIB} MiB; a:0 is {gateway.backend('a:0')['state']}")
        say("\n".join(line for line in gateway.log.splitlines() if "released" in line or "evicted" in line))
        assert gateway.backend("a:0")["pid"] == pid
        assert "memory released" in gateway.log

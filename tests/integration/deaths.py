"""Ways for a real mlx_lm.server to die, and how long its gateway takes to have it back."""

import os
import re
import resource
import sys
import time
from contextlib import suppress
from datetime import datetime
from signal import SIGCONT, SIGKILL, SIGSTOP
from typing import NamedTuple

import httpx
import psutil

from tests.integration.harness import Gateway, alive, wait_until
from tests.integration.wire import chat

KILLER = {"prompt": "a", "max_tokens": 4, "stop": [1]}  # a number among the stop words ends the generation thread
ROOM = 8 << 20  # bytes of address space beyond what the process has
LONG_PROMPT = "the river and the lamp " * 3000
LOOK = 0.005  # seconds between two looks whether a process is gone

_CHANGE = re.compile(
    r"^(?P<when>\S+ \S+) \w+ +backend backend=(?P<name>\S+) state=(?P<state>\w+) was=\w+ generation=(?P<life>\d+)",
    re.MULTILINE,
)


class Death(NamedTuple):
    """``cause``: as the gateway found it. Seconds: ``found``, until the process was gone; ``wait``, from then to the
    launch of the next one; ``load``, from there until that serves."""

    kind: str
    cause: str
    found: float
    wait: float
    load: float


def kill(gateway: Gateway, name: str) -> None:
    gateway.signal_backend(name, SIGKILL)


def wedge(gateway: Gateway, name: str) -> None:
    """Past the gateway, which would refuse it. It is answered with 404, or not at all where the gateway was quicker to
    end the process."""
    with suppress(httpx.HTTPError), httpx.Client(base_url=gateway.backend_url(name), timeout=30) as direct:
        assert direct.post("/v1/completions", json=KILLER).status_code == 404


def run_out_of_memory(gateway: Gateway, name: str) -> None:
    """Past the gateway, which would refuse the prompt after the first time."""
    assert sys.platform == "linux"
    pid = int(gateway.backend(name)["pid"])
    limit = psutil.Process(pid).memory_info().vms + ROOM
    resource.prlimit(pid, resource.RLIMIT_AS, (limit, limit))
    os.kill(pid, SIGSTOP)  # a pause long enough to be noticed: meanwhile the gateway has seen the limit
    wait_until(lambda: not _responsive(gateway, name))
    os.kill(pid, SIGCONT)
    wait_until(lambda: _responsive(gateway, name))
    with suppress(httpx.HTTPError), httpx.Client(base_url=gateway.backend_url(name), timeout=60) as direct:
        direct.post("/v1/chat/completions", json=chat(LONG_PROMPT, "default_model", max_tokens=5))


KINDS = {"kill": kill, "wedge": wedge, "oom": run_out_of_memory}
CAUSES = {"kill": "killed", "wedge": "wedge", "oom": "oom"}


def die(gateway: Gateway, name: str, kind: str) -> Death:
    """Returns when the backend is ready with a new process."""
    before = gateway.backend(name)
    KINDS[kind](gateway, name)
    began = time.time()
    while alive(before["pid"]):
        time.sleep(LOOK)
        assert time.time() - began < 60, f"{kind}: the process is not ended"
    gone = time.time()
    told = gateway.await_life(name, before["pid"])
    starting, ready = _last_start(gateway, name, told["restarts"] + 1)
    return Death(kind, told["last_failure"]["cause"], gone - began, starting - gone, ready - starting)


def _last_start(gateway: Gateway, name: str, generation: int) -> tuple[float, float]:
    """Seconds since the epoch, when it was launched and when it was ready. The log may come later than the state."""

    def logged() -> list[float]:
        changes = [found for found in _CHANGE.finditer(gateway.log) if found["name"] == name]
        of_this = {found["state"]: found["when"] for found in changes if int(found["life"]) == generation}
        whens = [of_this[state] for state in ("starting", "ready") if state in of_this]
        return [datetime.fromisoformat(when).timestamp() for when in whens] if len(whens) == 2 else []

    starting, ready = wait_until(logged)
    return starting, ready


def _responsive(gateway: Gateway, name: str) -> bool:
    backends = gateway.http.get("/api/status").json()["models"][name.partition(":")[0]]["backends"]
    return bool(next(b["responsive"] for b in backends if b["id"] == name))

"""Ways for a real mlx_lm.server to die, and how long its gateway takes to have it back."""

import re
import resource
import sys
import time
from contextlib import suppress
from datetime import datetime
from signal import SIGKILL
from typing import NamedTuple

import httpx
import psutil

from tests.integration.harness import Gateway, alive
from tests.integration.wire import chat

KILLER = {"prompt": "a", "max_tokens": 4, "stop": [1]}  # a number among the stop words ends the generation thread
ROOM = 8 << 20  # bytes of address space beyond what the process has
LONG_PROMPT = "the river and the lamp " * 3000
LOOK = 0.005  # seconds between two looks whether a process is gone

_CHANGE = re.compile(r"^(\S+ \S+) \w+ +backend backend=(\S+) state=(\w+) was=(\w+) generation=(\d+)", re.MULTILINE)


class Death(NamedTuple):
    """Seconds. ``found``: until the process was gone. ``wait``: from then to the launch of the next one, ``load``: from
    there until that serves."""

    kind: str
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
    with suppress(httpx.HTTPError), httpx.Client(base_url=gateway.backend_url(name), timeout=60) as direct:
        direct.post("/v1/chat/completions", json=chat(LONG_PROMPT, "default_model", max_tokens=5))


KINDS = {"kill": kill, "wedge": wedge, "oom": run_out_of_memory}


def die(gateway: Gateway, name: str, kind: str) -> Death:
    """Returns when the backend is ready with a new process."""
    before = gateway.backend(name)
    KINDS[kind](gateway, name)
    began = time.time()
    while alive(before["pid"]):
        time.sleep(LOOK)
        assert time.time() - began < 60, f"{kind}: the process is not ended"
    gone = time.time()
    gateway.await_life(name, before["pid"])
    changes = [found.groups() for found in _CHANGE.finditer(gateway.log) if found[2] == name]
    last = max(int(generation) for *_, generation in changes)
    at = {state: _seconds(when) for when, _, state, _, generation in changes if int(generation) == last}
    return Death(kind, gone - began, at["starting"] - gone, at["ready"] - at["starting"])


def _seconds(when: str) -> float:
    return datetime.fromisoformat(when).timestamp()

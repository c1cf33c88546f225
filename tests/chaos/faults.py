"""Random faults of backends: each fault is injected into a random ready backend."""

import random
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from signal import SIGCONT, SIGKILL, SIGSTOP

import httpx
import psutil

from tests.integration.harness import Gateway

KINDS = ("kill", "kill", "stop", "stop for good", "wedge", "theft")
POISON = {"prompt": "a", "max_tokens": 4, "stop": [1]}  # ends the generation thread of mlx_lm.server
PORT_HELD = 3.0  # seconds that a stolen port is held
MAX_PAUSE = 2.0  # seconds between SIGSTOP and SIGCONT; less than timeouts.progress


class Faults:
    """``every``: seconds between two faults, minimum and maximum."""

    def __init__(self, gateway: Gateway, chance: random.Random, every: tuple[float, float]) -> None:
        self.done: Counter[str] = Counter()
        self._gateway = gateway
        self._chance = chance
        self._every = every
        self._over = threading.Event()
        self._errors: list[BaseException] = []

    @contextmanager
    def going_on(self) -> Iterator[None]:
        thread = threading.Thread(target=self._run)
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join()
        if self._errors:
            raise self._errors[0]

    def _run(self) -> None:
        try:
            while not self._over.wait(self._chance.uniform(*self._every)):
                self._one()
        except BaseException as error:  # noqa: BLE001  raised again in the test
            self._errors.append(error)

    def _one(self) -> None:
        backends = self._gateway.http.get("/api/status").json()["models"]["tiny"]["backends"]
        ready = [b for b in backends if b["state"] == "ready"]
        if not ready:
            return
        kind, victim = self._chance.choice(KINDS), self._chance.choice(ready)
        with suppress(psutil.NoSuchProcess):
            self._inject(kind, psutil.Process(victim["pid"]), victim["url"])
            self.done[kind] += 1

    def _inject(self, kind: str, victim: psutil.Process, url: str) -> None:
        match kind:
            case "kill":
                victim.send_signal(SIGKILL)
            case "stop":
                victim.send_signal(SIGSTOP)
                self._over.wait(self._chance.uniform(0.1, MAX_PAUSE))
                victim.send_signal(SIGCONT)
            case "stop for good":
                victim.send_signal(SIGSTOP)
            case "wedge":
                with suppress(httpx.HTTPError):
                    httpx.post(f"{url}/v1/completions", json=POISON, timeout=5)
            case "theft":
                self._steal(victim, int(url.rpartition(":")[2]))

    def _steal(self, victim: psutil.Process, port: int) -> None:
        victim.send_signal(SIGKILL)
        victim.wait(5)
        with socket.socket() as thief, suppress(OSError):
            thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            thief.bind(("127.0.0.1", port))
            thief.listen()
            self._over.wait(PORT_HELD)

"""Load generator: requests in a closed loop, or held streams. Measures their times, and the target's CPU and memory.

Runs in a process of its own: reads an ``Order`` as JSON from standard input, writes a ``Result`` as JSON.
"""

import asyncio
import json
import re
import sys
import time
from dataclasses import asdict, dataclass, field
from typing import cast

import httptools
import psutil
import uvloop

TOKEN = re.compile(rb"@(\d+)#(\d+)")
RAMP = 400.0  # streams begun per second


@dataclass
class Order:
    """``pids``: processes whose CPU time and memory are measured. ``hold``: endless streams instead of a closed loop.
    ``cpu``: the processor to run on."""

    port: int
    body: str
    clients: int
    seconds: float
    pids: list[int]
    path: str = "/v1/chat/completions"
    warm_up: float = 0.5
    hold: bool = False
    cpu: int | None = None


@dataclass
class Result:
    """Times in seconds."""

    requests: int = 0
    chunks: int = 0
    errors: int = 0
    cpu: float = 0.0  # of the target, user and system
    elapsed: float = 0.0
    memory: int = 0  # resident bytes of the target, at the end
    latency: list[float] = field(default_factory=list)  # of whole answers
    first: list[float] = field(default_factory=list)  # until the first event
    delay: list[float] = field(default_factory=list)  # of each chunk, from the upstream's write to the read here


class Client(asyncio.Protocol):
    """One connection at a time, reopened when the other side closes it."""

    def __init__(self, run: "Run") -> None:
        self._run = run
        self._transport: asyncio.Transport | None = None

    async def begin(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._next = 0
        self._whole = self._got = False
        self._began = time.perf_counter()
        if self._transport is None:
            loop = asyncio.get_running_loop()
            await loop.create_connection(lambda: self, "127.0.0.1", self._run.order.port)
        if self._transport is not None:
            self._transport.write(self._run.request)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._got and not self._whole and exc is None:
            self.on_message_complete()  # a body that ends with its connection
        elif not self._whole:
            self._run.failed(self)

    def data_received(self, data: bytes) -> None:
        now = time.monotonic_ns()
        self._parser.feed_data(data)
        self._got = True
        for sent, number in TOKEN.findall(data):
            if int(number) == 0 and self._run.measuring:
                self._run.result.first.append(time.perf_counter() - self._began)
            if int(number) != self._next:
                self._run.result.errors += 1  # a token is missing or duplicated
            self._next = int(number) + 1
            if self._run.measuring:
                self._run.result.chunks += 1
                self._run.result.delay.append((now - int(sent)) / 1e9)

    def on_message_complete(self) -> None:
        if self._whole:
            return
        self._whole = True
        if self._parser.get_status_code() != 200:
            self._run.result.errors += 1
        elif self._run.measuring:
            self._run.result.requests += 1
            self._run.result.latency.append(time.perf_counter() - self._began)
        if self._transport is not None and not self._parser.should_keep_alive():
            self._transport.abort()
            self._transport = None
        self._run.again(self)


class Run:
    def __init__(self, order: Order) -> None:
        self.order = order
        self.result = Result()
        self.measuring = False
        self._tasks: set[asyncio.Task[None]] = set()
        body = order.body.encode()
        head = f"POST {order.path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        self.request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body

    def again(self, client: Client) -> None:
        task = asyncio.get_running_loop().create_task(client.begin())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def failed(self, client: Client) -> None:
        self.result.errors += 1
        asyncio.get_running_loop().call_later(0.05, self.again, client)

    async def run(self) -> Result:
        for _ in range(self.order.clients):
            self.again(Client(self))
            if self.order.hold:
                await asyncio.sleep(1 / RAMP)
        await asyncio.sleep(self.order.warm_up)
        self.measuring = True
        spent, began = self._spent(), time.perf_counter()
        await asyncio.sleep(self.order.seconds)
        self.measuring = False
        self.result.cpu, self.result.elapsed = self._spent() - spent, time.perf_counter() - began
        self.result.memory = sum(psutil.Process(pid).memory_info().rss for pid in self.order.pids)
        return self.result

    def _spent(self) -> float:
        times = [psutil.Process(pid).cpu_times() for pid in self.order.pids]
        return sum(one.user + one.system for one in times)


def main() -> None:
    order = Order(**json.load(sys.stdin))
    if order.cpu is not None and hasattr(psutil.Process, "cpu_affinity"):
        psutil.Process().cpu_affinity([order.cpu])
    result = uvloop.run(Run(order).run())
    sys.stdout.write(json.dumps(asdict(result)))


if __name__ == "__main__":
    main()

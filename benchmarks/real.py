"""What the benchmarks of the engine share: raw mlx_lm.server processes and gateways on a model made here, and a client.

Two processors are shared by servers, gateway and client, so that figures mean something only beside a control that was
run in the same call.
"""

import argparse
import asyncio
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from backends.process.ports import free_port
from gateway.cli.demo_model.model import ensure_tiny_model

READY_TIMEOUT = 120.0  # seconds
TIMEOUT = 600.0  # seconds of one request
NEVER_ENDS = {str(token): -100 for token in range(4)}  # logit_bias against the special tokens of the demo model


@dataclass(frozen=True, slots=True)
class Server:
    """``pid``: of the process that was started, the parent of the rest."""

    url: str
    pid: int
    log: Path

    def memory(self) -> int:
        """Bytes of main memory of the process and its descendants."""
        parent = psutil.Process(self.pid)
        return sum(process.memory_info().rss for process in (parent, *parent.children(recursive=True)))


@dataclass(slots=True)
class Answer:
    """Seconds since the request was sent. ``first``: until the first content, None = there was none. ``gaps``: between
    two pieces of content. ``error``: why the answer is not whole, "" = it is."""

    first: float | None = None
    seconds: float = 0.0
    gaps: list[float] = field(default_factory=list)
    text: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    error: str = ""


def model(folder: Path, *, hidden: int = 64, layers: int = 2) -> Path:
    """The folder of a model of that size; built at the first call."""
    path = folder / f"llama-{hidden}-{layers}"
    ensure_tiny_model(path, hidden=hidden, layers=layers)
    return path


def arguments(description: str | None) -> argparse.Namespace:
    """``rounds``, and ``model``: a folder, None = one is to be made."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", type=Path, help="folder of a model; by default a small one is made")
    return parser.parse_args()


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="mlx-gateway-bench-") as name:
        yield Path(name)


@contextlib.contextmanager
def raw(model: Path, folder: Path, *flags: str) -> Iterator[Server]:
    """mlx_lm.server as it is, ready. Raises RuntimeError."""
    port = free_port("127.0.0.1")
    argv = [sys.executable, "-m", "mlx_lm", "server", "--model", str(model), "--port", str(port), *flags]
    with _running(argv, folder / f"raw-{port}.log", port) as server:
        asyncio.run(_until_ready(server))
        yield server


@contextlib.contextmanager
def gateway(config: str, folder: Path) -> Iterator[Server]:
    """A gateway, all of its models ready. ``config``: YAML, without ``server:``. Raises RuntimeError."""
    port = free_port("127.0.0.1")
    path = folder / f"gateway-{port}.yaml"
    path.write_text(f"server: {{port: {port}}}\n{config}")
    argv = [sys.executable, "-m", "gateway", "serve", str(path)]
    with _running(argv, folder / f"gateway-{port}.log", port) as server:
        asyncio.run(_until_ready(server))
        yield server


@contextlib.contextmanager
def _running(argv: Sequence[str], log: Path, port: int) -> Iterator[Server]:
    environ = os.environ | {"MLX_GATEWAY_STATE_DIR": f"{log}.state", "HF_HUB_OFFLINE": "1"}
    with log.open("wb") as out:
        process = subprocess.Popen(argv, stdout=out, stderr=subprocess.STDOUT, env=environ)
    try:
        yield Server(f"http://127.0.0.1:{port}", process.pid, log)
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        process.kill()
        process.wait()


def _runs(pid: int) -> bool:
    """A child that has ended is there until it is waited for."""
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


async def _until_ready(server: Server) -> None:
    """Every replica of a gateway, or the raw server, can answer. Raises RuntimeError."""
    deadline = time.monotonic() + READY_TIMEOUT
    async with httpx.AsyncClient(timeout=10) as client:
        while time.monotonic() < deadline and _runs(server.pid):
            with contextlib.suppress(httpx.TransportError):
                health = await client.get(f"{server.url}/health")
                models = health.json().get("models", {})
                backends = [backend for one in models.values() for backend in one["backends"]]
                if health.status_code == 200 and all(backend["state"] == "ready" for backend in backends):
                    return
            await asyncio.sleep(0.2)
    raise RuntimeError(f"not ready, or ended, within {READY_TIMEOUT:g} s: {server.log.read_text()[-2000:]}")


@contextlib.asynccontextmanager
async def client() -> AsyncIterator[httpx.AsyncClient]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)  # mlx_lm.server closes after each answer
    async with httpx.AsyncClient(timeout=httpx.Timeout(TIMEOUT, connect=10), limits=limits) as http:
        yield http


async def ask(
    http: httpx.AsyncClient,
    url: str,
    messages: str | Sequence[Mapping[str, Any]],
    *,
    tokens: int = 4,
    model: str = "default_model",
    headers: Mapping[str, str] | None = None,
    **fields: Any,
) -> Answer:
    """A streamed answer of ``tokens`` tokens, measured. ``messages``: those of a chat, or the text of one."""
    said = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
    body = {"model": model, "messages": said, "max_tokens": tokens, "stream": True, "logit_bias": NEVER_ENDS}
    body |= {"stream_options": {"include_usage": True}, "temperature": 0, **fields}
    answer, began, last = Answer(), time.perf_counter(), 0.0
    try:
        async with http.stream("POST", f"{url}/v1/chat/completions", json=body, headers=headers) as response:
            answer.headers = dict(response.headers)
            if response.status_code != 200:
                answer.error = f"{response.status_code}: {(await response.aread()).decode()[:300]}"
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                now, chunk = time.perf_counter(), json.loads(line[6:])
                if "error" in chunk:
                    answer.error = str(chunk["error"].get("message"))
                _count(answer, chunk.get("usage") or {})
                piece = "".join(
                    (choice.get("delta") or {}).get("content") or "" for choice in chunk.get("choices") or []
                )
                if piece:
                    answer.text += piece
                    if answer.first is None:
                        answer.first = now - began
                    else:
                        answer.gaps.append(now - last)
                    last = now
    except httpx.HTTPError as error:
        answer.error = repr(error)
    answer.seconds = time.perf_counter() - began
    if answer.first is None and not answer.error:
        answer.error = "no content"
    return answer


def _count(answer: Answer, usage: Mapping[str, Any]) -> None:
    answer.prompt_tokens = usage.get("prompt_tokens") or answer.prompt_tokens
    details = usage.get("prompt_tokens_details") or {}
    answer.cached_tokens = details.get("cached_tokens") or answer.cached_tokens


def text_of(tokens: int, name: str = "") -> str:
    """A prompt of about so many tokens of the demo model; other names give prompts that share no beginning."""
    return f"{name} " + " ".join(f"{name}{i}" for i in range(tokens // 4))


def quantile(values: Sequence[float], share: float) -> float:
    """nan = there are none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


def median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else float("nan")

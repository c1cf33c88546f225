"""The targets: the gateway as its users run it, and the peers that are installed."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from backends.process.ports import free_port

UPSTREAM = str(Path(__file__).with_name("upstream.py"))
READY_TIMEOUT = 60.0  # seconds

NGINX = """daemon off; master_process off; worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/nginx.err;
events {{ worker_connections 16000; }}
http {{
  access_log off; client_max_body_size 64m; client_body_buffer_size 1m; keepalive_requests 1000000;
  client_body_temp_path {folder}/1; proxy_temp_path {folder}/2; fastcgi_temp_path {folder}/3;
  uwsgi_temp_path {folder}/4; scgi_temp_path {folder}/5;
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location / {{
      proxy_pass http://127.0.0.1:{upstream}; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_buffering off; proxy_read_timeout 600s;
    }}
  }}
}}
"""
HAPROXY = """global
  nbthread 1
  maxconn 9000
defaults
  mode http
  option http-server-close
  timeout connect 5s
  timeout client 600s
  timeout server 600s
frontend f
  bind 127.0.0.1:{port}
  default_backend b
backend b
  server s 127.0.0.1:{upstream}
"""
LLAMA_SWAP = """logLevel: error
models:
  bench:
    cmd: sleep 1000000
    proxy: http://127.0.0.1:{upstream}
    checkEndpoint: /health
    concurrencyLimit: 20000
"""
LITELLM = """model_list:
  - model_name: bench
    litellm_params: {{model: openai/bench, api_base: "http://127.0.0.1:{upstream}/v1", api_key: x}}
litellm_settings: {{request_timeout: 600, telemetry: false, num_retries: 0}}
"""
LITELLM_ENV = {  # otherwise it requires a key, and downloads its list of prices
    "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LITELLM_MODE": "PRODUCTION",
}
GATEWAY = """server: {{max_connections: 20000}}
models:
  bench:
    command: [{python}, {program}, --port, "{{port}}", --cpu, "0"]
    max_inflight: 1024
    max_queue: 8192
    replicas: 4  # with 1024 requests each, the upper bound of max_inflight
"""


@dataclass(frozen=True)
class Peer:
    """``files``: name → contents; ``argv`` and contents may contain {folder}, {port} and {upstream}."""

    argv: tuple[str, ...]
    files: tuple[tuple[str, str], ...] = ()


PEERS = {
    "nginx": Peer(
        ("nginx", "-p", "{folder}", "-e", "{folder}/e", "-c", "{folder}/nginx.conf"), (("nginx.conf", NGINX),)
    ),
    "haproxy": Peer(("haproxy", "-db", "-f", "{folder}/haproxy.cfg"), (("haproxy.cfg", HAPROXY),)),
    "llama-swap": Peer(
        ("llama-swap", "-config", "{folder}/swap.yaml", "-listen", "127.0.0.1:{port}"), (("swap.yaml", LLAMA_SWAP),)
    ),
    "litellm": Peer(
        ("litellm", "--config", "{folder}/litellm.yaml", "--host", "127.0.0.1", "--port", "{port}"),
        (("litellm.yaml", LITELLM),),
    ),
}


@dataclass(frozen=True)
class Target:
    """``pids``: processes whose cost is measured; none for the upstream itself."""

    name: str
    port: int
    pids: tuple[int, ...] = ()


@contextlib.contextmanager
def started(names: list[str], folder: Path) -> Iterator[list[Target]]:
    """``direct`` first, then mlx-gateway and those of ``names`` that are installed. All are ended afterwards."""
    upstream = free_port("127.0.0.1")
    processes = [_spawn([sys.executable, UPSTREAM, "--port", str(upstream), "--cpu", "0"], folder / "upstream")]
    try:
        _wait_for(upstream, "upstream", processes[0])
        targets = [Target("direct", upstream)]
        for name in ["mlx-gateway", *names]:
            port = free_port("127.0.0.1")
            argv = _prepare(name, folder, port, upstream)
            if shutil.which(argv[0]) is None:
                sys.stderr.write(f"{name}: not installed, skipped\n")
                continue
            process = _spawn(argv, folder / name, cpu=1)
            processes.append(process)
            _wait_for(port, name, process)
            targets.append(Target(name, port, _family(process)))
        yield targets
    finally:
        for process in reversed(processes):
            process.send_signal(signal.SIGTERM)
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(15)
            process.kill()
            process.wait()


def _prepare(name: str, folder: Path, port: int, upstream: int) -> list[str]:
    own = folder / name
    own.mkdir()
    if name == "mlx-gateway":
        config = own / "config.yaml"
        config.write_text(GATEWAY.format(python=sys.executable, program=UPSTREAM))
        return [str(Path(sys.executable).with_name("mlx-gateway")), "serve", str(config), "--port", str(port)]
    peer = PEERS[name]
    for file, contents in peer.files:
        (own / file).write_text(contents.format(folder=own, port=port, upstream=upstream))
    return [part.format(folder=own, port=port, upstream=upstream) for part in peer.argv]


def _spawn(argv: list[str], log: Path, cpu: int | None = None) -> subprocess.Popen[bytes]:
    environ = os.environ | {"MLX_GATEWAY_STATE_DIR": f"{log}.state", "LITELLM_LOG": "ERROR"} | LITELLM_ENV
    with Path(f"{log}.log").open("wb") as out:
        process = subprocess.Popen(argv, stdout=out, stderr=subprocess.STDOUT, env=environ)
    if cpu is not None and hasattr(psutil.Process, "cpu_affinity") and (os.cpu_count() or 1) > 1:
        psutil.Process(process.pid).cpu_affinity([cpu])
    return process


def _wait_for(port: int, name: str, process: subprocess.Popen[bytes]) -> None:
    """Waits until ``port`` answers a completion. Raises SystemExit."""
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    body = {"model": "bench", "messages": [{"role": "user", "content": "BENCH n=1"}]}
    deadline = time.monotonic() + READY_TIMEOUT
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(httpx.TransportError):
            if httpx.post(url, json=body, timeout=10).status_code == 200:
                return
        time.sleep(0.2)
    sys.exit(f"{name} did not become ready (exit status {process.poll()})")


def _family(process: subprocess.Popen[bytes]) -> tuple[int, ...]:
    """The pids of the process and its descendants, without the upstreams that it supervises."""
    parent = psutil.Process(process.pid)
    children = [child for child in parent.children(recursive=True) if UPSTREAM not in child.cmdline()]
    return (parent.pid, *(child.pid for child in children))

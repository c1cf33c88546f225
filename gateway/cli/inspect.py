"""The commands that query a running gateway: ``status`` and ``logs``."""

import os
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

import httpx
from rich import box
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from backends.memory import units
from gateway.cli.terminal import printable

DEFAULT_URL = "http://127.0.0.1:8080"
STYLES = {"ready": "green", "starting": "yellow", "backoff": "yellow", "failed": "red", "unreachable": "red"}


COLUMNS = {  # to the least width: no word of it is broken in a terminal of 80 columns, if the model's name is short
    "MODEL": 5,
    "STATUS": 8,
    "BACKEND": 7,
    "STATE": 8,
    "PID": 5,
    "MEMORY": 6,
    "IN FLIGHT": 8,
    "RESTARTS": 8,
    "LAST FAILURE": 7,
}


class NoAnswer(Exception):
    """The message gives the cause and the remedy."""


def status(url: str, *, watch: bool) -> int:
    """Exit status: 0; 1 if no gateway answers."""
    console = Console()
    try:
        with _client(url) as client:
            if not watch:
                console.print(_table(_get(client, "/api/status").json()))
                return 0
            with Live(console=console, auto_refresh=False) as live:
                while True:
                    live.update(_table(_get(client, "/api/status").json()), refresh=True)
                    time.sleep(1.0)
    except NoAnswer as error:
        print(printable(str(error)), file=sys.stderr)
        return 1


def logs(url: str, backend: str | None, *, lines: int, follow: bool) -> int:
    """Exit status: 0; 1 if no gateway answers, or the gateway has no such backend."""
    try:
        with _client(url) as client:
            for name in _chosen(client, backend, follow=follow):
                prefix = "" if backend is not None else f"{name} | "
                for line in _output(client, name, lines, follow=follow):
                    print(printable(f"{prefix}{line}"), flush=follow)
    except NoAnswer as error:
        print(printable(str(error)), file=sys.stderr)
        return 1
    return 0


def _chosen(client: httpx.Client, backend: str | None, *, follow: bool) -> list[str]:
    if backend is not None:
        return [backend]
    known = [b["id"] for b in _backends(_get(client, "/api/status").json())]
    if follow and len(known) > 1:
        raise NoAnswer(f"--follow takes one backend: {', '.join(known)}")
    return known


def _client(url: str) -> httpx.Client:
    """The API key, if the gateway requires one, comes from MLX_GATEWAY_API_KEY."""
    key = os.environ.get("MLX_GATEWAY_API_KEY")
    headers = {"authorization": f"Bearer {key}"} if key else {}
    try:
        return httpx.Client(base_url=url, headers=headers, timeout=10.0)
    except httpx.InvalidURL as error:
        raise NoAnswer(f"--url {url}: {error}; write it as {DEFAULT_URL}") from error


def _get(client: httpx.Client, path: str) -> httpx.Response:
    try:
        response = client.get(path)
    except httpx.HTTPError as error:
        raise NoAnswer(_no_gateway(client, error)) from error
    return _checked(client, response)


def _checked(client: httpx.Client, response: httpx.Response) -> httpx.Response:
    if response.status_code == 401:
        raise NoAnswer(f"{client.base_url} requires an API key; set MLX_GATEWAY_API_KEY")
    if response.status_code != 200:
        try:
            message = response.json()["error"]["message"]
        except (ValueError, KeyError, TypeError):
            message = f"status {response.status_code}; check that --url is that of an mlx-gateway"
        raise NoAnswer(f"{client.base_url}: {message}")
    return response


def _output(client: httpx.Client, backend: str, lines: int, *, follow: bool) -> Iterator[str]:
    path = f"/api/backends/{quote(backend, safe='')}/logs?lines={lines}&follow={int(follow)}"
    try:
        with client.stream("GET", path, timeout=None if follow else 10.0) as response:
            if response.status_code != 200:
                response.read()
                _checked(client, response)
            yield from _lines(response.iter_text())
    except httpx.ConnectError as error:
        raise NoAnswer(_no_gateway(client, error)) from error
    except httpx.HTTPError as error:
        raise NoAnswer(f"lost the connection to the gateway at {client.base_url}: {error}") from error


def _lines(texts: Iterator[str]) -> Iterator[str]:
    """Not ``iter_lines`` of httpx, which also splits at characters that a line of output may hold (U+2028)."""
    part = ""
    for text in texts:
        *whole, part = (part + text).split("\n")
        yield from whole
    if part:
        yield part


def _no_gateway(client: httpx.Client, error: Exception) -> str:
    return f"no gateway answers at {client.base_url}: {error}; start one, or give its URL with --url"


def _backends(status: dict[str, Any]) -> list[dict[str, Any]]:
    return [backend for model in status["models"].values() for backend in model["backends"]]


def _table(status: dict[str, Any]) -> Table:
    title = _plain(f"mlx-gateway {status['version']}: {status['status']}")
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for column, width in COLUMNS.items():
        table.add_column(column, overflow="fold", min_width=width)
    for name, model in status["models"].items():
        queued = f" (+{model['queued']} queued)" if model["queued"] else ""
        for i, b in enumerate(model["backends"]):
            table.add_row(
                _plain(name) if i == 0 else "",
                _plain(model["status"] + queued) if i == 0 else "",
                _plain(b["id"]),
                f"[{STYLES.get(b['state'], 'white')}]{_plain(_state(b))}[/]",
                _plain(str(b["pid"] or "-")),
                _memory(b),
                _plain(_inflight(b)),
                _plain(str(b["restarts"])),
                _plain(_failure(b["last_failure"])),
            )
    return table


def _plain(text: str) -> str:
    """As it is: no escape sequence of a terminal, no markup of rich."""
    return escape(printable(text))


def _state(backend: dict[str, Any]) -> str:
    state = str(backend["state"])
    if state == "ready" and not backend["responsive"]:
        return "ready, silent"
    if state == "waiting_for_memory" and backend.get("loading"):
        return f"{state}: {backend['loading']['phase']}"
    return f"{state}, crash looping ({backend['failed_lives']} lives)" if backend.get("crash_looping") else state


def _inflight(backend: dict[str, Any]) -> str:
    report = backend.get("report") or {}
    counts = {"reading": report.get("reading"), "writing": report.get("decoding")}
    parts = [f"{count} {what}" for what, count in counts.items() if count]
    if abandoned := backend.get("abandoned", 0):
        parts.append(f"+{abandoned} abandoned")
    return f"{backend['inflight']} ({', '.join(parts)})" if parts else str(backend["inflight"])


def _failure(failure: dict[str, Any] | None) -> str:
    if failure is None:
        return "-"
    ago = datetime.now(UTC) - datetime.fromisoformat(failure["at"])
    return f"{failure['cause']} {round(ago.total_seconds())} s ago"


def _memory(backend: dict[str, Any]) -> str:
    """What it holds, and its share."""
    held, share = backend["memory"], backend.get("share")
    told = "-" if held is None else units.memory(held)
    return f"{told} of {units.memory(share['total'])}" if share and held is not None else told

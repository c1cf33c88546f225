"""Binding, what is said when that cannot be, and the order in which everything ends."""

import asyncio
import contextlib
import errno
import os
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from gateway.cli import server
from gateway.cli.server import CannotListen, _announce, _why, bind
from gateway.config import Config, parse


def test_a_free_port_is_found_and_listened_on() -> None:
    with bind("127.0.0.1", 0) as sock:
        port = sock.getsockname()[1]
        assert port > 0
        assert not sock.getblocking()
        with socket.create_connection(("127.0.0.1", port)):
            pass


def test_a_port_that_is_taken_names_who_holds_it() -> None:
    with bind("127.0.0.1", 0) as sock:
        port = sock.getsockname()[1]
        with pytest.raises(CannotListen) as caught:
            bind("127.0.0.1", port)
        message = str(caught.value)
        assert f"cannot listen on 127.0.0.1:{port}" in message
        assert os.strerror(errno.EADDRINUSE) in message
        assert f"(pid {os.getpid()})" in message
        assert "--port" in message


def test_a_port_that_was_given_back_is_free_at_once() -> None:
    with bind("127.0.0.1", 0) as sock:
        port = sock.getsockname()[1]
        client = socket.create_connection(("127.0.0.1", port))
        served, _ = socket.socket.accept(sock)
        served.close()  # ours closes first, so ours is the side in TIME_WAIT
        client.close()
    with bind("127.0.0.1", port) as again:
        assert again.getsockname()[1] == port


def test_an_address_that_is_not_ours() -> None:
    with pytest.raises(CannotListen) as caught:
        bind("203.0.113.7", 0)
    assert "cannot listen on 203.0.113.7:0" in str(caught.value)
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.EADDRNOTAVAIL
    assert "--host an address of this machine" in str(caught.value)
    assert "stop" not in str(caught.value), "there is nobody to stop"


def test_a_host_that_does_not_exist() -> None:
    with pytest.raises(CannotListen, match=r"cannot listen on no-such-host\.invalid:0: .*; give --host an address"):
        bind("no-such-host.invalid", 0)


@pytest.mark.parametrize(
    ("number", "remedy"), [(errno.EACCES, "ports below 1024 need root"), (errno.EAFNOSUPPORT, "choose another")]
)
def test_every_other_reason_comes_with_a_remedy(number: int, remedy: str) -> None:
    assert f"{os.strerror(number)}; {remedy}" in _why(OSError(number, os.strerror(number)), "127.0.0.1", 80)


def test_a_failed_bind_leaves_no_socket_behind() -> None:
    with bind("127.0.0.1", 0) as sock:
        before = len(list(Path("/dev/fd").iterdir()))
        for _ in range(3):
            with pytest.raises(CannotListen):
                bind("127.0.0.1", sock.getsockname()[1])
        assert len(list(Path("/dev/fd").iterdir())) == before


@pytest.mark.parametrize(("host", "url"), [("127.0.0.1", "http://127.0.0.1:"), ("::1", "http://[::1]:")])
def test_one_line_says_where_it_listens(host: str, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        sock = bind(host, 0)
    except CannotListen:
        pytest.skip(f"this machine has no {host}")
    with sock:
        _announce(sock, "")
        _announce(sock, "try {url}/v1/models")
        port = sock.getsockname()[1]
    assert capsys.readouterr().out == f"listening on {url}{port}\nlistening on {url}{port}\ntry {url}{port}/v1/models\n"


# -- the ordered end -------------------------------------------------------------------------------------------------


class Standing:
    """A service that only remembers what it was told; its one request ends when ``end_all`` says so."""

    def __init__(self, config: Config) -> None:
        self.told: list[str] = []
        self.config = config
        self.fleet = SimpleNamespace(backends={}, kill=lambda: self.told.append("kill"))
        self.draining = asyncio.Event()
        self.over = asyncio.Event()

    async def drain(self, patience: float) -> None:
        self.told.append(f"drain {patience:g}")
        self.draining.set()
        await self.over.wait()

    def end_all(self) -> None:
        self.told.append("end all")
        self.over.set()


async def hello(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


@pytest.fixture
async def standing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> AsyncIterator[tuple[Standing, "asyncio.Task[None]", str]]:
    config = parse("models: {a: {urls: [http://127.0.0.1:9]}}", "c.yaml", {})
    service = Standing(config)

    @contextlib.asynccontextmanager
    async def running(_config: object, _folder: Path) -> AsyncIterator[Standing]:
        yield service
        service.told.append("backends gone")

    monkeypatch.setattr(server, "running", running)
    monkeypatch.setattr(server, "application", lambda _: hello)
    with bind("127.0.0.1", 0) as sock:
        environ = {"MLX_GATEWAY_STATE_DIR": str(tmp_path)}
        serving = asyncio.ensure_future(server.serve(config, sock, environ, "hint {url}"))
        said = ""
        while "hint" not in said:
            if serving.done():
                serving.result()
            await asyncio.sleep(0.005)
            said += capsys.readouterr().out
        yield service, serving, said.split()[2]
        service.over.set()
        if not serving.done():
            os.kill(os.getpid(), signal.SIGTERM)
        await serving


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_it_drains_and_then_the_backends_end(
    standing: tuple[Standing, "asyncio.Task[None]", str], number: signal.Signals
) -> None:
    service, serving, url = standing
    async with httpx.AsyncClient(trust_env=False) as client:
        os.kill(os.getpid(), number)
        await service.draining.wait()
        assert (await client.get(url)).text == "ok", "those who come while it drains still get an answer"
    service.over.set()
    await serving
    assert service.told == ["drain 30", "backends gone"]


async def test_once_more_and_it_ends_at_once(standing: tuple[Standing, "asyncio.Task[None]", str]) -> None:
    service, serving, _ = standing
    os.kill(os.getpid(), signal.SIGTERM)
    await service.draining.wait()
    os.kill(os.getpid(), signal.SIGINT)
    await serving
    assert service.told == ["drain 30", "end all", "kill", "backends gone"]


async def test_sighup_ends_nothing(
    standing: tuple[Standing, "asyncio.Task[None]", str], caplog: pytest.LogCaptureFixture
) -> None:
    service, serving, url = standing
    os.kill(os.getpid(), signal.SIGHUP)
    async with httpx.AsyncClient(trust_env=False) as client:
        assert (await client.get(url)).text == "ok"
    assert not serving.done()
    assert service.told == []
    assert any("SIGHUP" in record.getMessage() for record in caplog.records)

"""Which client speaks to which address, and that either sends path, prefix and key."""

import asyncio
import socket

import pytest

from backends.domain.spec import Remote
from backends.upstream.connect import dialer_to
from backends.upstream.exchange import ExchangeError, Fault, Request
from backends.upstream.fetch import fetch
from backends.upstream.h1_client import H1Dialer
from backends.upstream.httpx_client import HttpxDialer
from tests.faultserver import JSON_BODY, LENGTH_HEAD, FaultServer, answer


@pytest.mark.parametrize(
    ("url", "peer"),
    [
        ("http://127.0.0.1:8080", "127.0.0.1:8080"),
        ("http://127.8.9.10:1", "127.8.9.10:1"),
        ("http://localhost:8080", "127.0.0.1:8080"),
        ("http://localhost", "127.0.0.1:80"),
        ("http://[::1]:8080", "[::1]:8080"),
    ],
)
async def test_plain_http_on_this_machine_is_lean(url: str, peer: str) -> None:
    dialer = dialer_to(Remote(url), lambda: 0.5)
    assert isinstance(dialer, H1Dialer)
    assert dialer.peer == peer
    await dialer.aclose()


@pytest.mark.parametrize(
    "url",
    [
        "https://127.0.0.1:8443",
        "https://localhost",
        "http://studio.local:8080",
        "http://192.168.1.7:8080",
        "http://localhost.example:80",
        "http://[fe80::1]:80",
    ],
)
async def test_everything_else_is_httpx(url: str) -> None:
    dialer = dialer_to(Remote(url), lambda: 0.5)
    assert isinstance(dialer, HttpxDialer)
    await dialer.aclose()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
@pytest.mark.parametrize("prefix", ["", "/inner"])
@pytest.mark.parametrize("key", ["", "secret"])
async def test_prefix_and_key_go_with_every_request(host: str, prefix: str, key: str) -> None:
    async with FaultServer(answer(LENGTH_HEAD, JSON_BODY)) as server:
        dialer = dialer_to(Remote(f"http://{host}:{server.port}{prefix}", key), lambda: 0.5)
        head, body = await fetch(dialer, Request("GET", "/health"), timeout=5.0)
        assert (head.status, body) == (200, JSON_BODY)
        await dialer.aclose()
        lines = bytes(server.conns[0].got).split(b"\r\n")
    assert lines[0] == f"GET {prefix}/health HTTP/1.1".encode()
    keys = [line for line in lines if line.lower().startswith(b"authorization:")]
    assert keys == ([b"authorization: Bearer secret"] if key else [])


async def test_localhost_is_either_loopback_address() -> None:
    if not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6 on this machine")

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(LENGTH_HEAD + JSON_BODY)
        writer.close()

    server = await asyncio.start_server(serve, "::1", 0)
    port = server.sockets[0].getsockname()[1]
    dialer = dialer_to(Remote(f"http://localhost:{port}"), lambda: 0.5)
    assert (await fetch(dialer, Request("GET", "/health"), timeout=5.0))[1] == JSON_BODY
    server.close()
    await server.wait_closed()
    with pytest.raises(ExchangeError) as caught:
        await fetch(dialer, Request("GET", "/health"), timeout=5.0)
    assert caught.value.fault is Fault.REFUSED
    await dialer.aclose()

"""Which server is reached through which proxy, and that messages name it."""

import asyncio
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest

from backends.domain.spec import PROXY_DIRECT, Remote
from backends.upstream.connect import dialer_to
from backends.upstream.exchange import Exchange, ExchangeError, Fault, Head, Request
from backends.upstream.fetch import fetch
from backends.upstream.httpx_client import HttpxDialer
from backends.upstream.proxies import proxy_for, shown
from tests.faultserver import JSON_BODY, LENGTH_HEAD, FaultServer, answer

GET = Request("GET", "/health")
FAR = "http://far.example:8080"


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def found(*addresses: str) -> Callable[..., list[tuple[Any, ...]]]:
    def lookup(*_: Any, **__: Any) -> list[tuple[Any, ...]]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in addresses]

    return lookup


async def got(dialer: HttpxDialer) -> tuple[Head, bytes]:
    try:
        return await fetch(dialer, GET, timeout=30.0)
    finally:
        await dialer.aclose()


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        (FAR, "http://proxy.example:3128"),
        ("https://far.example", "http://secure.example:3128"),
        ("http://listed.example", ""),
        ("http://192.168.1.7:8080", ""),
        ("http://studio.local:8080", ""),
        ("https://studio", ""),
        ("http://[fe80::1]:80", ""),
        ("http://8.8.8.8", "http://proxy.example:3128"),
    ],
)
def test_the_environment_counts_for_hosts_of_other_networks(
    url: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "proxy.example:3128")
    monkeypatch.setenv("HTTPS_PROXY", "http://secure.example:3128")
    monkeypatch.setenv("no_proxy", "listed.example")
    assert proxy_for(url) == expected
    assert proxy_for(url, PROXY_DIRECT) == ""
    assert proxy_for(url, "http://other:1") == "http://other:1"


def test_all_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    assert proxy_for(FAR) == ""
    monkeypatch.setenv("all_proxy", "socks5://proxy.example:1080")
    assert proxy_for(FAR) == "socks5://proxy.example:1080"


def test_a_proxy_is_shown_without_its_password() -> None:
    assert shown("http://me:secret@proxy.example:3128") == "http://proxy.example:3128"


async def test_an_answer_through_a_proxy_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async with FaultServer(answer(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n")) as proxy:
        monkeypatch.setenv("http_proxy", f"http://me:secret@127.0.0.1:{proxy.port}")
        head, _ = await got(HttpxDialer(Remote(FAR)))
        assert bytes(proxy.conns[0].got).startswith(b"GET http://far.example:8080/health HTTP/1.1")
    assert (head.status, head.through) == (502, f" through the proxy http://127.0.0.1:{proxy.port}")


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_a_failure_through_a_proxy_names_it(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    refusal = answer(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")
    async with FaultServer(refusal) as proxy:
        address = f"http://127.0.0.1:{proxy.port}"
        monkeypatch.setenv(f"{scheme}_proxy", address)
        if scheme == "https":
            with pytest.raises(ExchangeError) as caught:
                await got(HttpxDialer(Remote("https://far.example")))
            assert f"cannot connect to https://far.example through the proxy {address}: 403" in caught.value.detail
    with pytest.raises(ExchangeError) as caught:
        await got(HttpxDialer(Remote(f"{scheme}://far.example")))
    assert caught.value.fault is Fault.REFUSED
    assert caught.value.detail == f"connection refused by {scheme}://far.example through the proxy {address}"


async def test_a_proxy_that_cannot_be_used_is_told() -> None:
    with pytest.raises(ExchangeError) as caught:
        await got(HttpxDialer(Remote(FAR, proxy="socks5://me:secret@proxy.example:1080")))
    assert caught.value.fault is Fault.UNREACHABLE
    assert caught.value.detail.startswith("cannot use the proxy socks5://proxy.example:1080: ")


async def test_a_configured_proxy_counts_for_loopback_too() -> None:
    dialer = dialer_to(Remote("http://127.0.0.1:9", proxy="http://127.0.0.1:1"), lambda: 0.5)
    assert isinstance(dialer, HttpxDialer)
    with pytest.raises(ExchangeError, match=r"through the proxy http://127\.0\.0\.1:1"):
        await got(dialer)


# -- names -------------------------------------------------------------------------------------------------------------


async def test_the_time_for_a_name_is_not_part_of_the_time_for_the_connection() -> None:
    def slowly(*args: Any, **options: Any) -> list[tuple[Any, ...]]:
        time.sleep(0.15)
        return found("127.0.0.1")(*args, **options)

    async with FaultServer(answer(LENGTH_HEAD, JSON_BODY)) as server:
        remote = Remote(f"http://studio.local:{server.port}")
        assert (await got(HttpxDialer(remote, connect_timeout=0.05, lookup=slowly)))[1] == JSON_BODY
        assert f"Host: studio.local:{server.port}".lower() in bytes(server.conns[0].got).decode().lower()


async def test_the_next_address_is_tried() -> None:
    async with FaultServer(answer(LENGTH_HEAD, JSON_BODY)) as server:
        remote = Remote(f"http://studio.local:{server.port}")
        dialer = HttpxDialer(remote, lookup=found("127.0.0.9", "127.0.0.1"))
        assert (await got(dialer))[1] == JSON_BODY


async def test_a_name_that_cannot_be_resolved() -> None:
    def never(*_: Any, **__: Any) -> list[tuple[Any, ...]]:
        raise socket.gaierror(8, "nodename nor servname provided, or not known")

    with pytest.raises(ExchangeError) as caught:
        await got(HttpxDialer(Remote("http://studio.local:8080"), lookup=never))
    assert caught.value.fault is Fault.UNREACHABLE
    assert caught.value.detail == (
        "the name studio.local cannot be resolved: nodename nor servname provided, or not known"
    )


async def test_addresses_that_do_not_answer_are_looked_up_again() -> None:
    asked = 0

    def moved(*args: Any, **options: Any) -> list[tuple[Any, ...]]:
        nonlocal asked
        asked += 1
        return found("127.0.0.9" if asked == 1 else "127.0.0.1")(*args, **options)

    async with FaultServer(answer(LENGTH_HEAD, JSON_BODY)) as server:
        dialer = HttpxDialer(Remote(f"http://studio.local:{server.port}"), lookup=moved)
        with pytest.raises(ExchangeError):
            await fetch(dialer, GET, timeout=30.0)
        assert (await got(dialer))[1] == JSON_BODY


async def test_a_call_that_is_given_up_while_its_name_is_resolved() -> None:
    def slowly(*_: Any, **__: Any) -> list[tuple[Any, ...]]:
        time.sleep(0.1)
        return []

    dialer = HttpxDialer(Remote("http://studio.local:8080"), lookup=slowly)
    exchange: Exchange = dialer.open(GET)
    starting = asyncio.ensure_future(exchange.start())
    await asyncio.sleep(0.01)
    exchange.close()
    with pytest.raises(ExchangeError):
        await starting
    await dialer.aclose()

"""Which hosts are of our own network, and what a failed connection to one of them may mean."""

import errno
import sys

import httpx
import pytest

from backends.upstream import h1_client, httpx_client
from backends.upstream.exchange import Fault
from backends.upstream.locality import hint, is_local

OURS = [
    "127.0.0.1",
    "::1",
    "localhost",
    "10.1.2.3",
    "172.16.0.1",
    "192.168.1.7",
    "169.254.3.4",
    "fe80::1",
    "fe80::1%en0",
    "fd00::5",
    "100.101.102.103",
    "studio",
    "studio.local",
    "Studio.Local.",
    "a.b.local",
    "mini.lan",
    "mac.tailnet.ts.net",
    "box.home.arpa",
]


@pytest.mark.parametrize("host", OURS)
def test_of_our_own_network(host: str) -> None:
    assert is_local(host)


@pytest.mark.parametrize("host", ["8.8.8.8", "2606:4700::1", "api.example.com", "local.example.com", "notlocal.com"])
def test_of_the_rest_of_the_world(host: str) -> None:
    assert not is_local(host)


NO_ROUTE = OSError(65, "No route to host")  # the number is macOS's


PRIVACY = "Privacy & Security > Local Network"


def test_the_privacy_of_the_local_network(monkeypatch: pytest.MonkeyPatch) -> None:
    assert hint(NO_ROUTE, "studio.local") == ""
    monkeypatch.setattr(sys, "platform", "darwin")
    assert PRIVACY in hint(NO_ROUTE, "studio.local")
    assert hint(NO_ROUTE, "8.8.8.8") == ""
    assert hint(OSError(errno.ECONNREFUSED, "refused"), "studio.local") == ""
    assert hint(ValueError(65), "studio.local") == ""


def test_both_clients_tell_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    hidden = httpx.ConnectError("All connection attempts failed")
    hidden.__cause__ = NO_ROUTE
    for error in (
        h1_client._connect_error(NO_ROUTE, "192.168.1.7:8080"),
        httpx_client._translate(hidden, "http://studio.local:8080", "studio.local", answering=False),
    ):
        assert (error.fault, PRIVACY in error.detail) == (Fault.UNREACHABLE, True)

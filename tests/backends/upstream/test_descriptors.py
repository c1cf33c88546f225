"""Calls to backends leave the last descriptors to the doors and to launches."""

import os
import resource
from collections.abc import Iterator

import pytest

from backends.upstream import descriptors
from backends.upstream.exchange import ExchangeError, Fault, Request
from backends.upstream.h1_client import H1Dialer
from tests.faultserver import JSON_BODY, LENGTH_HEAD, FaultServer, answer


@pytest.fixture
def few() -> Iterator[None]:
    """So few that the next one is the first of the reserved."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    while lowest < 8 * descriptors.RESERVED:  # below that, fewer are reserved
        held.append(lowest := os.dup(0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + 1 + descriptors.RESERVED, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    while held:
        os.close(held.pop())


held: list[int] = []


async def test_the_last_ones_are_not_for_calls(few: None) -> None:
    async with FaultServer(answer(LENGTH_HEAD + JSON_BODY)) as server:  # takes two or more of the reserved
        assert descriptors.are_scarce()
        exchange = H1Dialer("127.0.0.1", server.port, jitter=lambda: 0.5).open(Request("GET", "/"))
        with pytest.raises(ExchangeError) as caught:
            await exchange.start()
        assert caught.value.fault is Fault.EXHAUSTED
        assert "Too many open files" in caught.value.detail
        os.close(held.pop(0))  # there is one below again
        assert not descriptors.are_scarce()


def test_an_infinite_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert descriptors.limit() > 1_000_000
    assert not descriptors.are_scarce()


def test_none_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(_: int) -> int:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, "dup", none)
    assert descriptors.are_scarce()

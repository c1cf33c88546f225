"""Names: looked up once at a time, with patience, remembered, and refreshed while they are in use."""

import asyncio
import socket
import threading
from typing import Any

import pytest

from backends.upstream import resolver
from backends.upstream.exchange import ExchangeError, Fault
from backends.upstream.resolver import MAX_ADDRESSES, Resolver
from tests.lives import until

NAME = "studio.local"


def info(address: str, scope: int = 0) -> tuple[Any, ...]:
    where = (address, 0, 0, scope) if ":" in address else (address, 0)
    return (socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM, 6, "", where)


class Names:
    """``told``: what the next look-up finds; it waits for ``go``."""

    def __init__(self, *addresses: str) -> None:
        self.told: list[tuple[Any, ...]] | Exception = [info(address) for address in addresses]
        self.go = threading.Event()
        self.go.set()
        self.asked: list[str] = []

    def __call__(self, host: str, *_: Any, **__: Any) -> list[tuple[Any, ...]]:
        self.asked.append(host)
        assert self.go.wait(30)
        if isinstance(self.told, Exception):
            raise self.told
        return self.told


async def test_an_address_is_not_looked_up() -> None:
    names = Names()
    for address in ("192.168.1.7", "::1", "fe80::1%en0"):
        assert await Resolver(names).addresses(address) == (address,)
    assert names.asked == []


async def test_all_addresses_in_order_once_each_with_their_scope() -> None:
    names = Names()
    names.told = [info("fe80::1", 4), info("10.0.0.1"), info("10.0.0.1"), info("fe80::2%en0", 4)]
    assert await Resolver(names).addresses(NAME) == ("fe80::1%4", "10.0.0.1", "fe80::2%en0")
    names.told = [info(f"10.0.0.{n}") for n in range(100)]
    assert len(await Resolver(names).addresses(NAME)) == MAX_ADDRESSES


async def test_those_who_wait_share_one_look_up_and_its_answer_is_remembered() -> None:
    names = Names("10.0.0.1")
    names.go.clear()
    one = Resolver(names)
    waiting = [asyncio.ensure_future(one.addresses(NAME)) for _ in range(5)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    names.go.set()
    assert await asyncio.gather(*waiting[1:]) == [("10.0.0.1",)] * 4
    assert await one.addresses(NAME) == ("10.0.0.1",)
    assert names.asked == [NAME]


async def test_a_slow_name_does_not_hold_up_the_event_loop_nor_fail_within_its_patience() -> None:
    names = Names("10.0.0.1")
    names.go.clear()
    one = Resolver(names, patience=0.01)
    with pytest.raises(ExchangeError) as caught:
        await one.addresses(NAME)
    assert caught.value.fault is Fault.UNREACHABLE
    assert "the name studio.local was not resolved within 0.01 s" in caught.value.detail
    names.go.set()
    await until(lambda: NAME in one._known)
    assert await one.addresses(NAME) == ("10.0.0.1",)
    assert names.asked == [NAME], "its look-up went on"


@pytest.mark.parametrize(
    "error", [socket.gaierror(8, "nodename nor servname provided"), UnicodeError("label too long")]
)
async def test_a_name_that_there_is_not_is_looked_up_again(error: Exception) -> None:
    names = Names("10.0.0.1")
    names.told, found = error, names.told
    one = Resolver(names)
    with pytest.raises(ExchangeError) as caught:
        await one.addresses(NAME)
    assert caught.value.fault is Fault.UNREACHABLE
    assert "the name studio.local cannot be resolved" in caught.value.detail
    names.told = found
    assert await one.addresses(NAME) == ("10.0.0.1",)
    names.told = []
    one.forget(NAME)
    with pytest.raises(ExchangeError, match="it has no address"):
        await one.addresses(NAME)


async def test_old_addresses_are_used_while_they_are_looked_up_again(monkeypatch: pytest.MonkeyPatch) -> None:
    names = Names("10.0.0.1")
    one = Resolver(names)
    await one.addresses(NAME)
    monkeypatch.setattr(resolver, "FRESH", 0.0)
    names.told, names.go = [info("10.0.0.2")], threading.Event()
    assert await one.addresses(NAME) == ("10.0.0.1",), "at once"
    names.go.set()
    await until(lambda: one._known[NAME].addresses == ("10.0.0.2",))
    assert await one.addresses(NAME) == ("10.0.0.2",)


def test_a_look_up_does_not_hold_up_the_end_of_the_program() -> None:
    names = Names("10.0.0.1")
    names.go.clear()

    async def leave() -> None:
        asking = asyncio.ensure_future(Resolver(names).addresses(NAME))
        await asyncio.sleep(0)
        asking.cancel()

    asyncio.run(leave())
    names.go.set()  # and the late answer finds no loop

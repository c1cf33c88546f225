"""Resolves host names apart from connecting, with patience and a memory of their own.

A name under ``.local`` takes 5 s and more to resolve where a machine has no IPv6 address or just woke up; within the
time for a connection such a server would never be reached, and each request would wait again. So a name is resolved
once at a time, remembered, and looked up again in the background while its addresses are still in use.

``getaddrinfo`` cannot be cancelled: it runs in a daemon thread, at most one for each name, so that neither the default
threads of the event loop nor the end of the program wait for it.
"""

import asyncio
import contextlib
import ipaddress
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from backends.upstream.exchange import ExchangeError, Fault

PATIENCE = 30.0  # seconds for one name
FRESH = 60.0  # seconds in which addresses are not looked up again
USABLE = 600.0  # seconds in which they are used while they are looked up again
MAX_ADDRESSES = 6  # of one name

Lookup = Callable[..., list[tuple[Any, ...]]]  # as socket.getaddrinfo


@dataclass(frozen=True, slots=True)
class _Known:
    addresses: tuple[str, ...]
    at: float  # event loop's time


class Resolver:
    def __init__(self, lookup: Lookup = socket.getaddrinfo, *, patience: float = PATIENCE) -> None:
        self._lookup = lookup
        self._patience = patience
        self._known: dict[str, _Known] = {}
        self._pending: dict[str, asyncio.Future[tuple[str, ...]]] = {}

    async def addresses(self, host: str) -> tuple[str, ...]:
        """Numeric, in the order of preference, at least one. Raises ExchangeError (UNREACHABLE)."""
        if _is_address(host):
            return (host,)
        known = self._known.get(host)
        age = asyncio.get_running_loop().time() - known.at if known is not None else USABLE
        if known is not None and age < FRESH:
            return known.addresses
        pending = self._pending.get(host) or self._begin(host)
        if known is not None and age < USABLE:
            return known.addresses
        try:
            async with asyncio.timeout(self._patience):
                return await asyncio.shield(pending)
        except TimeoutError as error:
            detail = f"the name {host} was not resolved within {self._patience:g} s; try its address instead"
            raise ExchangeError(Fault.UNREACHABLE, detail) from error
        except (OSError, UnicodeError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise ExchangeError(Fault.UNREACHABLE, f"the name {host} cannot be resolved: {reason}") from error

    def forget(self, host: str) -> None:
        """Its addresses did not answer: it may have others by now."""
        self._known.pop(host, None)

    def _begin(self, host: str) -> "asyncio.Future[tuple[str, ...]]":
        loop = asyncio.get_running_loop()
        pending: asyncio.Future[tuple[str, ...]] = loop.create_future()
        self._pending[host] = pending

        def work() -> None:
            found: tuple[str, ...] | Exception
            try:
                found = _numeric(self._lookup(host, None, type=socket.SOCK_STREAM))
            except Exception as error:  # noqa: BLE001  handed on to whoever waits
                found = error
            with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(self._end, host, pending, found)

        threading.Thread(target=work, name=f"resolve {host}", daemon=True).start()
        return pending

    def _end(self, host: str, pending: "asyncio.Future[tuple[str, ...]]", found: tuple[str, ...] | Exception) -> None:
        self._pending.pop(host, None)
        if pending.done():
            return
        if isinstance(found, Exception):
            pending.set_exception(found)
            pending.exception()  # marks it as retrieved: perhaps nobody waits any longer
        else:
            self._known[host] = _Known(found, asyncio.get_running_loop().time())
            pending.set_result(found)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _numeric(infos: list[tuple[Any, ...]]) -> tuple[str, ...]:
    """Raises OSError where there is none."""
    found: dict[str, None] = {}
    for *_, where in infos:
        address = str(where[0])
        scope = where[3] if len(where) > 3 else 0
        found[f"{address}%{scope}" if scope and "%" not in address else address] = None
    if not found:
        raise OSError("it has no address")
    return tuple(found)[:MAX_ADDRESSES]

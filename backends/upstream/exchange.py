"""Interface of one upstream call. All HTTP to a backend goes through it.

Two implementations give the same values and the same errors: ``h1_client`` (our own small HTTP/1 client, for children
on loopback: about a seventh of the CPU of httpx per request) and ``httpx_client`` (TLS, proxies).

    dialer.open(request) -> Exchange        nothing has been sent yet
    await exchange.start() -> Head          connects, sends, waits for status line and headers
    await exchange.read()  -> bytes         all bytes since the last read; b"" = the body ended cleanly
    await exchange.read(offer)              bytes that come during the wait are offered first, without a task switch
    exchange.close()                        always; at any moment; idempotent; cancels upstream if not ended
    exchange.abort(error)                   for the supervisor: the pending or next start() or read() raises it
    exchange.abandon(watcher)               instead of close(): the connection stays open, to see when its work is over

Caveat: a clean end of a close-delimited body says nothing about completeness: mlx_lm.server is HTTP/1.0, and a killed
server ends its stream exactly as a finished one does. Completeness is judged from the content, not here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from backends.domain.failure import Sent

Headers = tuple[tuple[bytes, bytes], ...]
Offer = Callable[[bytes], bool]
"""Takes the bytes and returns True; or returns False, and the bytes go to the reader."""


@dataclass(frozen=True, slots=True)
class Request:
    """``headers`` without Host, Content-Length and Connection: the dialer sets those."""

    method: str  # "POST"
    path: str  # "/v1/chat/completions"
    body: bytes = b""
    headers: Headers = ()


def through(proxy: str) -> str:
    """For messages about what came by way of ``proxy``; "" = by none."""
    return f" through the proxy {proxy}" if proxy else ""


@dataclass(frozen=True, slots=True)
class Head:
    status: int
    headers: Headers  # names in lower case, in the order received
    via: str = ""  # the proxy through which it came, which may have given the answer itself

    @property
    def through(self) -> str:
        """For a message about this answer."""
        return through(self.via)

    def get(self, name: bytes, default: bytes = b"") -> bytes:
        for key, value in self.headers:
            if key == name:
                return value
        return default


class Fault(StrEnum):
    """How an exchange failed, as seen on the wire."""

    REFUSED = "refused"  # no listener on the port
    CONNECT_RESET = "connect_reset"  # reset or closed while connecting, as by a full listen backlog
    CONNECT_TIMEOUT = "connect_timeout"
    UNREACHABLE = "unreachable"  # no route, no such host, TLS failed
    EXHAUSTED = "exhausted"  # the gateway has no descriptors, ports or memory left: no sign about the backend
    RESET = "reset"  # reset after the request was (partly) written
    EOF_BEFORE_HEAD = "eof_before_head"  # closed without a status line
    INCOMPLETE = "incomplete"  # ended short of its Content-Length, or in mid-chunk
    PROTOCOL = "protocol"  # not HTTP
    STALLED = "stalled"  # no byte for too long
    DIED = "died"  # the process exited, or the supervisor decided to end it
    DEADLINE = "deadline"  # timeouts.total
    CROWDED = "crowded"  # stopped, so that the backend does not run out of memory
    OCCUPIED = "occupied"  # the backend is silent because of another request


NOT_SENT = frozenset({Fault.REFUSED, Fault.CONNECT_RESET, Fault.CONNECT_TIMEOUT, Fault.UNREACHABLE, Fault.EXHAUSTED})
# The backend is not known to have ended.
WORKS_ON = frozenset({Fault.STALLED, Fault.DEADLINE, Fault.OCCUPIED, Fault.CROWDED})


class ExchangeError(Exception):
    """``detail`` is one clause for people: "connection refused by 127.0.0.1:8081"."""

    def __init__(self, fault: Fault, detail: str) -> None:
        super().__init__(f"{fault.value}: {detail}")
        self.fault = fault
        self.detail = detail

    @property
    def sent(self) -> Sent:
        return Sent.NOTHING if self.fault in NOT_SENT else Sent.MAYBE


class Watcher(Protocol):
    """Of an exchange that nobody reads any more."""

    def heard(self, data: bytes) -> bool:
        """Raw bytes from the backend. True: hang up now, with a reset."""
        ...

    def over(self) -> None:
        """The backend has ended the connection: it works on the request no longer. Not called after a hang-up."""
        ...


class Exchange(Protocol):
    """One call. ``last_heard``: event loop time of the last byte from the backend, 0.0 before the first. ``pieces``:
    number of times that bytes came.

    ``waiting_since``: event loop time at which the pending ``start`` or ``read`` began to wait; 0.0 = none is pending.
    While a client does not read its answer, the gateway does not read from the backend either, and silence then is no
    sign of a stall.
    """

    last_heard: float
    pieces: int

    @property
    def waiting_since(self) -> float: ...

    async def start(self) -> Head: ...

    async def read(self, offer: Offer | None = None) -> bytes: ...

    @property
    def working(self) -> bool:
        """The request was sent, and the connection stands: the backend may be at work on it."""
        ...

    @property
    def local_port(self) -> int:
        """Of our end, also once it is closed; 0 = not known."""
        ...

    def abort(self, error: ExchangeError) -> None:
        """An error in ``WORKS_ON`` leaves the connection of a request that was sent to ``close`` or ``abandon``."""
        ...

    def abandon(self, watcher: Watcher) -> None:
        """Only while ``working``."""
        ...

    def close(self) -> None: ...


class Dialer(Protocol):
    """Opens exchanges to one instance of one replica."""

    def open(self, request: Request) -> Exchange: ...

    async def aclose(self) -> None: ...

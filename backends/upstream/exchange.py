"""The seam: one upstream call. The only door through which anything here speaks HTTP to a backend.

Two implementations give the same values and the same errors: ``lean`` (our own small HTTP/1 client, for children on
loopback: about a seventh of the CPU of httpx per request) and ``remote`` (httpx: TLS, proxies).

    dialer.open(request) -> Exchange        nothing has been sent yet
    await exchange.start() -> Head          connects, sends, waits for status line and headers
    await exchange.read()  -> bytes         all that has come since the last read; b"" = the body ended cleanly
    await exchange.read(offer)              what comes while it waits is offered first, without a task switch
    exchange.close()                        always; at any moment; idempotent; cancels upstream if not ended
    exchange.abort(error)                   the supervisor knows better: whoever waits, or reads next, gets this error

A clean end of a close-delimited body says nothing about completeness: mlx_lm.server is HTTP/1.0, and a killed one ends
its stream exactly as a finished one does. Whether an answer is whole is judged from its content, not here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from backends.domain.failure import Sent

Headers = tuple[tuple[bytes, bytes], ...]
Offer = Callable[[bytes], bool]
"""Takes what has come, and says True; or does not, and it is for the reader."""


@dataclass(frozen=True, slots=True)
class Request:
    """``headers`` without Host, Content-Length and Connection: the client of the wire sets those."""

    method: str  # "POST"
    path: str  # "/v1/chat/completions"
    body: bytes = b""
    headers: Headers = ()


@dataclass(frozen=True, slots=True)
class Head:
    status: int
    headers: Headers  # names in lower case, in the order received

    def get(self, name: bytes, default: bytes = b"") -> bytes:
        for key, value in self.headers:
            if key == name:
                return value
        return default


class Fault(StrEnum):
    """How an exchange ended before its time, as seen on the wire."""

    REFUSED = "refused"  # nobody listens
    CONNECT_RESET = "connect_reset"  # reset, or closed, while connecting: a full listen backlog does that
    CONNECT_TIMEOUT = "connect_timeout"
    UNREACHABLE = "unreachable"  # no route, no such host, TLS failed
    EXHAUSTED = "exhausted"  # this process has no descriptors, ports or memory left: nothing is said of the backend
    RESET = "reset"  # reset after the request was (partly) written
    EOF_BEFORE_HEAD = "eof_before_head"  # closed without a status line
    INCOMPLETE = "incomplete"  # ended short of its Content-Length, or in mid-chunk
    PROTOCOL = "protocol"  # not HTTP
    STALLED = "stalled"  # nothing came for too long
    DIED = "died"  # the supervisor saw the process go, or condemned it
    DEADLINE = "deadline"  # timeouts.total


NOT_SENT = frozenset({Fault.REFUSED, Fault.CONNECT_RESET, Fault.CONNECT_TIMEOUT, Fault.UNREACHABLE, Fault.EXHAUSTED})


class ExchangeError(Exception):
    """``detail`` is one clause for people: "connection refused by 127.0.0.1:8081"."""

    def __init__(self, fault: Fault, detail: str) -> None:
        super().__init__(f"{fault.value}: {detail}")
        self.fault = fault
        self.detail = detail

    @property
    def sent(self) -> Sent:
        return Sent.NOTHING if self.fault in NOT_SENT else Sent.MAYBE


class Exchange(Protocol):
    """One call. ``last_heard`` is the event loop's time at the last byte from the backend, 0.0 before the first.

    ``waiting_since`` is when the pending ``start`` or ``read`` began to wait; 0.0 when nobody waits. While a client
    does not take what it asked for, nobody reads from the backend either, and its silence is none of its fault.
    """

    last_heard: float

    @property
    def waiting_since(self) -> float: ...

    async def start(self) -> Head: ...

    async def read(self, offer: Offer | None = None) -> bytes: ...

    def abort(self, error: ExchangeError) -> None: ...

    def close(self) -> None: ...


class Dialer(Protocol):
    """Opens exchanges to one life of one backend."""

    def open(self, request: Request) -> Exchange: ...

    async def aclose(self) -> None: ...

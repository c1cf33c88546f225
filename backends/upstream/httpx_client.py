"""HTTP(S) to a remote server, over httpx: TLS, proxies of the environment, host names. Off the hot path.

One task per exchange sends the request and fills the same ``Answer`` as ``h1_client``; closing and aborting cancel it.

Caveats:

* httpx errors hide their cause: a refused connection lies two causes deep, and h11's protocol errors differ in their
  text only. ``_translate`` is the only place that knows this.
* A name is resolved apart from connecting (``resolver``), below httpx: the URL, and with it the Host header and the
  name in the certificate, stays what it was.
* One fault differs from ``h1_client``: h11 waits for a blank line before it parses, so an answer without a status line
  that just ends is EOF_BEFORE_HEAD here.

Import this module only where a remote backend is configured: the import of httpx takes some 60 ms.
"""

import asyncio
import socket
import ssl
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from http.cookiejar import CookieJar, DefaultCookiePolicy
from urllib.parse import urlsplit

import httpcore
import httpx

from backends.domain.spec import Remote
from backends.upstream.exchange import WORKS_ON, Exchange, ExchangeError, Fault, Head, Offer, Request, Watcher, through
from backends.upstream.h1_client import HIGH_WATER, RESETS
from backends.upstream.h1_response import Answer, End, close_delimited
from backends.upstream.locality import hint
from backends.upstream.proxies import proxy_for, shown
from backends.upstream.resolver import Lookup, Resolver

NOT_THE_LAST = 1.5  # seconds for the connection to an address of a name, while there are others to try
LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=0)


@cache
def _tls() -> ssl.SSLContext:
    """One context for all dialers: loading the CA certificates takes 100 ms and more, also where only http is used."""
    return httpx.create_ssl_context()


class _Backend(httpcore.AsyncNetworkBackend):
    """Connects to the addresses of a name one after the other."""

    def __init__(self, resolver: Resolver) -> None:
        self._resolver = resolver
        self._inner = httpcore.AnyIOBackend()

    async def connect_tcp(  # noqa: PLR0917  httpcore's interface
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Raises ExchangeError for a name that cannot be resolved, else what httpcore raises."""
        *others, last = await self._resolver.addresses(host)
        failures: list[Exception] = []
        for address in (*others, last):
            limit = timeout if address is last or timeout is None else min(timeout, NOT_THE_LAST)
            try:
                return await self._inner.connect_tcp(address, port, limit, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failures.append(error)
        self._resolver.forget(host)
        if len(failures) == 1:
            raise failures[0]
        failed = httpcore.ConnectError(f"none of {len(failures)} addresses answers")
        failed.__context__ = ExceptionGroup("", failures)  # a cause would be lost: the pool raises ``from None``
        raise failed


@dataclass(frozen=True, slots=True)
class Route:
    """``client`` connects to the server, or to ``proxy``; that is shown in messages, "" = none."""

    client: httpx.AsyncClient
    proxy: str


class HttpxExchange:
    """Implements ``Exchange``."""

    local_port = 0  # the connection is hidden, and the log of a remote server too

    def __init__(self, dialer: "HttpxDialer", request: httpx.Request) -> None:
        self._loop = asyncio.get_running_loop()
        self.last_heard = 0.0
        self.pieces = 0
        self._dialer = dialer
        self._request = request
        self._answer = Answer()
        self._drained = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._watcher: Watcher | None = None
        self._hung_up = False

    @property
    def waiting_since(self) -> float:
        return self._answer.waiting_since

    @property
    def working(self) -> bool:
        return self._task is not None and not self._task.done() and not self._hung_up

    async def start(self) -> Head:
        if self._answer.end is None:
            self._task = self._dialer.track(self._loop.create_task(self._run()))
            self._task.add_done_callback(self._ended)
        return await self._answer.wait_head()

    async def read(self, offer: Offer | None = None) -> bytes:
        data = await self._answer.take(offer)
        self._drained.set()
        return data

    def abort(self, error: ExchangeError) -> None:
        self._answer.overrule(error)
        if not (self.working and error.fault in WORKS_ON):
            self._hang_up()

    def abandon(self, watcher: Watcher) -> None:
        self._watcher = watcher
        self._answer.discard()
        self._drained.set()

    def close(self) -> None:
        # RESET has no better fit; only another task that still waits on this exchange sees the error.
        self._answer.finish(ExchangeError(Fault.RESET, f"the connection to {self._dialer.url} was closed on our side"))
        self._answer.discard()
        self._watcher = None
        self._hang_up()

    async def _run(self) -> None:
        route = await self._dialer.route()
        response = await route.client.send(self._request, stream=True)
        try:
            self.last_heard = self._loop.time()
            if response.status_code < 200:  # httpx skips all but 101
                raise httpx.RemoteProtocolError("unexpected 101 Switching Protocols")
            headers = tuple((name.lower(), value) for name, value in response.headers.raw)
            self._answer.begin(Head(response.status_code, headers, route.proxy))
            async for chunk in response.aiter_raw():
                self.last_heard = self._loop.time()
                self.pieces += 1
                if self._watcher is not None:
                    if self._watcher.heard(chunk):
                        self._watcher = None
                        return
                    continue
                self._answer.put(chunk)
                while self._answer.size > HIGH_WATER:
                    self._drained.clear()
                    await self._drained.wait()
            self._answer.finish(End.EOF if close_delimited(headers) else End.COMPLETE)
        finally:
            await response.aclose()

    def _ended(self, task: asyncio.Task[None]) -> None:
        exc = asyncio.CancelledError() if task.cancelled() else task.exception()
        if exc is not None:
            self._answer.finish(
                _translate(exc, self._dialer.target, self._dialer.host, answering=self._answer.head is not None)
            )
        watcher, self._watcher = self._watcher, None
        if watcher is not None:
            watcher.over()

    def _hang_up(self) -> None:
        self._hung_up = True
        if self._task is not None:
            self._task.cancel()


class HttpxDialer:
    """Opens exchanges to one remote server. ``url`` and ``api_key`` as in ``Remote``.

    Each exchange has its own connection: a pooled one that the server has meanwhile closed would look like a crash.
    No read timeout: the liveness monitor judges silence by ``last_heard``.
    """

    def __init__(self, remote: Remote, *, connect_timeout: float = 5.0, lookup: Lookup = socket.getaddrinfo) -> None:
        self.url = remote.url
        self.host = urlsplit(remote.url).hostname or ""
        self._remote = remote
        self._resolver = Resolver(lookup)
        self._choosing = asyncio.Lock()
        self._route: Route | None = None
        self._authorization = b"Bearer " + remote.api_key.encode() if remote.api_key else b""
        self._timeouts = {"connect": connect_timeout, "read": None, "write": None, "pool": None}
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False

    @property
    def target(self) -> str:
        """For messages: the URL, and the proxy if there is one."""
        return self.url + through(self._route.proxy if self._route is not None else "")

    async def route(self) -> Route:
        """Chosen once. Raises ExchangeError for a proxy that cannot be used."""
        async with self._choosing:
            if self._route is None:
                proxy = await asyncio.to_thread(proxy_for, self._remote.url, self._remote.proxy)
                self._route = Route(_client(proxy, self._resolver), shown(proxy) if proxy else "")
            return self._route

    def open(self, request: Request) -> Exchange:
        headers = list(request.headers)
        if self._authorization:
            headers = [pair for pair in headers if pair[0].lower() != b"authorization"]
            headers.append((b"Authorization", self._authorization))
        if not any(name.lower() == b"accept-encoding" for name, _ in headers):
            headers.append((b"Accept-Encoding", b"identity"))  # the body is passed on undecoded
        headers.append((b"Connection", b"close"))
        # Not client.build_request: it merges cookies and the defaults of the client.
        exchange = HttpxExchange(
            self,
            httpx.Request(
                request.method,
                self.url + request.path,
                headers=headers,
                content=request.body,
                extensions={"timeout": self._timeouts},
            ),
        )
        if self._closed:
            exchange.abort(ExchangeError(Fault.REFUSED, f"no more calls to {self.url}: its client is closed"))
        return exchange

    def track(self, task: asyncio.Task[None]) -> asyncio.Task[None]:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def aclose(self) -> None:
        self._closed = True
        tasks = tuple(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._route is not None:
            await self._route.client.aclose()


def _client(proxy: str, resolver: Resolver) -> httpx.AsyncClient:
    """Raises ExchangeError for a proxy that cannot be used."""
    try:
        transport = httpx.AsyncHTTPTransport(verify=_tls(), trust_env=False, limits=LIMITS, proxy=proxy or None)
    except (ImportError, ValueError) as error:  # socks without its package; a scheme that httpx does not know
        raise ExchangeError(Fault.UNREACHABLE, f"cannot use the proxy {shown(proxy)}: {error}") from error
    transport._pool._network_backend = _Backend(resolver)  # noqa: SLF001  httpx hands no backend to its pool
    client = httpx.AsyncClient(
        transport=transport,
        trust_env=False,
        cookies=CookieJar(DefaultCookiePolicy(allowed_domains=())),  # clients must not share cookies
    )
    client.headers.clear()
    return client


def _translate(exc: BaseException, target: str, host: str, *, answering: bool) -> ExchangeError:
    where = "in the middle of its answer" if answering else "before its answer"
    match exc:
        case ExchangeError():
            return exc
        case httpx.ConnectTimeout():
            error = ExchangeError(Fault.CONNECT_TIMEOUT, f"connecting to {target} timed out")
        case httpx.ConnectError():
            error = _connect_error(exc, target, host)
        case httpx.ProxyError() | httpx.UnsupportedProtocol():
            error = ExchangeError(Fault.UNREACHABLE, f"cannot connect to {target}: {exc}")
        case httpx.RemoteProtocolError() if not answering and "without sending a response" in str(exc):
            error = ExchangeError(Fault.EOF_BEFORE_HEAD, f"{target} closed the connection without an answer")
        case httpx.RemoteProtocolError() if answering and "peer closed connection" in str(exc):
            error = ExchangeError(Fault.INCOMPLETE, f"{target} closed the connection in the middle of its answer")
        case httpx.NetworkError():
            error = ExchangeError(Fault.RESET, f"{target} reset the connection {where}")
        case httpx.ProtocolError():
            error = ExchangeError(Fault.PROTOCOL, f"{target} does not speak HTTP: {exc}")
        case _:  # cancelled with the whole loop, or a bug: the pending read must still end
            error = ExchangeError(Fault.RESET, f"the call to {target} failed {where}: {exc!r}")
    error.__cause__ = exc
    return error


def _connect_error(exc: BaseException, target: str, host: str) -> ExchangeError:
    roots = tuple(_roots(exc))
    if any(isinstance(root, RESETS) for root in roots):
        return ExchangeError(Fault.CONNECT_RESET, f"{target} reset the connection while connecting")
    if all(isinstance(root, ConnectionRefusedError) for root in roots):
        return ExchangeError(Fault.REFUSED, f"connection refused by {target}")
    return ExchangeError(Fault.UNREACHABLE, f"cannot connect to {target}: {roots[0]}{hint(roots[0], host)}")


def _roots(exc: BaseException) -> Iterator[BaseException]:
    """The root causes of ``exc``: a host name with several addresses gives a group of them."""
    below = exc.__cause__ or exc.__context__  # httpcore's pool re-raises ``from None``: only the context is left
    if isinstance(exc, BaseExceptionGroup):
        for each in exc.exceptions:
            yield from _roots(each)
    elif below is not None:
        yield from _roots(below)
    else:
        yield exc

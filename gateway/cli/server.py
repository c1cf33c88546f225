"""Listening, and the orderly shutdown.

    SIGTERM, SIGINT    new requests are refused, those in flight may finish within ``drain_timeout``, then the backends
                       are stopped
    a second signal    requests and backends are ended at once

The socket is bound before any backend is started: if the port is in use, the gateway only prints the message.
"""

import asyncio
import contextlib
import errno
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator, Mapping

import uvicorn

from backends.domain.inflight_limit import inflight_limits
from backends.process import ports
from backends.process.reaping import reap_orphans
from backends.process.run_record import state_dir
from backends.upstream import descriptors
from gateway.app import application, running
from gateway.config import Config
from gateway.http.connection_table import ConnectionTable, limit_of
from gateway.http.service import Service
from gateway.http.uvicorn_protocol import bounded

log = logging.getLogger(__name__)

BACKLOG = 2048


class CannotListen(Exception):
    """The message names the process that holds the port, and the remedy."""


def bind(host: str, port: int) -> socket.socket:
    """Raises CannotListen."""
    with contextlib.suppress(OSError):  # of the host: ``sock.bind`` raises the same
        if port and ports.hidden_by_loopback(host, port):
            taken = OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
            raise CannotListen(f"cannot listen on {host}:{port}: {_why(taken, host, port)}")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise CannotListen(f"cannot listen on {host}:{port}: {_why(error, host, port)}") from error
    sock.setblocking(False)
    return sock


def _why(error: OSError, host: str, port: int) -> str:
    if isinstance(error, socket.gaierror):
        return f"{error.strerror}; give --host an address of this machine, such as 127.0.0.1 or 0.0.0.0"
    match error.errno:
        case errno.EADDRINUSE:
            holder = ports.holder(host, port) or "another process"
            return f"{error.strerror}, held by {holder}; stop it, or choose another port with --port"
        case errno.EADDRNOTAVAIL:
            return f"{error.strerror}; give --host an address of this machine, such as 127.0.0.1 or 0.0.0.0"
        case errno.EACCES:
            return f"{error.strerror}; ports below 1024 need root; choose another port with --port"
        case _:
            return f"{error.strerror}; choose another address with --host and --port"


class _Server(uvicorn.Server):
    """Signals are handled in this module: uvicorn's handler would cut requests off instead of draining them."""

    def __init__(self, config: uvicorn.Config, announce: Callable[[], None]) -> None:
        super().__init__(config)
        self._announce = announce

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._announce()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve(config: Config, sock: socket.socket, environ: Mapping[str, str], hint: str = "") -> None:
    """Runs until a signal ends it. Returns when every backend has exited. ``hint``: printed once the socket listens."""
    folder = state_dir(environ)
    for orphan in await asyncio.to_thread(reap_orphans, folder):
        log.warning("orphan ended", extra={"backend": orphan.backend, "pid": orphan.pid, "killed": orphan.killed})
    async with running(config, folder) as service:
        server = _Server(_uvicorn(service), lambda: _announce(sock, hint))
        stopping = asyncio.Event()
        _handle_signals(service, stopping)
        serving = asyncio.ensure_future(server.serve(sockets=[sock]))
        stop = asyncio.ensure_future(stopping.wait())
        await asyncio.wait({serving, stop}, return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        await service.drain(config.server.drain_timeout)
        server.should_exit = True
        await serving


def _uvicorn(service: Service) -> uvicorn.Config:
    return uvicorn.Config(
        application(service),
        http=bounded(ConnectionTable(_connections(service))),
        loop="none",
        lifespan="off",
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # the client's address is used only to recognise retries; X-Forwarded-For is untrusted
        timeout_keep_alive=75,
        timeout_graceful_shutdown=5,
    )


def _connections(service: Service) -> int:
    """How many connections to admit. Beyond the descriptors there are, the system would drop them without a word."""
    wanted = service.config.server.max_connections
    open_files = descriptors.limit()
    replicas = service.fleet.backends.values()
    upstream = sum(inflight_limits(replica.spec).most for replica in replicas)
    limit = limit_of(wanted, descriptors=open_files, upstream=upstream, replicas=len(replicas))
    if limit < wanted:
        remedy = "raise it with `ulimit -n` (launchd: NumberOfFiles)"
        fields = {"max_connections": wanted, "limit": limit, "open_files": open_files, "remedy": remedy}
        log.warning("fewer connections than configured", extra=fields)
    return limit


def _announce(sock: socket.socket, hint: str) -> None:
    host, port = sock.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    print(f"listening on {url}", flush=True)
    if hint:
        print(hint.format(url=url), flush=True)


def _handle_signals(service: Service, stopping: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()

    def stop(name: str) -> None:
        if stopping.is_set():
            log.warning("stopping at once", extra={"signal": name})
            service.end_all()
            service.fleet.kill()
        else:
            log.info("draining", extra={"signal": name, "drain_timeout": service.config.server.drain_timeout})
            stopping.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number.name)
    # The default action of SIGHUP ends the process. Reloading is not supported yet, so it only logs.
    loop.add_signal_handler(signal.SIGHUP, log.warning, "SIGHUP: reloading the config is not supported yet; restart")

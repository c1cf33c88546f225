"""Runs a gateway from a config, for ``serve`` and ``demo``."""

import asyncio
import contextlib
import gc
import os
import resource
import sys
from dataclasses import replace
from pathlib import Path

import uvloop

from backends.process.child import reap_here
from gateway.app import NoState
from gateway.cli import logfmt
from gateway.cli.background_writer import background_output
from gateway.cli.check import read
from gateway.cli.demo_model.home import make_missing
from gateway.cli.server import CannotListen, bind
from gateway.cli.server import serve as serve_on
from gateway.cli.terminal import printable
from gateway.config import Config, is_loopback


def serve(path: Path, *, host: str | None, port: int | None) -> int:
    """Exit status: 0 after an orderly shutdown, 1 if the gateway could not run, 2 for an invalid config."""
    config = read(path)
    if config is None:
        return 2
    config = replace(
        config,
        server=replace(
            config.server,
            host=host or config.server.host,
            port=config.server.port if port is None else port,
        ),
    )
    if not is_loopback(config.server.host) and not config.server.api_keys:
        _say(f"--host {config.server.host}: expected server.api_keys to be set for a host that others can reach")
        return 2
    return run(config)


def run(config: Config, *, hint: str = "") -> int:
    """``hint``: printed once the gateway listens, with ``{url}`` filled in."""
    with background_output(logfmt.dropped):
        logfmt.set_up()
        return _run(config, hint)


def _run(config: Config, hint: str) -> int:
    _raise_descriptor_limit()
    reap_here()
    try:
        sock = bind(config.server.host, config.server.port)
    except CannotListen as error:
        _say(str(error))
        return 1
    with sock:
        if not make_missing(config):
            return 1
        _tame_gc()
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(serve_on(config, sock, dict(os.environ), hint))
        except NoState as error:
            _say(f"{error}; set MLX_GATEWAY_STATE_DIR to a writable folder")
            return 1
    return 0


def _tame_gc() -> None:
    """Imported modules are never garbage, and each collection would scan the live objects of a thousand streams for
    nothing. Requests leave few cycles, so rare collections are enough."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 50, 100)


def _raise_descriptor_limit() -> None:
    """A request takes two descriptors. macOS (launchd too) allows a process 256 unless it raises its limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # macOS refuses more than its kern.maxfilesperproc, 10240 (OPEN_MAX) or more, though the hard limit is infinite.
    for wanted in (65536, 49152, 24576, 10240):
        target = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        if target <= soft:
            return
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (target, hard))
            return


def _say(text: str) -> None:
    print(printable(text), file=sys.stderr)

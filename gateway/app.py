"""The composition root: config in, a running gateway out. The only file that knows every concrete class."""

import asyncio
import contextlib
import os
import random
import time
from collections.abc import AsyncIterator
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from backends import machine, peaks
from backends.fleet import Fleet
from backends.guard import Janitor
from backends.peaks import Peaks
from backends.room import Room
from backends.runfile import RunFile
from backends.surroundings import Surroundings
from backends.tasks import Tasks
from gateway import errors
from gateway.config import Config
from gateway.endpoints import Endpoints, failure
from gateway.errors import Code, GatewayError
from gateway.estimates import budget, sizes
from gateway.front import Front
from gateway.plan import plans
from gateway.service import Service

EXPOSED = [  # what a script in a page may read
    "retry-after",
    "x-gateway-attempts",
    "x-gateway-backend",
    "x-gateway-model",
    "x-gateway-normalized",
    "x-gateway-warning",
    "x-request-id",
    "x-should-retry",
]


class NoState(Exception):
    """Children that nobody could find again are not started. The message says where and why."""


@contextlib.asynccontextmanager
async def running(config: Config, state_dir: Path) -> AsyncIterator[Service]:
    """A gateway whose backends are on their way; when this ends they are gone. Raises NoState."""
    loop = asyncio.get_running_loop()
    try:
        runfile = RunFile(state_dir)
    except OSError as error:
        raise NoState(f"cannot keep the record of child processes in {state_dir}: {error.strerror or error}") from error
    janitor = Janitor(runfile.path)
    room = Room(
        clock=loop.time,
        available=machine.available,
        budget=budget(config),
        estimates=sizes(config),
        peaks=Peaks(state_dir / peaks.NAME),
    )
    world = Surroundings(
        clock=loop.time,
        wall=time.time,
        chance=random.random,
        children=runfile,
        environ=dict(os.environ),
        room=room,
    )
    fleet = Fleet(plans(config), world, janitor)
    service = Service(config, fleet, clock=loop.time, created=int(time.time()))
    tasks = Tasks("gateway")
    try:
        fleet.start()
        tasks.start(service.hang_up_on_the_stuck(), "stuck clients")
        tasks.start(service.prove(), "self-tests")
        yield service
    finally:
        await tasks.close()
        await fleet.close()
        runfile.close()
        await janitor.close()


def application(service: Service) -> ASGIApp:
    server = service.config.server
    handlers = {HTTPException: _http_error, Exception: _bug}
    endpoints = Endpoints(service)
    routed = Starlette(routes=endpoints.routes(), exception_handlers=handlers)
    routed.router.redirect_slashes = False  # it would send clients to whatever their Host header says
    app: ASGIApp = Front(
        routed,
        api_keys=server.api_keys,
        max_connections=server.max_connections,
        origins=server.cors_origins,
        direct=endpoints.direct,
    )
    if server.cors_origins:  # outermost: a browser shows a script even a 401 only with its headers
        app = CORSMiddleware(
            app,
            allow_origins=server.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=EXPOSED,
        )
    return app


async def _bug(request: Request, _: Exception) -> Response:
    return failure(request, errors.bug(request.scope["request_id"]))


async def _http_error(request: Request, error: Exception) -> Response:
    """What the router itself refuses."""
    if not isinstance(error, HTTPException):
        raise error
    where = f"{request.method} {request.url.path}"
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        message = f"{where}: this path takes {allowed}"
        extra = ((b"allow", allowed.encode()),)
        return failure(request, GatewayError(Code.METHOD_NOT_ALLOWED, message, extra_headers=extra))
    message = f"{where}: no such path; try /v1/chat/completions, /v1/models or /health"
    return failure(request, GatewayError(Code.NOT_FOUND, message))

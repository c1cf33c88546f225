"""The composition root: builds a running gateway from a config. The only module that imports every concrete class."""

import asyncio
import contextlib
import os
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from backends.fleet import Fleet
from backends.memory import holders
from backends.memory.host import HostMemory
from backends.memory.learned_sizes import high_water_marks, idle_sizes
from backends.memory.scheduler import MemoryScheduler
from backends.memory.shares import Shares
from backends.process.learned import Learned
from backends.process.reaper_control import ReaperHandle
from backends.process.run_record import RunRecord
from backends.replica.learned_rates import Rates, learned_rates
from backends.replica.load_times import load_times
from backends.replica.runtime import Runtime
from backends.tasks import Tasks
from gateway.api import errors
from gateway.api.errors import Code, GatewayError
from gateway.config import Config
from gateway.forward.attempt import Attempts
from gateway.forward.body_workers import BodyWorkers
from gateway.forward.determinism import DeterminismTest
from gateway.forward.forwarder import Forwarder
from gateway.http.endpoints import Endpoints, failure
from gateway.http.middleware import AccessMiddleware
from gateway.http.service import SEND_TIMEOUT, Service
from gateway.http.web_guard import WebGuard
from gateway.plan import plans, routes, rules
from gateway.policy.request_guard import RequestGuard
from gateway.sizing import SizeCache, budget

API_KEY_VARIABLE = "MLX_GATEWAY_API_KEY"  # of a client of the gateway, such as ``mlx-gateway status``
EXPOSED = [  # response headers that a script in a web page may read
    "retry-after",
    "x-gateway-attempts",
    "x-gateway-backend",
    "x-gateway-model",
    "x-gateway-normalized",
    "x-gateway-queue",
    "x-gateway-warning",
    "x-request-id",
    "x-should-retry",
]


class NoState(Exception):
    """The record of child processes cannot be written, so no child is started: after a crash of the gateway its
    children could not be found.

    The message gives the path and the cause.
    """


@contextlib.asynccontextmanager
async def running(config: Config, state_dir: Path) -> AsyncIterator[Service]:
    """A gateway whose backends are being started; they have exited when the context ends. Raises NoState."""
    loop = asyncio.get_running_loop()
    try:
        run_record = RunRecord(state_dir)
    except OSError as error:
        raise NoState(f"cannot keep the record of child processes in {state_dir}: {error.strerror or error}") from error
    reaper = ReaperHandle(run_record)
    memory = HostMemory(loop.time)
    sizes = SizeCache(config)
    total = memory.memory().total
    peaks, bases = high_water_marks(state_dir, total=total), idle_sizes(state_dir, total=total)
    shares = Shares(
        total=total,
        available=memory.available,
        budget=budget(config),
        appetites=sizes.appetites(),
        peaks=peaks,
        bases=bases,
    )
    loads, rates = load_times(state_dir), learned_rates(state_dir, total=total)
    learned: tuple[Learned[Any], ...] = (peaks, bases, loads, rates)
    scheduler = MemoryScheduler(
        clock=loop.time,
        available=memory.available,
        budget=budget(config),
        estimates=sizes.estimates(),
        peaks=peaks,
        shares=shares,
        occupancies=holders.occupancy,
    )
    runtime = _runtime(config, run_record, memory, scheduler, loads=loads, rates=rates, sizes=sizes, clock=loop.time)
    fleet = Fleet(plans(config), runtime, reaper)
    workers = BodyWorkers()
    forwarder = forwarder_of(config, fleet, workers, loop.time)
    service = service_of(config, fleet, forwarder, workers, clock=loop.time, created=int(time.time()))
    tasks = Tasks("gateway")
    async with contextlib.AsyncExitStack() as ends:  # last first; each callback runs even if the one before it raises
        ends.push_async_callback(reaper.close)
        ends.push_async_callback(asyncio.to_thread, run_record.close)
        for each in learned:
            ends.push_async_callback(asyncio.to_thread, each.save)
        ends.callback(workers.close)
        ends.push_async_callback(fleet.close)
        ends.push_async_callback(tasks.close)
        fleet.start()
        for each in learned:
            tasks.start(each.keep_saved(), each.what)
        tasks.start(service.hang_up_on_the_stuck(), "stuck clients")
        tasks.start(run_self_tests(config, fleet, forwarder), "self-tests")
        yield service


def _runtime(
    config: Config,
    children: RunRecord,
    memory: HostMemory,
    scheduler: MemoryScheduler,
    *,
    loads: Learned[float],
    rates: Learned[Rates],
    sizes: SizeCache,
    clock: Callable[[], float],
) -> Runtime:
    return Runtime(
        clock=clock,
        wall=time.time,
        chance=random.random,
        children=children,
        environ=for_children(os.environ, config),
        scheduler=scheduler,
        host=memory,
        measure=sizes.measure,
        batch_cost=sizes.batch_cost,
        doubled=sizes.doubled,
        load_times=loads,
        rates=rates,
    )


def for_children(environ: Mapping[str, str], config: Config) -> dict[str, str]:
    """The environment of backends: ours, but for the secrets that are meant for the gateway."""
    own = config.secret_variables | {API_KEY_VARIABLE}
    return {name: value for name, value in environ.items() if name not in own}


def forwarder_of(config: Config, fleet: Fleet, workers: BodyWorkers, clock: Callable[[], float]) -> Forwarder:
    model_rules = rules(config, workers)
    guard = RequestGuard({model: rule.max_context for model, rule in model_rules.items()})
    for name, context in guard.contexts.items():
        context.in_memory = fleet.pools[name].prompt_bound
    attempts = Attempts(model_rules, guard, workers, clock)
    show_output = config.server.expose_backend_output
    return Forwarder(
        fleet, routes(config), model_rules, attempts, guard=guard, workers=workers, clock=clock, show_output=show_output
    )


def service_of(
    config: Config,
    fleet: Fleet,
    forwarder: Forwarder,
    workers: BodyWorkers,
    *,
    clock: Callable[[], float],
    created: int,
    send_timeout: float = SEND_TIMEOUT,
) -> Service:
    """``created``: seconds since the epoch, for the list of models."""
    return Service(
        config,
        fleet,
        routes(config),
        forwarder,
        workers=workers,
        clock=clock,
        created=created,
        send_timeout=send_timeout,
    )


async def run_self_tests(config: Config, fleet: Fleet, forwarder: Forwarder) -> None:
    """Tests which models can resume an answer on another replica, or on the next instance of the only one."""
    async with asyncio.TaskGroup() as group:
        for model in config.models:
            if model.resume == "auto" and not model.urls:
                pool = fleet.pools[model.name]
                settle = partial(forwarder.proofs.__setitem__, model.name)
                group.create_task(DeterminismTest(model.name, pool, settle).run())


def application(service: Service) -> ASGIApp:
    server = service.config.server
    handlers = {HTTPException: _http_error, Exception: _internal_error}
    endpoints = Endpoints(service)
    routed = Starlette(routes=endpoints.routes(), exception_handlers=handlers)
    routed.router.redirect_slashes = False  # a redirect would lead to the host that the Host header names
    app: ASGIApp = AccessMiddleware(
        routed,
        api_keys=server.api_keys,
        max_connections=server.max_connections,
        guard=WebGuard(has_keys=bool(server.api_keys), origins=server.cors_origins, hosts=server.allowed_hosts),
        direct=endpoints.direct,
    )
    if server.cors_origins:  # outermost: a browser hides even a 401 from a script if its CORS headers are missing
        app = CORSMiddleware(
            app,
            allow_origins=server.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=EXPOSED,
        )
    return app


async def _internal_error(request: Request, _: Exception) -> Response:
    return failure(request, errors.internal_error(request.scope["request_id"]))


async def _http_error(request: Request, error: Exception) -> Response:
    """Errors of the router: unknown path, wrong method."""
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

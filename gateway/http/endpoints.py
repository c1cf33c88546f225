"""HTTP endpoints: each translates a request into a call of the service, and the result into a response."""

import asyncio
import logging
import os
from collections.abc import AsyncIterator
from importlib.metadata import version
from typing import Any

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from backends.fleet import AnyBackend
from backends.replica import events
from gateway.api import errors
from gateway.api.errors import Code, GatewayError
from gateway.api.json_codec import dumps
from gateway.api.kinds import Kind
from gateway.http import status
from gateway.http.client import ClientConnection
from gateway.http.service import Service
from gateway.http.status import model_status

log = logging.getLogger(__name__)

MODEL_PATHS = {
    "/v1/chat/completions": Kind.CHAT,
    "/chat/completions": Kind.CHAT,
    "/v1/completions": Kind.COMPLETION,
    "/completions": Kind.COMPLETION,
}
COMMANDS: dict[str, type[events.OperatorCommand]] = {
    "start": events.Start,
    "stop": events.Stop,
    "restart": events.Restart,
    "drain": events.Drain,
}
MODEL_COMMANDS = ("load", "unload")
DEFAULT_LINES = 100


class ModelEndpoint:
    """The hot path, in raw ASGI: reached without Starlette's middleware, whose wrappers would cost time for each chunk
    of a stream. So unexpected exceptions are handled here.
    """

    def __init__(self, service: Service, kind: Kind) -> None:
        self._service = service
        self._kind = kind

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        client = ClientConnection(scope, receive, send, scope["request_id"])
        try:
            await self._service.serve(client, self._kind)
        except Exception:  # last handler: the client must get an answer
            log.exception("internal error", extra={"request_id": client.request_id, "path": scope["path"]})
            if client.body_complete:
                return
            if client.headers_sent:
                raise
            await client.fail(errors.internal_error(client.request_id))


class Endpoints:
    def __init__(self, service: Service) -> None:
        self._service = service

        self.direct = {
            path: endpoint
            for bare, endpoint in ((path, ModelEndpoint(service, kind)) for path, kind in MODEL_PATHS.items())
            for path in (bare, bare + "/")
        }

    def routes(self) -> list[BaseRoute]:
        """Each path also with a trailing slash, since some clients send one. The paths of ``direct`` are listed too, so
        that methods other than POST get a 405."""
        gets = {
            "/health": self.health,
            "/livez": self.livez,
            "/readyz": self.readyz,
            "/v1/models": self.models,
            "/models": self.models,
            "/v1/models/{name:path}": self.model,
            "/models/{name:path}": self.model,
            "/api/status": self.status,
            "/api/quarantine": self.quarantine,
            "/api/backends/{id:path}/logs": self.logs,
        }
        routes: list[BaseRoute] = []
        routes += [Route(path, endpoint, methods=["POST"]) for path, endpoint in self.direct.items()]
        for path, handler in gets.items():
            variants = (path,) if path.endswith(":path}") else (path, path + "/")
            routes += [Route(variant, handler, methods=["GET"]) for variant in variants]
        routes.append(Route("/api/backends/{id:path}/{command}", self.command, methods=["POST"]))
        routes.append(Route("/api/models/{id:path}/{command}", self.of_model, methods=["POST"]))
        routes.append(Route("/api/quarantine", self.forget, methods=["DELETE"]))
        routes.append(Route("/api/quarantine/{fingerprint}", self.forget_one, methods=["DELETE"]))
        return routes

    async def health(self, request: Request) -> Response:
        """The full health for an authorized client, else only the status."""
        health = status.health(self._service.views(), draining=self._service.draining)
        if not request.scope["authorized"]:
            health = {"status": health["status"]}
        return answer(health, 503 if health["status"] == "unavailable" else 200)

    async def livez(self, _: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def readyz(self, _: Request) -> Response:
        if self._service.draining:
            return PlainTextResponse("shutting down\n", 503)
        if status.overall(self._service.views()) == "unavailable":
            return PlainTextResponse("no model can answer\n", 503)
        return PlainTextResponse("ok\n")

    async def models(self, _: Request) -> Response:
        return answer(status.models_list(self._service.views()))

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"].rstrip("/")
        view = self._service.view(name)
        if view is None:
            return _no_model(request, name)
        return answer(status.model_card(view))

    async def status(self, _: Request) -> Response:
        about = {"version": version("mlx-gateway"), "pid": os.getpid(), "draining": self._service.draining}
        about |= {"retries": self._service.retries(), "tasks": len(asyncio.all_tasks())}
        return answer(status.status(self._service.views(), about))

    async def quarantine(self, _: Request) -> Response:
        """Requests suspected of having ended backends, and the learned context ceilings."""
        return answer(self._service.known())

    async def forget(self, _: Request) -> Response:
        return answer({"cleared": self._service.forget()})

    async def forget_one(self, request: Request) -> Response:
        fingerprint = request.path_params["fingerprint"]
        if self._service.forget(fingerprint):
            return answer({"cleared": 1})
        message = f"no fingerprint {fingerprint[:100]!r} in the quarantine; GET /api/quarantine lists the known ones"
        return failure(request, GatewayError(Code.NOT_FOUND, message))

    async def logs(self, request: Request) -> Response:
        backend = self._backend(request)
        if backend is None:
            return self._no_backend(request)
        wanted = request.query_params.get("lines", str(DEFAULT_LINES))
        if not (wanted.isascii() and wanted.isdigit() and len(wanted) < 10):  # isdigit alone accepts superscripts
            message = f"lines: expected a whole number, got {wanted[:40]!r}"
            return failure(request, GatewayError(Code.INVALID_REQUEST, message, param="lines"))
        tail = backend.output.tail(int(wanted))
        if request.query_params.get("follow", "0") not in ("1", "true"):
            return PlainTextResponse("".join(f"{line}\n" for line in tail))
        return StreamingResponse(self._follow(backend, tail), media_type="text/plain; charset=utf-8")

    async def _follow(self, backend: AnyBackend, tail: list[str]) -> AsyncIterator[str]:
        """Yields lines until the client disconnects or the gateway drains."""
        changed = asyncio.Event()
        unsubscribe = [backend.output.subscribe(changed.set), self._service.on_drain(changed.set)]
        seq = backend.output.last_seq
        try:
            yield "".join(f"{line}\n" for line in tail)
            while not self._service.draining:
                changed.clear()
                for entry in backend.output.since(seq):
                    yield f"{entry.line}\n"
                    seq = entry.seq
                await changed.wait()
        finally:
            for each in unsubscribe:
                each()

    async def command(self, request: Request) -> Response:
        command = COMMANDS.get(request.path_params["command"])
        if command is None:
            return failure(request, GatewayError(Code.NOT_FOUND, f"no such command; valid: {', '.join(COMMANDS)}"))
        backend = self._backend(request)
        if backend is None:
            return self._no_backend(request)
        refused = backend.command(command())
        if refused is not None:
            error = GatewayError(
                Code.CONFLICT, f"{backend.id}: {refused}", model=backend.spec.model, backend=backend.id
            )
            return failure(request, error)
        return answer({"id": backend.id, "state": backend.state.value}, 202)

    async def of_model(self, request: Request) -> Response:
        """Load or unload a model."""
        name, command = request.path_params["id"], request.path_params["command"]
        if command not in MODEL_COMMANDS:
            known = ", ".join(MODEL_COMMANDS)
            return failure(request, GatewayError(Code.NOT_FOUND, f"no such command; valid: {known}"))
        view = self._service.view(name)
        if view is None:
            return _no_model(request, name)
        fleet = self._service.fleet
        done = fleet.load(view.name) if command == "load" else fleet.unload(view.name)
        if not done:
            status = model_status(view.snapshots).value
            message = f"{view.name}: nothing to {command}, the model is {status}"
            return failure(request, GatewayError(Code.CONFLICT, message, model=view.name))
        return answer({"id": view.name, "status": model_status(fleet.snapshots(view.name)).value}, 202)

    def _backend(self, request: Request) -> AnyBackend | None:
        return self._service.fleet.backends.get(request.path_params["id"])

    def _no_backend(self, request: Request) -> Response:
        known = ", ".join(self._service.fleet.backends)
        message = f"no backend {request.path_params['id'][:100]!r}; valid: {known}"
        return failure(request, GatewayError(Code.NOT_FOUND, message))


def _no_model(request: Request, name: str) -> Response:
    message = f"model {name[:100]!r} is not in the config; GET /v1/models lists the models"
    return failure(request, GatewayError(Code.MODEL_NOT_FOUND, message, param="model", model=name[:100]))


def answer(value: Any, status: int = 200) -> Response:
    return Response(dumps(value), status, media_type="application/json")


def failure(request: Request, error: GatewayError) -> Response:
    response = Response(errors.body(error, request.scope["request_id"]), error.status, media_type="application/json")
    for name, value in errors.headers(error):
        response.headers[name.decode()] = value.decode()
    return response

"""One running gateway: serves requests, keeps the set of active ones, and drains or ends them."""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from functools import partial

from backends.domain.priority import Priority
from backends.fleet import Fleet
from gateway.api.errors import Code, GatewayError, RequestError
from gateway.api.kinds import Kind
from gateway.config import Config
from gateway.forward.body_workers import BodyWorkers
from gateway.forward.fanout import Branch, Fanout
from gateway.forward.forwarder import Copy, Forwarder
from gateway.forward.request_state import RequestState, ms, story
from gateway.http.body_memory import BodyMemory, OutOfBodyMemory, Share
from gateway.http.client import ClientConnection, ClientLeft, KeepAlive, TooLarge
from gateway.http.status import ModelView
from gateway.policy.affinity import session_of
from gateway.policy.patience import read_timeout
from gateway.policy.priority import HEADER, priority_of
from gateway.policy.routing import Routes
from gateway.request import BodyTooLarge, ParsedRequest, Rules, decoded, parse
from gateway.request.encoding import MOST_INFLATED
from gateway.request.footprint import kept_size
from gateway.request.size import is_costly_body

log = logging.getLogger("gateway.request")

SEND_TIMEOUT = 60.0  # seconds, as nginx's send_timeout

SHUTTING_DOWN = GatewayError(
    Code.SHUTTING_DOWN, "the gateway is shutting down; send the request again once it runs again", retry_after=5.0
)


class Reason(StrEnum):
    """Why a request is ended by something other than its answer."""

    LEFT = "client_left"
    STUCK = "client_does_not_read"
    SHUTDOWN = "shutdown"


ERROR_FOR = {Reason.SHUTDOWN: SHUTTING_DOWN}  # for other reasons the client gets no answer


@dataclass(eq=False, slots=True)
class ActiveRequest:
    """A request in progress, and the task that serves it."""

    client: ClientConnection
    task: "asyncio.Task[object]"
    share: Share  # of the memory for bodies
    states: list[RequestState] = field(default_factory=list)
    reason: Reason | None = None
    began: float = 0.0  # event loop's time

    def end(self, reason: Reason) -> None:
        if self.reason is None:
            self.reason = reason
            self.task.cancel()


class Service:
    """``clock``: the event loop's time; ``created``: seconds since the epoch, for the list of models."""

    def __init__(
        self,
        config: Config,
        fleet: Fleet,
        routes: Routes,
        forwarder: Forwarder,
        *,
        workers: BodyWorkers,
        clock: Callable[[], float],
        created: int,
        send_timeout: float = SEND_TIMEOUT,
    ) -> None:
        self.config = config
        self.fleet = fleet
        self.draining = False
        self._on_drain: set[Callable[[], None]] = set()
        self._clock = clock
        self._created = created
        self._send_timeout = send_timeout
        self._workers = workers
        self._routes = routes
        self.body_memory = BodyMemory(config.server.body_memory)
        self._allow = {model.name: frozenset(model.request.allow) for model in config.models}
        self._priorities = {model.name: Priority.of(model.priority) for model in config.models}
        self._requests: set[ActiveRequest] = set()
        self._forwarder = forwarder

    # -- status --------------------------------------------------------------------------------------------------------

    def views(self) -> list[ModelView]:
        return [
            ModelView(
                name=model.name,
                aliases=model.aliases,
                created=self._created,
                queued=self.fleet.pools[model.name].queued,
                resume=self._forwarder.proofs[model.name].value,
                resumes=asdict(self._forwarder.resumes[model.name]),
                cached=asdict(self._forwarder.cached[model.name]),
                snapshots=tuple(self.fleet.snapshots(model.name)),
                decisions=self.fleet.pools[model.name].decisions,
                now=self._clock(),
            )
            for model in self.config.models
        ]

    def view(self, name: str) -> ModelView | None:
        """``name``: of the model, or an alias."""
        model = self._routes.resolve(name)
        return next((view for view in self.views() if view.name == model), None)

    def known(self) -> dict[str, object]:
        """Quarantined requests, and the learned context ceilings."""
        return self._forwarder.guard.known(self._clock())

    def forget(self, fingerprint: str = "") -> int:
        """Clear one request from the quarantine; without an argument all, and the ceilings. Returns the number of
        requests."""
        return self._forwarder.guard.forget(fingerprint)

    def retries(self) -> dict[str, int]:
        budget = self._forwarder.budget
        return {"retrying": budget.retrying, "over_budget": budget.refused}

    # -- requests -----------------------------------------------------------------------------------------------------

    async def serve(self, client: ClientConnection, kind: Kind) -> None:
        """Answer one request for a model."""
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("serve must run in a task")
        request = ActiveRequest(client, task, self.body_memory.share(), began=self._clock())
        self._requests.add(request)
        error: GatewayError | None = None
        try:
            error = await self._answer(request, kind)
        except RequestError as refused:
            error = refused.error
            await client.fail(error)
        except OutOfBodyMemory as full:
            error = _no_room(full)
            await client.fail(error)
        except ClientLeft:
            request.reason = Reason.LEFT
        except asyncio.CancelledError:
            if request.reason is None:
                raise
            task.uncancel()
            error = ERROR_FOR.get(request.reason)
            if error is not None:
                await client.fail(error)
        finally:
            self._requests.discard(request)
            request.share.release()
            self._log(request, error, request.began)

    async def _answer(self, request: ActiveRequest, kind: Kind) -> GatewayError | None:
        """Raises RequestError, OutOfBodyMemory, ClientLeft."""
        client = request.client
        if self.draining:
            raise RequestError(SHUTTING_DOWN)
        parsed = await self._received(request, kind)
        model = self._routes.resolve(parsed.model)
        if model is None:
            raise RequestError(self._unknown(parsed.model))
        # From here on a disconnect of the client ends the request, also while the backend sends nothing.
        unwatch = client.on_leave(partial(request.end, Reason.LEFT))
        interval = self.config.server.keepalive
        client.keepalive = KeepAlive(client, interval) if parsed.stream and interval else None
        try:
            return await self._run(request, parsed, model)
        finally:
            unwatch()
            if client.keepalive is not None:
                client.keepalive.stop()
                client.keepalive = None

    async def _received(self, request: ActiveRequest, kind: Kind) -> ParsedRequest:
        """The body itself is let go at the end. Raises RequestError, OutOfBodyMemory, ClientLeft."""
        body = await self._body(request)
        encoding = request.client.header(b"content-encoding")
        prepare = partial(self._prepared, kind, body, encoding, request.share)
        costly = bool(encoding) or is_costly_body(body)
        if not costly:
            return prepare()
        return await self._workers.run(prepare, self._decoded_size(body, encoding))

    async def _run(self, request: ActiveRequest, parsed: ParsedRequest, model: str) -> GatewayError | None:
        timeout = read_timeout(request.client.header(b"x-stainless-read-timeout"))
        gives_up = None if timeout is None else request.began + timeout
        priority, warning = priority_of(request.client.header(HEADER.encode()), self._priorities[model])
        if warning:
            parsed = replace(parsed, warnings=(*parsed.warnings, warning))
        new_state = partial(
            self._forwarder.state,
            client_deadline=gives_up,
            priority=priority,
            program=request.client.header(b"user-agent"),
        )
        if not parsed.parts:
            state = await new_state(request.client, parsed, model, session=session_of(request.client.header))
            request.states.append(state)
            return await self._forwarder.run(state)
        pool = self.fleet.pools[model]
        fanout = Fanout(request.client, parsed, width=max(1, pool.width // 2))
        states: dict[Branch, RequestState] = {}
        for branch in fanout.branches:
            copy = Copy(branch.part, states.get(fanout.first_of(branch)))
            states[branch] = await new_state(branch, branch.parsed, model, copy=copy)
        request.states += states.values()
        name = parsed.model or model
        return await fanout.run(lambda b: self._forwarder.run(states[b]), lambda b: states[b].responder, name)

    def _rules(self, name: str) -> Rules:
        """The rules for requests to the model of that name. Checks that need the vocabulary are deferred until the
        answering model is known."""
        allow = self._allow.get(self._routes.resolve(name) or "", frozenset())
        return Rules(defer_vocab=True, allow=allow)

    def _prepared(self, kind: Kind, body: bytes, encoding: bytes, share: Share) -> ParsedRequest:
        """Runs in a thread if the body is large. Raises RequestError, OutOfBodyMemory."""
        limit = self.config.server.max_body
        if encoding:
            share.resize(len(body) + self._decoded_size(body, encoding))
        try:
            plain = decoded(body, encoding, limit) if encoding else body
        except BodyTooLarge:
            raise RequestError(_too_large(limit)) from None
        parsed = parse(plain, kind, rules=self._rules)
        share.resize(kept_size(parsed), keep=True)
        return parsed

    def _decoded_size(self, body: bytes, encoding: bytes) -> int:
        """Bytes at most."""
        return min(self.config.server.max_body, MOST_INFLATED * len(body)) if encoding else len(body)

    async def _body(self, request: ActiveRequest) -> bytes:
        client = request.client
        if client.header(b"content-type").lower().startswith(b"multipart/"):
            message = "the body must be JSON, not a form; send it with content-type: application/json"
            raise RequestError(GatewayError(Code.UNSUPPORTED_MEDIA_TYPE, message))
        limit = self.config.server.max_body
        try:
            return await client.read_body(limit, request.share)
        except TooLarge:
            raise RequestError(_too_large(limit)) from None

    def _unknown(self, name: str) -> GatewayError:
        known = ", ".join(sorted(self._routes.names))
        if not name:
            message = f"model: name one of {known}; the config has no model or alias called 'default'"
            return GatewayError(Code.INVALID_REQUEST, message, param="model")
        message = f"model {name[:100]!r} is not in the config; known names: {known}"
        return GatewayError(Code.MODEL_NOT_FOUND, message, param="model", model=name[:100])

    def _log(self, request: ActiveRequest, error: GatewayError | None, began: float) -> None:
        """The log line of each request; exactly one."""
        client = request.client
        fields: dict[str, object] = {"request_id": client.request_id, "status": client.status}
        if request.reason is not None:
            fields["ended"] = request.reason.value
        if error is not None:
            fields["code"] = error.code.value
        if request.states:
            fields |= story(request.states, began)
        fields["ms"] = ms(self._clock() - began)
        log.log(logging.WARNING if client.status >= 500 else logging.INFO, "request", extra=fields)

    async def hang_up_on_the_stuck(self) -> None:
        """Ends the requests of clients that read nothing for ``send_timeout`` seconds. Runs as long as the gateway."""
        while True:
            await asyncio.sleep(self._send_timeout / 10)
            latest = self._clock() - self._send_timeout
            for request in tuple(self._requests):
                if 0.0 < request.client.stuck_since < latest:
                    request.end(Reason.STUCK)

    # -- shutdown ------------------------------------------------------------------------------------------------------

    def on_drain(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call ``callback`` when the gateway begins to drain. Returns a function that unsubscribes."""
        self._on_drain.add(callback)
        return lambda: self._on_drain.discard(callback)

    def _begin_drain(self) -> None:
        self.draining = True
        for callback in tuple(self._on_drain):
            callback()

    async def drain(self, grace: float) -> None:
        """Refuse new requests, wait for those in flight, and end the rest after ``grace`` seconds."""
        self._begin_drain()
        deadline = self._clock() + grace
        while self._requests and (left := deadline - self._clock()) > 0:
            await asyncio.wait(
                {request.task for request in self._requests}, timeout=left, return_when=asyncio.FIRST_COMPLETED
            )
        self.end_all()

    def end_all(self) -> None:
        self._begin_drain()
        for request in tuple(self._requests):
            request.end(Reason.SHUTDOWN)


def _no_room(full: OutOfBodyMemory) -> GatewayError:
    if not full.fits_alone:
        message = (
            f"the body needs {full.asked} bytes, more than one may have of the {full.total} of server.body_memory; "
            "send less or raise it"
        )
        return GatewayError(Code.REQUEST_TOO_LARGE, message)
    message = (
        f"the bodies of all requests take {full.held} of {full.total} bytes (server.body_memory), and this one needs "
        f"{full.asked}; send it again later"
    )
    return GatewayError(Code.OVERLOADED, message)


def _too_large(limit: int) -> GatewayError:
    message = f"the body is larger than {limit} bytes (server.max_body); send less or raise the limit"
    return GatewayError(Code.REQUEST_TOO_LARGE, message)

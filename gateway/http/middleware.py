"""The outermost layer: request id, limit of concurrent requests, API key, origin; and an answer to every request.

Raw ASGI. The order: request id, limit, key, pages of other sites (``web_guard``), then the routes.
"""

import hmac
import logging
import os
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.api import errors
from gateway.api.errors import Code, GatewayError
from gateway.http.client import ClientConnection
from gateway.http.web_guard import WebGuard

log = logging.getLogger(__name__)

SANE_ID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")
OPEN_PATHS = frozenset({"/livez", "/readyz", "/health"})  # for probes without a key; /health shows only the status then


class AccessMiddleware:
    """``api_keys``: empty = every client is authorized. ``guard``: None = one without exceptions.
    ``max_connections``: concurrent requests. ``direct``: by path, apps that get the POSTs instead of ``app``, and
    handle their exceptions themselves."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        api_keys: Sequence[str],
        max_connections: int,
        guard: WebGuard | None = None,
        direct: Mapping[str, ASGIApp] = MappingProxyType({}),
    ) -> None:
        self._app = app
        self._direct = direct
        self._guard = guard or WebGuard(has_keys=bool(api_keys))
        self._keys = [key.encode() for key in api_keys]
        self._limit = max_connections
        self._count = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        client = ClientConnection(scope, receive, send, "")
        client.request_id = scope["request_id"] = _request_id(client.header(b"x-request-id"))
        scope["authorized"] = self._authorized(client)
        error = self._over_limit_or_unauthorized(scope) or self._guard.refusal(scope["method"], scope["headers"])
        if error is not None:
            await client.fail(error)
            return
        self._count += 1
        direct = self._direct.get(scope["path"]) if scope["method"] == "POST" else None
        try:
            if direct is not None:
                await direct(scope, receive, send)
            else:
                await self._guarded(scope, receive, send, client)
        finally:
            self._count -= 1

    async def _guarded(self, scope: Scope, receive: Receive, send: Send, client: ClientConnection) -> None:
        """An unexpected exception is answered with ``internal_error``, and logged with its traceback."""
        started = body_complete = False
        id_header = (b"x-request-id", client.request_id.encode())

        async def mark(message: Message) -> None:
            nonlocal started, body_complete
            if message["type"] == "http.response.start":
                started = True
                if not any(key == b"x-request-id" for key, _ in message["headers"]):
                    message["headers"] = [*message["headers"], id_header]
            else:
                body_complete = not message.get("more_body", False)
            await send(message)

        try:
            await self._app(scope, receive, mark)
        except Exception:  # last handler: the client must get an answer
            log.exception("internal error", extra={"request_id": client.request_id, "path": scope["path"]})
            if body_complete:
                return  # Starlette's handler of errors has answered
            if started:
                raise
            await client.fail(errors.internal_error(client.request_id))

    def _over_limit_or_unauthorized(self, scope: Scope) -> GatewayError | None:
        probe = scope["path"].rstrip("/") in OPEN_PATHS
        if self._count >= self._limit and not probe:
            message = f"{self._count} requests are in flight (server.max_connections); send the request again later"
            return GatewayError(Code.OVERLOADED, message)
        if scope["authorized"] or probe:
            return None
        message = "the API key is missing or wrong; send it as `Authorization: Bearer KEY` or `x-api-key: KEY`"
        return GatewayError(Code.INVALID_API_KEY, message)

    def _authorized(self, client: ClientConnection) -> bool:
        if not self._keys:
            return True
        scheme, _, token = client.header(b"authorization").partition(b" ")
        given = [client.header(b"x-api-key")]
        if scheme.lower() == b"bearer":
            given.append(token.strip())
        # Every key is compared, each in constant time: the time taken reveals nothing about the keys.
        matches = [hmac.compare_digest(key, candidate) for key in self._keys for candidate in given]
        return any(matches)


def _request_id(given: bytes) -> str:
    """The client's id, if it is safe in a header and a log line; else a new one."""
    return given.decode() if given and SANE_ID.fullmatch(given) else f"req_{os.urandom(16).hex()}"

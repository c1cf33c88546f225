"""The outermost layer: request id, limit of concurrent requests, API key, origin; and an answer to every request.

Raw ASGI. The order: request id, limit, key, origin, then the routes.

Caveat: web pages that are open on this machine. A browser lets any page POST to 127.0.0.1, and only hides the answer
from it. Where no API key is configured, requests of pages of other sites are refused by their Origin header.
"""

import hmac
import logging
import os
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.api import errors
from gateway.api.errors import Code, GatewayError
from gateway.config import is_loopback
from gateway.http.client import ClientConnection

log = logging.getLogger(__name__)

SANE_ID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
OPEN_PATHS = frozenset({"/livez", "/readyz", "/health"})  # for probes without a key; /health shows only the status then


class AccessMiddleware:
    """``api_keys``: empty = every client is authorized. ``origins``: of pages that may POST without a key, or "*".
    ``max_connections``: concurrent requests. ``direct``: by path, apps that get the POSTs instead of ``app``, and
    handle their exceptions themselves."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        api_keys: Sequence[str],
        max_connections: int,
        origins: Sequence[str] = (),
        direct: Mapping[str, ASGIApp] = MappingProxyType({}),
    ) -> None:
        self._app = app
        self._direct = direct
        self._origins = frozenset(origins)
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
        error = self._over_limit_or_unauthorized(scope) or self._forbidden_origin(scope, client)
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

    def _forbidden_origin(self, scope: Scope, client: ClientConnection) -> GatewayError | None:
        """Comparing Origin with the Host header would not be safe: a page can let its own name resolve to this
        machine (DNS rebinding)."""
        if self._keys or scope["method"] in SAFE_METHODS or "*" in self._origins:
            return None
        origin = client.header(b"origin").decode("latin-1")
        if not origin.startswith(("http://", "https://")) or origin in self._origins or _is_local(origin):
            return None  # no web page, an application, or a page of this machine
        message = (
            f"a page of {origin[:100]} may not use this gateway; add that origin to server.cors_origins, "
            "or set server.api_keys"
        )
        return GatewayError(Code.FORBIDDEN_ORIGIN, message)

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


def _is_local(origin: str) -> bool:
    try:
        host = urlsplit(origin).hostname or ""
    except ValueError:
        return False
    return is_loopback(host) or host.endswith(".localhost")


def _request_id(given: bytes) -> str:
    """The client's id, if it is safe in a header and a log line; else a new one."""
    return given.decode() if given and SANE_ID.fullmatch(given) else f"req_{os.urandom(16).hex()}"

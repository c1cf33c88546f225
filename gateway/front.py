"""The outermost layer: who may come in, how many at once, under which request id, and nothing ends without an answer.

Raw ASGI, in the order in which it acts: request id, limit, key, then the routes within.
"""

import hmac
import logging
import re
import uuid
from collections.abc import Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.client import Client
from gateway.errors import Code, GatewayError

log = logging.getLogger(__name__)

SANE_ID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")
OPEN_PATHS = frozenset({"/livez", "/readyz", "/health"})  # for probes that have no key; /health says less then


class Front:
    """``api_keys`` empty: everybody may. ``max_connections``: requests at once."""

    def __init__(self, app: ASGIApp, *, api_keys: Sequence[str], max_connections: int) -> None:
        self._app = app
        self._keys = [key.encode() for key in api_keys]
        self._limit = max_connections
        self._count = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        client = Client(scope, receive, send, "")
        client.request_id = scope["request_id"] = _request_id(client.header(b"x-request-id"))
        scope["authorized"] = self._may(client)
        refused = self._refused(scope)
        if refused is not None:
            await client.fail(refused)
            return
        self._count += 1
        try:
            await self._guarded(scope, receive, send, client)
        finally:
            self._count -= 1

    async def _guarded(self, scope: Scope, receive: Receive, send: Send, client: Client) -> None:
        """A bug here is told to the client as what it is, and to the log with its traceback."""
        started = ended = False
        named = (b"x-request-id", client.request_id.encode())

        async def mark(message: Message) -> None:
            nonlocal started, ended
            if message["type"] == "http.response.start":
                started = True
                if not any(key == b"x-request-id" for key, _ in message["headers"]):
                    message["headers"] = [*message["headers"], named]
            else:
                ended = not message.get("more_body", False)
            await send(message)

        try:
            await self._app(scope, receive, mark)
        except Exception:  # the last line of defence: whatever it was, the client must not be left without an answer
            log.exception("internal error", extra={"request_id": client.request_id, "path": scope["path"]})
            if ended:
                return  # it was answered, by the handler of errors within
            if started:
                raise
            message = f"a bug in the gateway; its log has the traceback under request id {client.request_id}"
            await client.fail(GatewayError(Code.INTERNAL_ERROR, message))

    def _refused(self, scope: Scope) -> GatewayError | None:
        probe = scope["path"].rstrip("/") in OPEN_PATHS
        if self._count >= self._limit and not probe:
            message = f"{self._count} requests are being served (server.max_connections); send it again later"
            return GatewayError(Code.OVERLOADED, message)
        if scope["authorized"] or probe:
            return None
        message = "the API key is missing or wrong; send it as `Authorization: Bearer KEY` or `x-api-key: KEY`"
        return GatewayError(Code.INVALID_API_KEY, message)

    def _may(self, client: Client) -> bool:
        if not self._keys:
            return True
        scheme, _, token = client.header(b"authorization").partition(b" ")
        given = [client.header(b"x-api-key")]
        if scheme.lower() == b"bearer":
            given.append(token.strip())
        # Every key is compared, each in constant time: the time taken says nothing about any of them.
        matches = [hmac.compare_digest(key, one) for key in self._keys for one in given]
        return any(matches)


def _request_id(given: bytes) -> str:
    """The client's own, if it can be put into a header and a log line."""
    return given.decode() if SANE_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"

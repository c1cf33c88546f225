"""Requests that pages of other sites make a browser send to this machine: refused by Host, Origin and Sec-Fetch-Site.

    Host             of every request. A page can let its own name resolve to this machine (DNS rebinding); then it is
                     of the same site as the gateway for the browser, and may read every answer.
    Origin           of requests that change something. A browser lets any page POST to 127.0.0.1, and only hides the
                     answer from it. "null" is any page in a sandboxed frame or a local file.
    Sec-Fetch-Site   of those without Origin.

Only where no API key is configured: a page of another site does not have the key.

Pure: no I/O.
"""

import re
from collections.abc import Iterable, Sequence
from urllib.parse import urlsplit

from gateway.api.errors import Code, GatewayError
from gateway.config.parsers import is_loopback

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
UNSPECIFIED = frozenset({"0.0.0.0", "::"})  # noqa: S104 — a client that connects there reaches its own machine
MISDIRECTED = 421  # RFC 9110, 15.5.20

_AUTHORITY = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\s:@/\\?#\[\]]+))(?::[0-9]{0,5})?")


class WebGuard:
    """``has_keys``: API keys are configured. ``origins``: of pages that may call, exact, or "*". ``hosts``: names by
    which clients reach the gateway, beside loopback addresses and localhost. With keys, only they make the Host
    count."""

    def __init__(self, *, has_keys: bool, origins: Iterable[str] = (), hosts: Iterable[str] = ()) -> None:
        self._origins = frozenset(origins)
        self._hosts = frozenset(map(_canonical, hosts))
        self._checks_origin = not has_keys and "*" not in self._origins
        self._checks_host = not has_keys or bool(self._hosts)
        self._last = ""  # Host that was looked at last and is ours: of most requests it is the same

    def refusal(self, method: str, headers: Sequence[tuple[bytes, bytes]]) -> GatewayError | None:
        """``headers``: names in lower case."""
        if self._checks_host:
            for name, value in headers:
                if name == b"host" and not self._is_ours(authority := value.decode("latin-1").strip()):
                    return _misdirected(authority)
        if self._checks_origin and method not in SAFE_METHODS:
            return self._foreign_page(dict(headers))
        return None

    def _is_ours(self, authority: str) -> bool:
        """A request without Host (HTTP/1.0, a simple probe) is not from a browser; an empty one is not either."""
        if authority == self._last:
            return True
        match = _AUTHORITY.fullmatch(authority)
        if match is None or not self._is_known(_canonical(match[1] or match[2])):
            return False
        self._last = authority
        return True

    def _is_known(self, host: str) -> bool:
        return host in self._hosts or host in UNSPECIFIED or is_loopback(host) or host.endswith(".localhost")

    def _foreign_page(self, headers: dict[bytes, bytes]) -> GatewayError | None:
        origin = headers.get(b"origin", b"").decode("latin-1")
        if origin:
            return None if origin in self._origins or self._is_own_page(origin) else _forbidden(origin)
        if headers.get(b"sec-fetch-site", b"").strip().lower() == b"cross-site":
            return _forbidden("another site")
        return None

    def _is_own_page(self, origin: str) -> bool:
        try:
            parts = urlsplit(origin)
            host = parts.hostname or ""
        except ValueError:
            return False
        return parts.scheme in {"http", "https"} and self._is_known(_canonical(host))


def _canonical(host: str) -> str:
    return host.lower().removesuffix(".")


def _misdirected(authority: str) -> GatewayError:
    message = (
        f"this gateway is not known as {authority[:100]!r}; if clients shall reach it by that name, "
        "add the name to server.allowed_hosts"
    )
    return GatewayError(Code.FORBIDDEN_ORIGIN, message, http_status=MISDIRECTED)


def _forbidden(origin: str) -> GatewayError:
    page = "without an origin of its own (null)" if origin == "null" else f"of {origin[:100]}"
    remedy = (
        "set server.api_keys" if origin == "null" else "add its origin to server.cors_origins, or set server.api_keys"
    )
    return GatewayError(Code.FORBIDDEN_ORIGIN, f"a page {page} may not use this gateway; {remedy}")

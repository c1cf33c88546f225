"""Chooses the HTTP client for a server at a URL.

Plain HTTP on loopback: ``h1_client``, as for our own children. Everything else: ``httpx_client``, for TLS, host names
and proxies (``proxies`` says which hosts are reached through one).
"""

import ipaddress
from collections.abc import Callable
from urllib.parse import urlsplit

from backends.domain.spec import PROXY_AUTO, PROXY_DIRECT, Remote
from backends.upstream.exchange import Dialer
from backends.upstream.h1_client import H1Dialer


def dialer_to(remote: Remote, jitter: Callable[[], float]) -> Dialer:
    url = urlsplit(remote.url)
    host = url.hostname or ""
    if url.scheme == "http" and _is_loopback(host) and remote.proxy in (PROXY_AUTO, PROXY_DIRECT):
        key = ((b"authorization", f"Bearer {remote.api_key}".encode()),) if remote.api_key else ()
        return H1Dialer(host, url.port or 80, jitter=jitter, prefix=url.path, headers=key)
    from backends.upstream.httpx_client import HttpxDialer  # noqa: PLC0415  httpx takes some 60 ms to import

    return HttpxDialer(remote)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

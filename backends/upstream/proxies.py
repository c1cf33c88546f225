"""Chooses the proxy for a server: as configured, else as the environment says, but never for a host of our own network.

``http_proxy`` and its relatives are set for the whole machine, mostly for the way out of it; ``no_proxy`` rarely lists
each Mac of the house.
"""

import urllib.request
from urllib.parse import urlsplit

from backends.domain.spec import PROXY_AUTO, PROXY_DIRECT
from backends.upstream.locality import is_local


def proxy_for(url: str, configured: str = PROXY_AUTO) -> str:
    """The proxy's URL; "" = none. May block: on macOS, names are resolved to compare them with the exceptions in the
    system's settings."""
    if configured == PROXY_DIRECT:
        return ""
    if configured != PROXY_AUTO:
        return configured
    parts = urlsplit(url)
    host = parts.hostname or ""
    if is_local(host):
        return ""
    found = urllib.request.getproxies()
    proxy = found.get(parts.scheme) or found.get("all") or ""
    if not proxy or urllib.request.proxy_bypass(host):
        return ""
    return proxy if "://" in proxy else f"http://{proxy}"


def shown(proxy: str) -> str:
    """Without user and password."""
    parts = urlsplit(proxy)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"

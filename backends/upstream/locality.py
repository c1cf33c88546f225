"""Which hosts are on this machine or in its own network: no proxy can reach them better than we can. Pure."""

import ipaddress
import sys

_LOCAL_SUFFIXES = (".local", ".localhost", ".lan", ".internal", ".home.arpa", ".ts.net")  # the last: Tailscale
_MACOS_EHOSTUNREACH = 65
_PRIVACY_HINT = (
    "; macOS may refuse this: allow the local network in System Settings > Privacy & Security > Local Network for the "
    "app that starts the gateway, or run it from Terminal or as a launch daemon"
)


def is_local(host: str) -> bool:
    """An address that is not routed globally (private, link-local, loopback, shared), a name without a dot, or one
    under a domain for local use."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        name = host.lower().rstrip(".")
        return "." not in name or name.endswith(_LOCAL_SUFFIXES)
    return not address.is_global


def hint(error: BaseException, host: str) -> str:
    """What a person can do about a failed connection, as the end of a sentence; "" = not known.

    Since macOS 15 a process that may not use the local network gets "no route to host" for every host in it (Apple
    TN3179)."""
    refused = sys.platform == "darwin" and isinstance(error, OSError) and error.errno == _MACOS_EHOSTUNREACH
    return _PRIVACY_HINT if refused and is_local(host) else ""

"""Text → value: environment variables, numbers, durations, sizes, names, addresses. Pure.

Every parser takes the text of the file, after substitution, and returns the value or raises ``Unfit``. Numbers follow
our own rules, not those of YAML 1.1, which read ``010`` as 8, ``1:30`` as 90 and ``1e-3`` as a text.
"""

import ipaddress
import re
from collections.abc import Mapping
from decimal import Decimal
from difflib import get_close_matches
from urllib.parse import urlsplit

from backends.domain.spec import PROXY_AUTO, PROXY_DIRECT
from gateway.config.problems import Unfit, listed, show

_INTEGER = re.compile(r"[+-]?(?:0|[1-9][0-9]*(?:_[0-9]+)*)")
_DECIMAL = re.compile(r"[+-]?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_DURATION = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,18})?)\s*(ms|s|m|h)?")
_SIZE = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,18})?)\s*(b|[kmgt]i?b?)?", re.IGNORECASE)
_PERCENT = re.compile(r"([0-9]{1,3}(?:\.[0-9]{1,3})?)\s*%")
_MLX_SIZE = re.compile(r"[0-9]+(?:\.[0-9]+)?\s*(?:M|G|MB|GB)", re.IGNORECASE)
_VARIABLE = re.compile(r"\$\$\{|\$\{([^}]*)(\}?)")
_VARIABLE_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(?:\[[0-9a-f:.]+\]|[a-z0-9._~-]+)(?::[0-9]{1,5})?")
_HOST = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?\.?")

_SECONDS = {"ms": Decimal("0.001"), "s": Decimal(1), "m": Decimal(60), "h": Decimal(3600)}
_POWERS = {"k": 1, "m": 2, "g": 3, "t": 4}
_LEVELS = ("INFO", "WARNING", "ERROR", "CRITICAL")


def nearest(word: str, known: list[str]) -> str | None:
    """The known word that is most similar to ``word``; None where none is similar."""
    folded = {each.casefold().replace("_", "-"): each for each in known}
    found = get_close_matches(word.casefold().replace("_", "-"), list(folded), n=1, cutoff=0.6)
    return folded[found[0]] if found else None


def substitute(text: str, environ: Mapping[str, str]) -> str:
    """Fills in ``${NAME}`` and ``${NAME:-default}`` (as in a shell, also for an empty NAME); ``$${`` becomes ``${``."""

    def value(match: re.Match[str]) -> str:
        if match[0] == "$${":
            return "${"
        name, dash, default = match[1].partition(":-")
        if not match[2] or not _VARIABLE_NAME.fullmatch(name) or "${" in default:
            raise Unfit("${NAME} or ${NAME:-default}", "correct it, or write $${ for a literal ${", show(match[0]))
        if dash:
            return environ.get(name) or default
        if name not in environ:
            remedy = f"set {name} in the environment, or give it a default: ${{{name}:-…}}"
            raise Unfit(f"the environment variable {name}", remedy, "none of that name")
        return environ[name]

    return _VARIABLE.sub(value, text)


def variables(text: str) -> frozenset[str]:
    """The names of the variables that ``substitute`` fills into the text."""
    found = (match[1].partition(":-")[0] for match in _VARIABLE.finditer(text) if match[1] is not None)
    return frozenset(name for name in found if _VARIABLE_NAME.fullmatch(name))


def is_unicode(text: str) -> bool:
    """Whether every program that gets the text can hold it: no NUL, no lone surrogate."""
    return "\0" not in text and not any("\ud800" <= c <= "\udfff" for c in text)


def number(text: str) -> int | float | None:
    """None where the text is no number; infinity for an integer of more than 40 characters."""
    if _INTEGER.fullmatch(text):
        return int(text) if len(text) <= 40 else float("-inf" if text[0] == "-" else "inf")
    return float(text) if _DECIMAL.fullmatch(text) else None


def duration(text: str) -> float:
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        raise Unfit("a duration", "write it like 500ms, 30s, 10m or 2h, or as a number of seconds")
    return float(Decimal(match[1]) * _SECONDS[match[2] or "s"])


def size(text: str) -> int:
    """Bytes. KB, MB, GB and TB are powers of 1000 and so are K, M, G and T, as for mlx_lm.server; KiB … of 1024."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or (match[2] is None and "." in match[1]):
        raise Unfit("a size", "write it like 512MiB or 8GB, or as a whole number of bytes")
    unit = (match[2] or "b").lower()
    factor = 1 if unit == "b" else (1024 if "i" in unit else 1000) ** _POWERS.get(unit[0], 0)
    return int(Decimal(match[1]) * factor)


def budget(text: str) -> str | int:
    """``auto`` and ``80%`` stay texts; a size becomes bytes."""
    if text == "auto":
        return text
    percent = _PERCENT.fullmatch(text.strip())
    if percent is not None and 0 < Decimal(percent[1]) <= 100:
        return f"{percent[1]}%"
    try:
        return size(text)
    except Unfit:
        raise Unfit("auto, a share like 80% or a size like 48GiB", "write one of these") from None


def some_text(text: str) -> str:
    if not text:
        raise Unfit("a text that is not empty", "fill it in, or remove the line", "an empty one")
    return text


def model_name(text: str) -> str:
    """May hold slashes and colons (mlx-community/Qwen3-4B, qwen3:4b): a replica's index follows the last colon."""
    if not text or text[0] == "/" or text[-1] == "/" or not text.isprintable() or any(c.isspace() for c in text):
        raise Unfit(
            "a name without spaces or control characters, with no / at either end", "choose a name like qwen3-4b"
        )
    return text


def header_secret(text: str) -> str:
    """An API key that clients send in a header. Never shown in a message."""
    if not text:
        raise Unfit(
            "a key that is not empty", "set it (is its environment variable empty?), or remove it", "an empty one"
        )
    return sendable_key(text)


def sendable_key(text: str) -> str:
    if not all("!" <= c <= "~" for c in text):
        remedy = "take out spaces, line ends and characters beyond ASCII"
        raise Unfit("a key of printable ASCII characters without spaces", remedy, "one with other characters")
    return text


def host(text: str) -> str:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        if ":" in text or not _HOST.fullmatch(text):
            remedy = "write only the address, like 127.0.0.1, ::1 or 0.0.0.0; the port goes into port"
            raise Unfit("an IP address or a host name", remedy) from None
    return text


def allowed_host(text: str) -> str:
    """A host as clients write it in their URL, without the port."""
    bare = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    try:
        return host(bare)
    except Unfit:
        remedy = "write it like studio.example.ts.net, without scheme, port and path; wildcards are not supported"
        raise Unfit("a host name or an IP address", remedy) from None


def is_loopback(text: str) -> bool:
    """Whether only this machine can reach a server that listens at this address."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return text.rstrip(".").lower() == "localhost"
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def loopback_host(text: str) -> str:
    if not is_loopback(text):
        raise Unfit("a loopback address", "remove it: the gateway reaches its own servers on 127.0.0.1")
    return text


def cors_origin(text: str) -> str:
    if text != "*" and not _ORIGIN.fullmatch(text):
        remedy = "write it as a browser sends it: lower case, no path and no / at the end"
        raise Unfit('"*" or an exact origin like https://app.example:8443', remedy)
    return text


def url(text: str) -> str:
    """The base URL of a running server, without a trailing slash and without ``/v1``."""
    example = "write it like http://studio.local:8080"
    if not text.isascii() or not text.isprintable() or " " in text:
        raise Unfit("http://host[:port][/path]", example)
    try:
        parts = urlsplit(text)
        name, port = parts.hostname or "", parts.port
    except ValueError:
        raise Unfit("http://host[:port][/path]", example) from None
    if parts.username is not None or parts.password is not None:
        raise Unfit("a URL without credentials", "put the key into api_key", "one with a user or a password")
    if parts.query or parts.fragment or "?" in text or "#" in text:
        raise Unfit("a URL without query and fragment", example, "one with them")
    if parts.scheme not in {"http", "https"} or not _is_host(name) or port == 0:
        raise Unfit("http://host[:port][/path]", example)
    shown = f"[{name}]" if ":" in name else name
    path = parts.path.rstrip("/").removesuffix("/v1").rstrip("/")
    return f"{parts.scheme}://{shown}{'' if port is None else f':{port}'}{path}"


def proxy(text: str) -> str:
    """``auto``, ``direct``, or a URL, which may hold a user and a password. Never shown in a message."""
    if text in {PROXY_AUTO, PROXY_DIRECT}:
        return text
    expected, example = "auto, direct or the URL of a proxy", "write it like http://proxy.example:3128"
    try:
        parts = urlsplit(text)
        name, port = parts.hostname or "", parts.port
    except ValueError:
        raise Unfit(expected, example, "another text") from None
    if parts.scheme not in {"http", "https", "socks5", "socks5h"} or not _is_host(name) or port == 0:
        raise Unfit(expected, example, "another text")
    return text


def _is_host(text: str) -> bool:
    try:
        return bool(host(text))
    except Unfit:
        return False


def variable_name(text: str) -> str:
    if not text or "=" in text or "\0" in text:
        raise Unfit("the name of an environment variable", "take out the =, as in NAME: value")
    return text


def request_field(text: str) -> str:
    """A field of a request that ``request.defaults`` and ``request.force`` may set."""
    if text in {"model", "stream"}:
        raise Unfit("another field than model and stream", "remove it: the gateway sets it in every request")
    return some_text(text)


def droppable_field(text: str) -> str:
    if text in {"messages", "prompt"}:
        raise Unfit("a field that a request can do without", "remove it from the list")
    return request_field(text)


def log_level(text: str) -> str:
    if text == "DEBUG":
        raise Unfit(
            f"{listed(list(_LEVELS))}",
            "remove it: at DEBUG the server prints requests and answers, which can be taken for its own failures",
        )
    if text not in _LEVELS:
        raise Unfit(listed(list(_LEVELS)), "write one of these")
    return text


def mlx_size(text: str) -> str | int:
    """A size for mlx_lm.server, which reads only M, G, MB, GB and bare digits (``mlx_lm.utils._parse_size``)."""
    in_bytes = size(text)
    return text if _MLX_SIZE.fullmatch(text) else in_bytes

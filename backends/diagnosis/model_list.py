"""The models that a server lists at ``/v1/models``. Pure: no I/O, no clock."""

import json
from collections.abc import Iterator

MAX_SHOWN = 5  # names in a message
_LATEST = ":latest"  # Ollama lists a name without a tag so


def listed(body: bytes) -> frozenset[str] | None:
    """All names that the server knows, aliases included; None: the body is no list of models."""
    try:
        parsed: object = json.loads(body)
    except (ValueError, RecursionError):
        return None
    entries = parsed.get("data") if isinstance(parsed, dict) else parsed
    return frozenset(_names(entries)) if isinstance(entries, list) else None


def knows(names: frozenset[str], name: str) -> bool:
    return name in names or name + _LATEST in names


def shown(names: frozenset[str]) -> str:
    """For a message: the first names in order."""
    first = ", ".join(sorted(names)[:MAX_SHOWN])
    return f"{first} and {len(names) - MAX_SHOWN} more" if len(names) > MAX_SHOWN else first or "none"


def _names(entries: list[object]) -> Iterator[str]:
    for entry in entries:
        if not isinstance(entry, dict):
            continue
        if isinstance(entry.get("id"), str):
            yield entry["id"]
        aliases = entry.get("aliases")
        if isinstance(aliases, list):
            yield from (alias for alias in aliases if isinstance(alias, str))

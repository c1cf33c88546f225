"""Commands to a process that runs under the instrument. They are not confirmed. A field that is None changes nothing.

Pure: no I/O, no clock.
"""

import json
from dataclasses import dataclass
from typing import assert_never


@dataclass(frozen=True, slots=True)
class ReleasePool:
    """Give the freed buffers back to the system."""


@dataclass(frozen=True, slots=True)
class SetLimits:
    """Bytes. ``cache``: of the pool of freed buffers; ``memory``: of all that is allocated."""

    cache: int | None = None
    memory: int | None = None


@dataclass(frozen=True, slots=True)
class BoundPromptCache:
    """``size``: bytes; ``entries``: sequences. What is beyond is dropped at once."""

    size: int | None = None
    entries: int | None = None


EngineCommand = ReleasePool | SetLimits | BoundPromptCache


def encoded(command: EngineCommand) -> bytes:
    """One line, as ``instrument/instrument.py`` reads it."""
    match command:
        case ReleasePool():
            fields: dict[str, object] = {"do": "release_pool"}
        case SetLimits(cache, memory):
            fields = {"do": "limits", "cache": cache, "memory": memory}
        case BoundPromptCache(size, entries):
            fields = {"do": "prompt_cache", "bytes": size, "entries": entries}
        case _:
            assert_never(command)
    return json.dumps(fields).encode() + b"\n"

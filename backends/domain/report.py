"""What a process tells of itself, where it was started with our instrument (``instrument/instrument.py``).

Pure: no I/O, no clock.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

PREFIX = "mlx-gateway instrument: "  # of the lines that it writes to stderr

MAX_NUMBER = 1 << 62  # bytes or tokens; no figure of a machine is larger
MAX_FIXES = 64
MAX_TEXT = 64  # characters of the name of a fix, and of its state


@dataclass(frozen=True, slots=True)
class EngineReport:
    """Bytes and tokens; None = this version of the engine does not tell it.

    ``active``: memory in use; ``pooled``: freed buffers that the engine keeps; ``peak``: highest ``active`` so far;
    ``working_set``: what the device recommends as a limit. ``generating``: the generation thread runs; None = it was
    not started yet. ``reading``: members of the batch whose prompt is being read or waits in the engine;
    ``decoding``: those that generate; ``longest``: tokens of the longest member, its whole prompt and what it has
    written. ``cached_sequences``, ``cached_bytes``: the prompt cache. ``fixes``: name of each engine fix → ``on``,
    ``off`` or ``source differs``.
    """

    active: int
    pooled: int
    peak: int
    working_set: int | None = None
    generating: bool | None = None
    reading: int | None = None
    decoding: int | None = None
    longest: int | None = None
    cached_sequences: int | None = None
    cached_bytes: int | None = None
    fixes: Mapping[str, str] = field(default_factory=dict)


_NEEDED = ("active", "pooled", "peak")
_OPTIONAL = ("working_set", "reading", "decoding", "longest", "cached_sequences", "cached_bytes")


def parse_report(line: bytes) -> EngineReport:
    """Of one line. Raises ValueError, with what was expected: a line that is no report was not sent by our instrument.
    Unknown fields are ignored."""
    try:
        found: Any = json.loads(line)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError("expected an object")  # noqa: TRY004 - the one error that a caller handles
    numbers = {name: _number(name, found.get(name)) for name in _NEEDED}
    numbers |= {name: _number(name, value) for name in _OPTIONAL if (value := found.get(name)) is not None}
    generating = found.get("generating")
    if generating is not None and not isinstance(generating, bool):
        raise ValueError("generating: expected true, false or null")
    return EngineReport(**numbers, generating=generating, fixes=_fixes(found.get("fixes", {})))


def _number(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < MAX_NUMBER:
        raise ValueError(f"{name}: expected a number from 0 to 2^62")
    return value


def _fixes(value: Any) -> Mapping[str, str]:
    if not isinstance(value, dict) or len(value) > MAX_FIXES:
        raise ValueError(f"fixes: expected an object of at most {MAX_FIXES} names")
    if not all(_is_text(name) and _is_text(state) for name, state in value.items()):
        raise ValueError(f"fixes: expected printable texts of at most {MAX_TEXT} characters")
    return value


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= MAX_TEXT and value.isprintable()

"""JSON in and out: orjson, and the standard library where orjson is too strict.

Python servers legally send what orjson refuses: NaN and Infinity, lone surrogates (half an emoji, cut at a token). Both
ways fall back to ``json`` then. Caveat: orjson reads an integer beyond 64 bits as a float, without an error; no
field of the protocol holds one. What goes out is always valid JSON: non-finite numbers become null, as orjson has it.

Pure: no I/O, no clock.
"""

import contextlib
import itertools
import json
import math
from typing import Any

import orjson


def loads(data: bytes | str) -> Any:
    """Raises ValueError for anything that is not JSON, is not UTF-8, or is nested too deeply."""
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        text = data if isinstance(data, str) else data.decode("utf-8-sig")
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None


def string(escaped: bytes) -> str | None:
    """What stands between the quotes of a JSON string; None where it could not stand there."""
    try:
        text: str = orjson.loads(b'"' + escaped + b'"')
    except orjson.JSONDecodeError:
        return None
    return text


def strings(escaped: list[bytes]) -> list[str]:
    """The same for several, up to the first that could not stand there."""
    if len(escaped) > 1:
        joined = b'","'.join(escaped)
        # All at once only where there is no quote but those between them, and nothing that could make one mean another.
        if b"\\" not in joined and joined.count(b'"') == 2 * (len(escaped) - 1):
            with contextlib.suppress(orjson.JSONDecodeError):
                texts: list[str] = orjson.loads(b'["' + joined + b'"]')
                return texts
    return list(itertools.takewhile(lambda text: text is not None, map(string, escaped)))  # type: ignore[arg-type]


def dumps(obj: Any) -> bytes:
    """Raises ValueError for what JSON cannot say, and for nesting too deep."""
    try:
        return orjson.dumps(obj)
    except TypeError:
        pass
    try:
        return json.dumps(_finite(obj), ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode()
    except TypeError as exc:
        raise ValueError(str(exc)) from exc
    except RecursionError:
        raise ValueError("nested too deeply for JSON") from None


def _finite(obj: Any) -> Any:
    if isinstance(obj, float):
        return obj if math.isfinite(obj) else None
    if isinstance(obj, dict):
        return {key: _finite(value) for key, value in obj.items()}
    if isinstance(obj, (list, tuple)):
        return [_finite(value) for value in obj]
    return obj

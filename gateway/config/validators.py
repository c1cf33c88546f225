"""Single values: how each kind is read from its node, and its JSON Schema. Pure.

Every reader returns the value or raises ``Unfit``. A text that holds ``${…}`` is valid in the schema wherever a number
or another narrow value is: its value is not known before the start.
"""

import json
import math
from collections.abc import Callable
from typing import assert_never

from gateway.config import parsers
from gateway.config.field_types import Kind, Leaf, ListOf, Schema
from gateway.config.problems import Unfit, listed, show
from gateway.config.yaml_nodes import Entry, Listing, Mapping, Scalar, Value

_VARIABLE: Schema = {"type": "string", "pattern": r"\$\{"}
_DURATION = r"[0-9]+(\.[0-9]+)?\s*(ms|s|m|h)?"
_SIZE = r"[0-9]+(\.[0-9]+)?\s*([bB]|[kKmMgGtT][iI]?[bB]?)?"
_BUDGET = rf"(auto|[0-9]+(\.[0-9]+)?\s*%|{_SIZE})"
_JSON_BOOLEANS = frozenset({"true", "True", "TRUE", "false", "False", "FALSE"})
_HIGHEST = 1_000_000_000


def text(parse: Callable[[str], object] = str, what: str = "a text", *, is_secret: bool = False) -> Leaf:
    """``what`` names the expected value in messages."""
    return Leaf(lambda value: parse(as_text(value, what)), {"type": ["string", "number"]}, is_secret)


def number(low: int, high: int = _HIGHEST, *, whole: bool = True) -> Leaf:
    noun = "a whole number" if whole else "a number"
    wanted = f"{noun} of at least {low}" if high == _HIGHEST else f"{noun} from {low} to {high}"

    def read(value: Value) -> int | float:
        found = value.number if isinstance(value, Scalar) else None
        if isinstance(value, Scalar) and found is None and parsers.number(value.text) is not None:
            raise Unfit(wanted, "remove the quotes", f"the text {show(value.text)}")
        if isinstance(found, float) and whole and found.is_integer():
            found = int(found)
        if found is None or (whole and isinstance(found, float) and math.isfinite(found)):
            raise Unfit(wanted, f"write {noun}")
        if not low <= found <= high:
            raise Unfit(wanted, "write a number in this range")
        return found

    top = {} if high == _HIGHEST else {"maximum": high}
    return Leaf(read, {"anyOf": [{"type": "integer" if whole else "number", "minimum": low, **top}, _VARIABLE]})


def number_or(word: str, low: int, high: int) -> Leaf:
    """A whole number, or that word."""
    whole = number(low, high)

    def read(value: Value) -> object:
        if isinstance(value, Scalar) and value.text == word:
            return word
        try:
            return whole.read(value)
        except Unfit as unfit:
            raise Unfit(f"{word} or {unfit.expected}", unfit.remedy, unfit.got) from None

    return Leaf(read, {"anyOf": [*whole.schema["anyOf"], {"enum": [word]}]})


def duration(low: str, high: str) -> Leaf:
    """Seconds."""
    return _quantity("a duration", parsers.duration, (low, high), _DURATION)


def size(low: str, high: str) -> Leaf:
    """Bytes."""
    return _quantity("a size", parsers.size, (low, high), _SIZE)


def budget(low: str, high: str) -> Leaf:
    """Bytes, or ``auto``, or a share like ``80%``; only bytes have bounds."""
    return _quantity("auto, a share or a size", parsers.budget, (low, high), _BUDGET)


def _quantity(noun: str, parse: Callable[[str], str | int | float], shown: tuple[str, str], pattern: str) -> Leaf:
    bound = parsers.duration if parse is parsers.duration else parsers.size
    low, high = bound(shown[0]), bound(shown[1])

    def read(value: Value) -> str | int | float:
        found = parse(as_text(value, noun))
        if not isinstance(found, str) and not low <= found <= high:
            raise Unfit(f"{noun} from {shown[0]} to {shown[1]}", "write one in this range")
        return found

    bare = {"type": "number" if parse is parsers.duration else "integer", "minimum": low, "maximum": high}
    return Leaf(read, {"anyOf": [bare, {"type": "string", "pattern": rf"^\s*{pattern}\s*$"}, _VARIABLE]})


def choice(*words: str) -> Leaf:
    wanted = listed(words)

    def read(value: Value) -> str:
        # YAML reads a bare off as false; where "off" is one of the words, its meaning is clear.
        if isinstance(value, Scalar) and value.text in words:
            return value.text
        got = value.text if isinstance(value, Scalar) and not value.is_null else as_text(value, wanted)
        near = parsers.nearest(got, list(words))
        raise Unfit(wanted, f'did you mean "{near}"?' if near else "write one of these")

    return Leaf(read, {"anyOf": [{"enum": list(words)}, _VARIABLE]})


def _boolean(value: Value) -> bool:
    found = value.boolean if isinstance(value, Scalar) else None
    if found is None:
        raise Unfit("true or false", "write true or false, without quotes")
    return found


BOOLEAN = Leaf(_boolean, {"anyOf": [{"type": "boolean"}, _VARIABLE]})


def is_null(value: Value) -> bool:
    return isinstance(value, Scalar) and value.is_null


def is_secret(kind: Kind) -> bool:
    return kind.is_secret if isinstance(kind, Leaf) else isinstance(kind, ListOf) and is_secret(kind.item)


def described(value: Value, *, secret: bool = False) -> str:
    """The value, or its type, for the "got" of a problem."""
    match value:
        case Mapping():
            return "a mapping"
        case Listing():
            return "a list"
        case Scalar():
            if value.is_null:
                return "nothing (null)"
            if secret:
                return "another value (not shown)"
            shown = show(value.text) if value.quoted or value.number is None else value.text
            return f"{shown} (from {show(value.source)})" if value.substituted else shown
        case _:
            assert_never(value)


def as_entries(value: Value, what: str) -> tuple[Entry, ...]:
    if is_null(value):
        return ()  # a key whose content is commented out
    if not isinstance(value, Mapping):
        raise Unfit(what, "write key: value lines below it")
    return value.entries


def as_items(value: Value, kind: ListOf) -> tuple[Value, ...]:
    if is_null(value):
        items: tuple[Value, ...] = ()
    elif isinstance(value, Listing):
        items = value.items
    elif isinstance(value, Scalar) and not is_secret(kind):
        words = ", ".join(json.dumps(word, ensure_ascii=False) for word in value.source.split())
        raise Unfit(kind.what, f"write it as a list: [{words}]")
    else:
        raise Unfit(kind.what, "write it as a list, with - before each item")
    if len(items) < kind.at_least:
        raise Unfit(f"{kind.what} with at least one", "add one, or remove the key", "an empty one")
    return items


def as_text(value: Value, what: str) -> str:
    if isinstance(value, Mapping) and len(value.entries) == 1 and is_null(value.entries[0].value):
        braced = f"{{{value.entries[0].key}}}"  # a bare {port}
        raise Unfit(what, f'put it into quotes: "{braced}"', f"{braced}, which YAML reads as a mapping")
    if not isinstance(value, Scalar):
        raise Unfit(what, "write a single value")
    if value.is_null and not value.substituted:
        raise Unfit(what, 'fill it in, or remove the line ("" is an empty text)')
    if value.boolean is not None and not value.substituted:
        got = f"{value.text}, which YAML reads as the boolean {str(value.boolean).lower()}"
        raise Unfit(what, f'put it into quotes: "{value.text}"', got)
    if not parsers.is_unicode(value.text):
        raise Unfit(f"{what} of Unicode characters", "take out NUL characters and lone surrogates", "one with others")
    return value.text


def as_json_scalar(value: Scalar) -> object:
    """yes, no, on and off are refused: they may be meant as texts or as booleans."""
    if value.is_null:
        return None
    if value.quoted:
        return as_text(value, "a JSON value")
    if value.text in _JSON_BOOLEANS:
        return value.boolean
    found = value.number
    if found is None:
        if value.text.lstrip("+-").lower() in {".inf", ".nan"}:
            raise Unfit("a finite number", "JSON has no such number: write another, or remove the line", value.text)
        return as_text(value, "a JSON value")
    if not math.isfinite(found) or (isinstance(found, int) and not -(2**63) <= found < 2**64):
        raise Unfit("a finite number of at most 64 bits", "write a smaller one, or put it into quotes")
    return found


def as_json_text(text: str) -> str:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise Unfit("a JSON object", "write it as a mapping, like {enable_thinking: false}")
    return text

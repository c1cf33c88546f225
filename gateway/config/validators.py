"""Single values against the kinds: each function returns the value or raises ``Unfit``. Pure."""

import json
import math
from typing import assert_never

from gateway.config import mlx_flags, parsers, schema
from gateway.config.field_types import HIGHEST, Choice, Kind, ListOf, Number, Quantity, Section, Text, Unit
from gateway.config.problems import Unfit, listed, show
from gateway.config.yaml_nodes import Entry, Listing, Mapping, Scalar, Value

_PLACES = schema.places()
_QUANTITIES = {
    Unit.DURATION: ("a duration", parsers.duration),
    Unit.SIZE: ("a size", parsers.size),
    Unit.BUDGET: ("auto, a share or a size", parsers.budget),
}
_JSON_BOOLEANS = frozenset({"true", "True", "TRUE", "false", "False", "FALSE"})


def is_null(value: Value) -> bool:
    return isinstance(value, Scalar) and value.is_null


def is_secret(kind: Kind) -> bool:
    return kind.secret if isinstance(kind, Text) else isinstance(kind, ListOf) and is_secret(kind.item)


def described(value: Value, *, secret: bool = False) -> str:
    """What was got, for a problem."""
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
    if "\0" in value.text or not _encodes(value.text):
        raise Unfit(f"{what} of Unicode characters", "take out NUL characters and lone surrogates", "one with others")
    return value.text


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def as_number(value: Value, kind: Number) -> int | float:
    noun = "a whole number" if kind.whole else "a number"
    wanted = (
        f"{noun} of at least {kind.low:.0f}"
        if kind.high == HIGHEST
        else f"{noun} from {kind.low:.0f} to {kind.high:.0f}"
    )
    found = value.number if isinstance(value, Scalar) else None
    if isinstance(value, Scalar) and found is None and parsers.number(value.text) is not None:
        raise Unfit(wanted, "remove the quotes", f"the text {show(value.text)}")
    if isinstance(found, float) and kind.whole and found.is_integer():
        found = int(found)
    if found is None or (kind.whole and isinstance(found, float) and math.isfinite(found)):
        raise Unfit(wanted, f"write {noun}")
    if not kind.low <= found <= kind.high:
        raise Unfit(wanted, "write a number in this range")
    return found


def as_boolean(value: Value) -> bool:
    found = value.boolean if isinstance(value, Scalar) else None
    if found is None:
        raise Unfit("true or false", "write true or false, without quotes")
    return found


def as_quantity(value: Value, kind: Quantity) -> str | int | float:
    noun, parse = _QUANTITIES[kind.unit]
    found = parse(as_text(value, noun))
    if not isinstance(found, str) and not kind.low <= found <= kind.high:
        raise Unfit(f"{noun} from {kind.low_shown} to {kind.high_shown}", "write one in this range")
    return found


def as_choice(value: Value, kind: Choice) -> str:
    # YAML takes a bare off for false; where "off" is one of the words there is no doubt about what was meant.
    if isinstance(value, Scalar) and value.text in kind.values:
        return value.text
    wanted = listed(kind.values)
    near = parsers.nearest(as_text(value, wanted), list(kind.values))
    raise Unfit(wanted, f'did you mean "{near}"?' if near else "write one of these")


def as_json_scalar(value: Scalar) -> object:
    """yes, no, on and off count as mistakes here: nobody can tell whether a text or a boolean was meant."""
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


def unknown_key(key: str, kind: Section) -> Unfit:
    known = [field.key for field in kind.fields]
    if kind is schema.DEFAULTS and key in schema.OWN_KEYS:
        remedy = "move it to models.NAME: each model names its own"
        return Unfit("a key that models can share", remedy, show(key))
    near = parsers.nearest(key, known)
    remedies = []
    if near is not None:
        remedies.append(f'did you mean "{near}"?')
    if key in _PLACES:
        remedies.append(f"{key} goes into {_PLACES[key] or 'the top level'}")
    remedies = remedies or [f"remove it; the keys here are {listed(known, 'and')}"]
    return Unfit("a known key", " Or ".join(remedies), show(key))


def unknown_flag(key: str, flag: str) -> Unfit:
    if flag in mlx_flags.OWNED:
        return Unfit("a flag that is not the gateway's own", mlx_flags.OWNED[flag], show(key))
    near = parsers.nearest(flag, list(mlx_flags.FLAGS))
    remedy = f'did you mean "{near}"?' if near else f"remove it; the flags are {listed(list(mlx_flags.FLAGS), 'and')}"
    return Unfit("a flag of mlx_lm.server", remedy, show(key))

"""The table as a JSON Schema (draft 2020-12), for editors. Pure.

Wherever a number or another narrow value stands, a text that holds ``${…}`` may stand instead: what it becomes is not
known before the start.
"""

from typing import Any, assert_never

from gateway.config import mlx_flags, schema
from gateway.config.field_types import (
    HIGHEST,
    Boolean,
    Choice,
    Field,
    Json,
    JsonText,
    Kind,
    ListOf,
    MapOf,
    Number,
    Quantity,
    Section,
    ServerArgs,
    Text,
    Unit,
)

Schema = dict[str, Any]

_VARIABLE: Schema = {"type": "string", "pattern": r"\$\{"}
_NULL: Schema = {"type": "null"}
_PATTERNS = {
    Unit.DURATION: r"^\s*[0-9]+(\.[0-9]+)?\s*(ms|s|m|h)?\s*$",
    Unit.SIZE: r"^\s*[0-9]+(\.[0-9]+)?\s*([bB]|[kKmMgGtT][iI]?[bB]?)?\s*$",
    Unit.BUDGET: r"^\s*(auto|[0-9]+(\.[0-9]+)?\s*(%|[bB]|[kKmMgGtT][iI]?[bB]?)?)\s*$",
}


def json_schema() -> Schema:
    described = _of(schema.TOP)
    described["required"] = ["models"]
    described["properties"]["models"]["minProperties"] = 1
    model = described["properties"]["models"]["additionalProperties"]
    model["anyOf"] = [{"required": [source]} for source in ("model", "command", "urls")]
    model["not"] = {"required": ["command", "urls"]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "mlx-gateway config",
        **described,
    }


def _of(kind: Kind) -> Schema:
    match kind:
        case Text():
            return {"type": ["string", "number"]}
        case Number():
            return {"anyOf": [_number(kind), _VARIABLE]}
        case Boolean():
            return {"anyOf": [{"type": "boolean"}, _VARIABLE]}
        case Quantity():
            return _quantity(kind)
        case Choice():
            return {"anyOf": [{"enum": list(kind.values)}, _VARIABLE]}
        case Json():
            return {}
        case JsonText():
            return {"type": ["object", "string"]}
        case ListOf():
            least = {"minItems": kind.at_least} if kind.at_least else {}
            return {"type": ["array"] if least else ["array", "null"], "items": _of(kind.item), **least}
        case MapOf():
            return {"type": ["object", "null"], "additionalProperties": _of(kind.item)}
        case ServerArgs():
            return _server_args()
        case Section():
            properties = {field.key: _field(field) for field in kind.fields}
            return {"type": ["object", "null"], "properties": properties, "additionalProperties": False}
        case _:
            assert_never(kind)


def _number(kind: Number) -> Schema:
    top = {} if kind.high == HIGHEST else {"maximum": kind.high}
    return {"type": "integer" if kind.whole else "number", "minimum": kind.low, **top}


def _quantity(kind: Quantity) -> Schema:
    number = {"type": "number" if kind.unit is Unit.DURATION else "integer", "minimum": kind.low, "maximum": kind.high}
    return {"anyOf": [number, {"type": "string", "pattern": _PATTERNS[kind.unit]}, _VARIABLE]}


def _server_args() -> Schema:
    """Flags with and without --, with - and _: all are taken."""
    properties = {}
    for flag, kind in mlx_flags.FLAGS.items():
        for name in dict.fromkeys((flag, flag.replace("-", "_"), f"--{flag}")):
            properties[name] = {"anyOf": [_of(kind), _NULL]}
    return {"type": ["object", "null"], "properties": properties, "additionalProperties": False}


def _field(field: Field) -> Schema:
    schema = _of(field.kind)
    if field.nullable:
        schema = {"anyOf": [schema, _NULL]}
    doc = field.doc
    if field.only is not None:
        doc += f" Not yet supported: anything but {field.only.shown}."
    schema = {"description": doc, **schema}
    is_required_list = isinstance(field.kind, ListOf) and field.kind.at_least > 0  # left out or filled: no default
    if field.nullable or (field.default is not None and not is_required_list):
        schema["default"] = list(field.default) if isinstance(field.default, tuple) else field.default
    return schema

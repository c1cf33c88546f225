"""The table of config keys as a JSON Schema (draft 2020-12), for editors. Pure."""

from typing import assert_never

from gateway.config import mlx_flags, schema
from gateway.config.field_types import (
    Field,
    Json,
    JsonText,
    Kind,
    Leaf,
    ListOf,
    MapOf,
    Schema,
    Section,
    ServerArgs,
)

_NULL: Schema = {"type": "null"}


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
        case Leaf():
            return kind.schema
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
    if field.unsupported:
        doc += " Not yet supported: anything but null."
    schema = {"description": doc, **schema}
    is_required_list = isinstance(field.kind, ListOf) and field.kind.at_least > 0  # left out or filled: no default
    if field.nullable or (field.default is not None and not is_required_list):
        schema["default"] = list(field.default) if isinstance(field.default, tuple) else field.default
    return schema

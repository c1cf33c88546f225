"""The types that the table of config keys (``schema``) is written in. Pure.

A ``Leaf`` brings its own reader and its own JSON Schema; the other types have parts, which ``convert`` reads and
``json_schema`` describes, each in one ``match``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gateway.config.yaml_nodes import Value

Schema = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Leaf:
    """One value. ``read`` returns it or raises ``Unfit``. ``schema`` describes for editors what ``read`` takes."""

    read: Callable[[Value], object]
    schema: Schema
    is_secret: bool = False  # never shown in a message


@dataclass(frozen=True, slots=True)
class Json:
    """Any value that JSON can hold, as its natural type."""


@dataclass(frozen=True, slots=True)
class JsonText:
    """A JSON object, written as YAML or as JSON text; becomes text."""


@dataclass(frozen=True, slots=True)
class ListOf:
    item: "Kind"
    at_least: int = 0
    what: str = "a list"


@dataclass(frozen=True, slots=True)
class MapOf:
    """Any keys that ``key`` takes; it raises ``Unfit`` for the others."""

    item: "Kind"
    key: Callable[[str], object] = str
    what: str = "a mapping"


@dataclass(frozen=True, slots=True)
class ServerArgs:
    """The flags of mlx_lm.server."""


@dataclass(frozen=True, slots=True)
class Field:
    """One key. ``unsupported`` is the remedy where null is the only value that this version takes."""

    key: str
    kind: "Kind"
    default: object
    doc: str
    nullable: bool = False
    unsupported: str = ""


@dataclass(frozen=True, slots=True)
class Section:
    fields: tuple[Field, ...]


Kind = Leaf | Json | JsonText | ListOf | MapOf | ServerArgs | Section

"""What a value in the config can be: the words that the table is written in. Pure.

A kind holds facts only. ``convert`` judges values by them and ``schema_json`` describes them, each in one ``match``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

Parse = Callable[[str], object]

HIGHEST = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Text:
    """``parse`` raises ``Unfit``. ``what`` names it where something other than a text was found."""

    parse: Parse = str
    what: str = "a text"
    secret: bool = False


@dataclass(frozen=True, slots=True)
class Number:
    low: float
    high: float = HIGHEST
    whole: bool = True


@dataclass(frozen=True, slots=True)
class Boolean:
    pass


class Unit(Enum):
    DURATION = "duration"
    SIZE = "size"
    BUDGET = "budget"


@dataclass(frozen=True, slots=True)
class Quantity:
    """Seconds or bytes. ``low`` and ``high`` bound the number; ``low_shown`` and ``high_shown`` say so to people."""

    unit: Unit
    low: float = 0
    high: float = 0
    low_shown: str = "0"
    high_shown: str = ""


@dataclass(frozen=True, slots=True)
class Choice:
    values: tuple[str, ...]


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
    """Keys are free, as far as ``key`` lets them."""

    item: "Kind"
    key: Parse = str
    what: str = "a mapping"


@dataclass(frozen=True, slots=True)
class ServerArgs:
    """The flags of mlx_lm.server."""


@dataclass(frozen=True, slots=True)
class OnlySoFar:
    """The one value that this version supports; others are understood and refused."""

    value: object
    shown: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Field:
    key: str
    kind: "Kind"
    default: object
    doc: str
    nullable: bool = False
    only: OnlySoFar | None = None


@dataclass(frozen=True, slots=True)
class Section:
    fields: tuple[Field, ...]


Kind = Text | Number | Boolean | Quantity | Choice | Json | JsonText | ListOf | MapOf | ServerArgs | Section

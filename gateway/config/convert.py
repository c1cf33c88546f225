"""Value tree + kind → plain values; every value that does not fit is reported, and the rest is kept. Pure.

Only what the file says comes out; defaults are filled in later, so that ``defaults:`` and a model can be laid over each
other. Caveat: a key with a wrong value is left out and remembered in ``bad``. Later checks keep quiet about it; they
would otherwise judge the default that stands in its place.
"""

import json
from dataclasses import dataclass
from enum import Enum
from typing import Any, assert_never

from gateway.config import mlx_flags, parsers, schema, validators
from gateway.config.field_types import Field, Json, JsonText, Kind, Leaf, ListOf, MapOf, Section, ServerArgs
from gateway.config.problems import KeyPath, Problem, Unfit, listed, show
from gateway.config.yaml_nodes import Entry, Listing, Mapping, Scalar, Value

_PLACES = schema.places()


class _Missing(Enum):
    VALUE = "missing"


BAD = _Missing.VALUE


@dataclass(frozen=True, slots=True)
class At:
    path: KeyPath
    line: int

    def key(self, entry: Entry) -> "At":
        return At((*self.path, entry.key), entry.line)


class Converter:
    """``lines`` holds the line of every key, right or wrong; ``bad`` holds the paths whose value could not be read."""

    def __init__(self, filename: str) -> None:
        self.problems: list[Problem] = []
        self.lines: dict[KeyPath, int] = {}
        self.bad: set[KeyPath] = set()
        self.secret_variables: set[str] = set()  # of the environment, that are filled into secrets
        self.filename = filename

    def report(self, at: At, unfit: Unfit) -> None:
        self.problems.append(unfit.at(self.filename, at.line, at.path))
        self.bad.add(at.path)

    def convert(self, kind: Kind, value: Value, at: At) -> Any:
        """The value, or ``BAD`` after its problems were reported."""
        self.lines[at.path] = at.line
        if isinstance(value, Scalar) and validators.is_secret(kind):
            self.secret_variables |= parsers.variables(value.source)
        if isinstance(value, Scalar) and value.broken:
            self.bad.add(at.path)
            return BAD
        try:
            return self._fit(kind, value, at)
        except Unfit as unfit:
            got = unfit.got or validators.described(value, secret=validators.is_secret(kind))
            self.report(at, Unfit(unfit.expected, unfit.remedy, got))
            return BAD

    def _fit(self, kind: Kind, value: Value, at: At) -> object:
        match kind:
            case Leaf():
                return kind.read(value)
            case Json():
                return self._json(value, at)
            case JsonText():
                return self._json_text(value, at)
            case ListOf():
                return self._list(kind, value, at)
            case MapOf():
                return self._map(kind, value, at)
            case ServerArgs():
                return self._server_args(value, at)
            case Section():
                return self._section(kind, value, at)
            case _:
                assert_never(kind)

    def _json(self, value: Value, at: At) -> object:
        if isinstance(value, Mapping):
            pairs = [(entry.key, self.convert(Json(), entry.value, at.key(entry))) for entry in value.entries]
            return {key: item for key, item in pairs if item is not BAD}
        if isinstance(value, Listing):
            return list(self._items(Json(), value.items, at))
        return validators.as_json_scalar(value)

    def _json_text(self, value: Value, at: At) -> str:
        if isinstance(value, Mapping):
            return json.dumps(self._json(value, at), ensure_ascii=False)
        return validators.as_json_text(validators.as_text(value, "a JSON object"))

    def _items(self, kind: Kind, items: tuple[Value, ...], at: At) -> tuple[object, ...]:
        places = [At((*at.path, index), item.line) for index, item in enumerate(items)]
        found = [self.convert(kind, item, place) for item, place in zip(items, places, strict=True)]
        if any(place.path in self.bad for place in places):
            self.bad.add(at.path)
        return tuple(item for item in found if item is not BAD)

    def _list(self, kind: ListOf, value: Value, at: At) -> tuple[object, ...]:
        return self._items(kind.item, validators.as_items(value, kind), at)

    def _map(self, kind: MapOf, value: Value, at: At) -> dict[str, object]:
        found: dict[str, object] = {}
        for entry in validators.as_entries(value, kind.what):
            place = at.key(entry)
            try:
                kind.key(entry.key)
            except Unfit as unfit:
                named = Unfit(unfit.expected, unfit.remedy, unfit.got or show(entry.key))
                self.problems.append(named.at(self.filename, place.line, place.path))  # the value below is not bad
            item = self.convert(kind.item, entry.value, place)
            if item is not BAD:
                found[entry.key] = item
        return found

    def _server_args(self, value: Value, at: At) -> dict[str, object]:
        found: dict[str, object] = {}
        first: dict[str, int] = {}
        for entry in validators.as_entries(value, "a mapping of flags"):
            flag = mlx_flags.canonical(entry.key)
            place = At((*at.path, flag), entry.line)
            if flag in first:
                got = f"{show(entry.key)} here and the same flag on line {first[flag]}"
                self.report(place, Unfit("each flag once", "remove one of the two", got))
                continue
            first[flag] = entry.line
            kind = mlx_flags.FLAGS.get(flag)
            if kind is None:
                self.report(place, _unknown_flag(entry.key, flag))
                continue
            item = None if validators.is_null(entry.value) else self.convert(kind, entry.value, place)
            if item is not BAD:
                found[flag] = item
        return found

    def _section(self, kind: Section, value: Value, at: At) -> dict[str, object]:
        fields = {field.key: field for field in kind.fields}
        found: dict[str, object] = {}
        for entry in validators.as_entries(value, "a mapping"):
            place = at.key(entry)
            field = fields.get(entry.key)
            if field is None:
                self.report(place, _unknown_key(entry.key, kind))
                continue
            item = self._field(field, entry.value, place)
            if item is not BAD:
                found[entry.key] = item
        return found

    def _field(self, field: Field, value: Value, at: At) -> object:
        if field.nullable and validators.is_null(value):
            self.lines[at.path] = at.line
            return None
        item = self.convert(field.kind, value, at)
        if item is BAD or not field.unsupported:
            return item
        got = f"{validators.described(value)}, which is not yet supported"
        self.report(at, Unfit("null", field.unsupported, got))
        return BAD


def _unknown_key(key: str, kind: Section) -> Unfit:
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


def _unknown_flag(key: str, flag: str) -> Unfit:
    if flag in mlx_flags.OWNED:
        return Unfit("a flag that is not the gateway's own", mlx_flags.OWNED[flag], show(key))
    known = list(mlx_flags.FLAGS)
    near = parsers.nearest(flag, known)
    remedy = f'did you mean "{near}"?' if near else f"remove it; the flags are {listed(known, 'and')}"
    return Unfit("a flag of mlx_lm.server", remedy, show(key))

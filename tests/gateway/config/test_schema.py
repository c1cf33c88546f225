"""The JSON Schema says what the reader does; the flags are those of the installed mlx_lm."""

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.config import ConfigError, json_schema, mlx_flags, parse, parsers, schema
from gateway.config.field_types import Kind, Leaf, MapOf, Section

Schema = dict[str, Any]
TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}
KNOWN = {
    "$schema", "title", "description", "default", "type", "enum", "anyOf", "not", "required", "properties", "items",
    "additionalProperties", "minProperties", "minItems", "minimum", "maximum", "pattern",
}  # fmt: skip


def is_type(value: object, name: str) -> bool:
    if isinstance(value, bool):
        return name == "boolean"
    return isinstance(value, TYPES[name])


def valid(value: Any, schema: Schema) -> bool:
    """As much of JSON Schema as ours uses."""
    assert set(schema) <= KNOWN
    kinds = schema.get("type", list(TYPES))
    checks = [
        any(is_type(value, name) for name in ([kinds] if isinstance(kinds, str) else kinds)),
        value in schema.get("enum", [value]),
        "anyOf" not in schema or any(valid(value, each) for each in schema["anyOf"]),
        "not" not in schema or not valid(value, schema["not"]),
    ]
    if isinstance(value, dict):
        properties, rest = schema.get("properties", {}), schema.get("additionalProperties", {})
        checks += [set(schema.get("required", [])) <= set(value), len(value) >= schema.get("minProperties", 0)]
        for key, item in value.items():
            each = properties.get(key, rest)
            checks.append(each is not False and valid(item, each))
    if isinstance(value, list):
        checks += [len(value) >= schema.get("minItems", 0), all(valid(item, schema.get("items", {})) for item in value)]
    if isinstance(value, str):
        checks.append(re.search(schema.get("pattern", ""), value) is not None)
    if isinstance(value, int | float) and not isinstance(value, bool):
        checks.append(schema.get("minimum", value) <= value <= schema.get("maximum", value))
    return all(checks)


def sections(kind: Kind, schema: Schema, where: str) -> list[tuple[str, Section, Schema]]:
    """Every section of the table with its part of the schema."""
    if isinstance(kind, MapOf):
        return sections(kind.item, schema["additionalProperties"], f"{where}.*")
    if not isinstance(kind, Section):
        return []
    found = [(where, kind, schema)]
    for field in kind.fields:
        part = schema["properties"][field.key]
        inner = part["anyOf"][0] if field.nullable and isinstance(field.kind, Section) else part
        found += sections(field.kind, inner, f"{where}.{field.key}")
    return found


SECTIONS = sections(schema.TOP, json_schema(), "")


def test_every_key_is_in_the_schema_and_no_other() -> None:
    assert [where for where, _, _ in SECTIONS] == [
        "", ".server", ".memory", ".defaults", ".defaults.request", ".defaults.timeouts", ".defaults.restart",
        ".defaults.distributed", ".models.*", ".models.*.request", ".models.*.timeouts", ".models.*.restart",
        ".models.*.distributed",
    ]  # fmt: skip
    for where, section, shown in SECTIONS:
        assert list(shown["properties"]) == [field.key for field in section.fields], where
        assert shown["additionalProperties"] is False
        for field in section.fields:
            assert shown["properties"][field.key]["description"]


def test_every_default_is_valid_and_shown() -> None:
    for where, section, shown in SECTIONS:
        for field in section.fields:
            part = shown["properties"][field.key]
            default = list(field.default) if isinstance(field.default, tuple) else field.default
            if field.key in {"command", "urls"}:
                assert "default" not in part  # an empty list is refused
            else:
                assert part.get("default") == default, f"{where}.{field.key}"
            assert "default" not in part or valid(part["default"], part), f"{where}.{field.key}"


def test_it_is_json() -> None:
    schema = json_schema()
    assert json.loads(json.dumps(schema, allow_nan=False)) == schema
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"


GOOD = """\
server: {host: 0.0.0.0, port: "${PORT:-80}", api_keys: [k, 5], cors_origins: ["*"], max_body: 1MiB, max_connections: 5,
  drain_timeout: 500ms, keepalive: 0, expose_backend_output: false}
memory: {budget: auto}
defaults: {env: , restart: {max_failures: 3}, max_context: null}
models:
  a: {model: m, replicas: 2, resume: "off", memory: null,
    server_args: {--max-tokens: 5, top_k: null, prompt-cache-bytes: 4GB, chat-template-args: {x: 1}},
    request: {defaults: {temperature: 0.5}, drop: [user]}, timeouts: {start: 1.5}}
  b: {command: [x, "{port}"]}
  c: {urls: [http://h], fallbacks: [a]}
"""

BAD = [
    "{}",
    "models: {}",
    "models: {a: {}}",
    "models: {a: {model: m, zzz: 1}}",
    "models: {a: {model: m, replicas: 0}}",
    "models: {a: {model: m, resume: maybe}}",
    "models: {a: {model: m, timeouts: {start: soon}}}",
    "models: {a: {model: m, server_args: {max-token: 5}}}",
    "models: {a: {model: m, server_args: {max-tokens: x}}}",
    'models: {a: {command: ["{port}"], urls: [http://h]}}',
    "models: {a: {model: m}}\nserver: {port: 70000}",
    "models: {a: {model: m}}\nserver: {port: []}",
    "models: {a: {model: m}}\nmemory: {budget: most}",
]


def test_the_schema_takes_what_the_reader_takes() -> None:
    parse(GOOD, "c.yaml", {})
    assert valid(yaml.safe_load(GOOD), json_schema())


@pytest.mark.parametrize("text", BAD)
def test_the_schema_refuses_what_the_reader_refuses(text: str) -> None:
    with pytest.raises(ConfigError):
        parse(text, "c.yaml", {})
    assert not valid(yaml.safe_load(text), json_schema())


SCALARS = st.none() | st.booleans() | st.integers(-5, 10**6) | st.sampled_from(
    ["5s", "1GB", "${A}", "auto", "off", "eager", "ring", 0.5, "x", "1:30", "80%"]
)  # fmt: skip
KEYS = [(name, field.key) for name, kind in (("server", schema.SERVER), ("a", schema.MODEL)) for field in kind.fields]


@given(st.sampled_from(KEYS), SCALARS | st.lists(SCALARS, max_size=2))
@settings(max_examples=300, deadline=None)
def test_whatever_the_reader_takes_is_valid(key: tuple[str, str], value: object) -> None:
    where, name = key
    tree: dict[str, Any] = {"models": {"a": {"model": "m"}}}
    if where == "a":
        tree["models"]["a"][name] = value
    else:
        tree[where] = {name: value}
    try:
        parse(yaml.safe_dump(tree), "c.yaml", {"A": "1"})
    except ConfigError:
        return
    assert valid(tree, json_schema())


def installed_source(name: str) -> str:
    spec = importlib.util.find_spec("mlx_lm")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return (Path(spec.submodule_search_locations[0]) / name).read_text()


def test_the_flags_are_those_of_the_installed_server() -> None:
    calls = re.findall(r'add_argument\(\s*"--([a-z-]+)",(.*?)\n    \)', installed_source("server.py"), re.DOTALL)
    installed = dict(calls)
    assert set(installed) - set(mlx_flags.OWNED) == set(mlx_flags.FLAGS) - {"cache-limit-gb"}
    for flag, rest in installed.items():
        if flag in mlx_flags.OWNED:
            continue
        kind = mlx_flags.FLAGS[flag]
        shown = kind.schema.get("anyOf", [{}])[0] if isinstance(kind, Leaf) else {}
        number = "integer" if "type=int" in rest else "number" if "type=float" in rest else None
        assert (shown.get("type") == "boolean") == ("store_true" in rest), flag
        assert (shown.get("type") if "minimum" in shown else None) == number, flag
        default = re.search(r"default=([0-9.]+),", rest)
        if number and default:
            assert valid(json.loads(default[1]), shown), flag


def test_every_size_that_we_pass_on_is_read_by_the_server_as_by_us() -> None:
    source = re.search(r"def _parse_size.*?\n\n\n", installed_source("utils.py"), re.DOTALL)
    assert source is not None
    names: dict[str, Any] = {}
    exec("from decimal import Decimal\n" + source[0], names)  # noqa: S102 - importing mlx_lm takes seconds
    for text in ("4GB", "4 GB", "1.5G", "12", "512MiB", "3kb", "1tb", "7M", " 5GB"):
        assert names["_parse_size"](str(parsers.mlx_size(text))) == parsers.size(text), text

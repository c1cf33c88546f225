"""Lays ``defaults:`` under each model, fills gaps from the table, and makes the dataclasses of ``settings``. Pure.

Caveat: ``defaults:`` may hold keys that do not apply to the source of a model (``replicas`` for a model with ``urls``,
for example). Such a key is an error where the model itself has it, and is dropped where it is inherited.
"""

from collections.abc import Container
from typing import Any

from backends.domain.spec import RestartPolicy, Timeouts
from gateway.config import schema
from gateway.config.field_types import MapOf, Section, ServerArgs
from gateway.config.problems import KeyPath
from gateway.config.settings import MemoryConfig, ModelConfig, RequestRules, ServerConfig

Given = dict[str, Any]

# Source → the keys that go with other sources only, and the remedy for each.
FOREIGN = {
    "model": {
        "api_key": "remove it: it is for the servers in urls",
        "proxy": "remove it: it is for the servers in urls",
    },
    "command": {
        "api_key": "remove it: it is for the servers in urls",
        "proxy": "remove it: it is for the servers in urls",
        "server_args": "write the flags into the command itself",
        "distributed": "remove it: it goes with model alone",
    },
    "urls": {
        "replicas": "remove it: each URL is one replica",
        "server_args": "remove it: the servers in urls were started elsewhere",
        "env": "remove it: the servers in urls were started elsewhere",
        "load": "remove it: the servers in urls were started elsewhere",
        "idle_unload": "remove it: the servers in urls were started elsewhere",
        "memory": "remove it: the servers in urls were started elsewhere",
        "distributed": "remove it: it goes with model alone",
    },
}


def overlay(section: Section, below: Given, above: Given) -> Given:
    """``above`` wins; sections and free mappings merge key by key, lists and JSON values are replaced whole."""
    merged = {**below, **above}
    for field in section.fields:
        lower, upper = below.get(field.key), above.get(field.key)
        if not isinstance(lower, dict) or not isinstance(upper, dict):
            continue
        if isinstance(field.kind, Section):
            merged[field.key] = overlay(field.kind, lower, upper)
        elif isinstance(field.kind, MapOf | ServerArgs):
            merged[field.key] = {**lower, **upper}
    return merged


def fill(section: Section, given: Given) -> Given:
    """Every key of the section, with the default of the table where ``given`` has none."""
    filled = {}
    for field in section.fields:
        if isinstance(field.kind, Section) and not field.nullable:
            filled[field.key] = fill(field.kind, given.get(field.key, {}))
        else:
            default = dict(field.default) if isinstance(field.default, dict) else field.default
            filled[field.key] = given.get(field.key, default)
    return filled


def source(name: str, written: Container[KeyPath]) -> str:
    """What a model is run from, by the keys that are written, whether their values are right or wrong."""
    return next((key for key in ("urls", "command") if ("models", name, key) in written), "model")


def model_values(name: str, kind: str, inherited: Given, own: Given) -> Given:
    """All values of a model whose source is ``kind``, before paths and other models' names are looked up."""
    names = {name, *own.get("aliases", ())}
    usable = {key: value for key, value in inherited.items() if key not in FOREIGN[kind]}
    if "fallbacks" in usable:
        usable["fallbacks"] = tuple(each for each in usable["fallbacks"] if each not in names)
    values = fill(schema.MODEL, overlay(schema.MODEL, usable, own))
    if kind == "urls":
        values["replicas"] = len(values["urls"])
    return values


def model(name: str, values: Given, line: int) -> ModelConfig:
    parts = {
        "request": RequestRules(**values["request"]),
        "timeouts": Timeouts(**values["timeouts"]),
        "restart": RestartPolicy(**values["restart"]),
    }
    return ModelConfig(name=name, line=line, **{**values, **parts})


def server(given: Given) -> ServerConfig:
    return ServerConfig(**fill(schema.SERVER, given))


def memory(given: Given) -> MemoryConfig:
    return MemoryConfig(**fill(schema.MEMORY, given))

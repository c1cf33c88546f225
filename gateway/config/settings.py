"""The values of the config that the program works with: durations in seconds, sizes in bytes, paths absolute. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backends.domain.spec import PROXY_AUTO, RestartPolicy, Timeouts

FlagValue = str | int | float | bool | None


@dataclass(frozen=True, slots=True)
class ServerConfig:
    host: str
    port: int  # 0 = a free one
    api_keys: tuple[str, ...]
    cors_origins: tuple[str, ...]  # ("*",) = any
    allowed_hosts: tuple[str, ...]  # beside loopback addresses and localhost
    max_body: int
    body_memory: int  # bytes
    max_connections: int
    drain_timeout: float
    keepalive: float  # 0 = off
    expose_backend_output: bool


@dataclass(frozen=True, slots=True)
class MemoryConfig:
    budget: str | int  # "auto", "80%" or bytes


@dataclass(frozen=True, slots=True)
class RequestRules:
    defaults: Mapping[str, Any]
    force: Mapping[str, Any]
    drop: tuple[str, ...]
    allow: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One model. Its source is ``urls``, else ``command``, else ``model`` for mlx_lm.server.

    ``replicas`` is the number of ``urls`` where there are any. ``fallbacks`` are names of models, aliases resolved.
    Keys of ``server_args`` have no ``--``; None and False: the flag is not passed.
    """

    name: str
    model: str | None
    command: tuple[str, ...]
    urls: tuple[str, ...]
    api_key: str
    aliases: tuple[str, ...]
    replicas: int
    load: str
    idle_unload: float
    max_inflight: int | str  # "auto" or a number
    priority: str
    admission: str
    max_queue: int
    queue_timeout: float
    max_context: int | None
    server_args: Mapping[str, FlagValue]
    env: Mapping[str, str]
    fallbacks: tuple[str, ...]
    request: RequestRules
    memory: int | None
    resume: str
    instrument: str
    engine_fixes: str
    timeouts: Timeouts
    restart: RestartPolicy
    distributed: Mapping[str, Any] | None
    line: int  # of the model's name in the file
    proxy: str = PROXY_AUTO


@dataclass(frozen=True, slots=True)
class Config:
    server: ServerConfig
    memory: MemoryConfig
    models: tuple[ModelConfig, ...]
    path: Path | None  # None for a config parsed from a text
    notes: tuple[str, ...]  # warnings; the config is usable
    secret_variables: frozenset[str] = frozenset()  # of the environment, that are filled into secrets of the config

"""config.yaml: read, checked as a whole, and described as a JSON Schema.

    text → yaml_nodes (values with lines) → convert (by the table in schema) → build (defaults) → checks (across keys)
         → settings (dataclasses)

``schema`` is the table of keys; a new key is added there and in ``settings``. Caveat: a command that replaces the host
afterwards (``--host``) has to ask ``is_loopback`` again, because other hosts need API keys.
"""

from gateway.config.json_schema import json_schema
from gateway.config.load import load, parse
from gateway.config.parsers import is_loopback
from gateway.config.problems import ConfigError, Problem
from gateway.config.settings import Config, MemoryConfig, ModelConfig, RequestRules, ServerConfig

__all__ = [
    "Config",
    "ConfigError",
    "MemoryConfig",
    "ModelConfig",
    "Problem",
    "RequestRules",
    "ServerConfig",
    "is_loopback",
    "json_schema",
    "load",
    "parse",
]

"""config.yaml: read, checked as a whole, described.

    text → nodes (YAML with lines) → convert (by the table) → checks (across keys) → build (dataclasses)

Whoever changes the host afterwards (``--host``) asks ``is_loopback`` again: without API keys nothing else is allowed.
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

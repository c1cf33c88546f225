"""The flags of mlx_lm.server, as ``server_args`` takes them. Pure.

From its argparse in mlx-lm 0.32.2, and ``cache-limit-gb`` from 0.21 and before. A test compares the table with the
installed mlx_lm. A flag that is not here is refused by name at once: the server itself would exit with status 2.
"""

from gateway.config import parsers
from gateway.config.field_types import Boolean, JsonText, Kind, Number, Text

_COUNT = Number(1)
_NOT_NEGATIVE = Number(0)
_SHARE = Number(0, 1, whole=False)

FLAGS: dict[str, Kind] = {
    "adapter-path": Text(parsers.some_text, "a path"),
    "host": Text(parsers.loopback_host, "a loopback address"),
    "port": Number(1, 65535),
    "allowed-origins": Text(parsers.some_text),
    "draft-model": Text(parsers.some_text),
    "num-draft-tokens": _COUNT,
    "trust-remote-code": Boolean(),
    "log-level": Text(parsers.log_level, "INFO, WARNING, ERROR or CRITICAL"),
    "chat-template": Text(),
    "use-default-chat-template": Boolean(),
    "temp": Number(0, 100, whole=False),
    "top-p": _SHARE,
    "top-k": _NOT_NEGATIVE,
    "min-p": _SHARE,
    "max-tokens": _COUNT,
    "chat-template-args": JsonText(),
    "decode-concurrency": _COUNT,
    "prompt-concurrency": _COUNT,
    "prefill-step-size": _COUNT,
    "prompt-cache-size": _NOT_NEGATIVE,
    "prompt-cache-bytes": Text(parsers.mlx_size, "a size"),
    "kv-bits": Number(1, 16),
    "kv-group-size": _COUNT,
    "quantized-kv-start": _NOT_NEGATIVE,
    "pipeline": Boolean(),
    "cache-limit-gb": _NOT_NEGATIVE,
}

OWNED = {"model": "name the model in model: instead"}

# Flags that name a file or folder: always, or where the text looks like one.
PATHS = ("adapter-path",)
MAYBE_PATHS = ("draft-model",)


def canonical(key: str) -> str:
    """``max-tokens`` for ``--max_tokens``."""
    return key.removeprefix("--").replace("_", "-")

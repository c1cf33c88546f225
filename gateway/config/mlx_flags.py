"""The flags of mlx_lm.server that ``server_args`` takes. Pure.

Source: the argparse of mlx-lm 0.32.2, and ``cache-limit-gb`` of 0.21 and before. A test compares the table with the
installed mlx_lm. An unknown flag is a problem of the config: the server itself would exit with status 2.
"""

from gateway.config import parsers
from gateway.config.field_types import JsonText, Leaf
from gateway.config.validators import BOOLEAN, number, text

_COUNT = number(1)
_NOT_NEGATIVE = number(0)
_SHARE = number(0, 1, whole=False)

FLAGS: dict[str, Leaf | JsonText] = {
    "adapter-path": text(parsers.some_text, "a path"),
    "host": text(parsers.loopback_host, "a loopback address"),
    "port": number(1, 65535),
    "allowed-origins": text(parsers.some_text),
    "draft-model": text(parsers.some_text),
    "num-draft-tokens": _COUNT,
    "trust-remote-code": BOOLEAN,
    "log-level": text(parsers.log_level, "INFO, WARNING, ERROR or CRITICAL"),
    "chat-template": text(),
    "use-default-chat-template": BOOLEAN,
    "temp": number(0, 100, whole=False),
    "top-p": _SHARE,
    "top-k": _NOT_NEGATIVE,
    "min-p": _SHARE,
    "max-tokens": _COUNT,
    "chat-template-args": JsonText(),
    "decode-concurrency": _COUNT,
    "prompt-concurrency": _COUNT,
    "prefill-step-size": _COUNT,
    "prompt-cache-size": _NOT_NEGATIVE,
    "prompt-cache-bytes": text(parsers.mlx_size, "a size"),
    "kv-bits": number(1, 16),
    "kv-group-size": _COUNT,
    "quantized-kv-start": _NOT_NEGATIVE,
    "pipeline": BOOLEAN,
    "cache-limit-gb": _NOT_NEGATIVE,
}

OWNED = {"model": "name the model in model: instead"}

# Flags whose value is a path: always, or where the value looks like a path.
PATHS = ("adapter-path",)
MAYBE_PATHS = ("draft-model",)


def canonical(key: str) -> str:
    """``max-tokens`` for ``--max_tokens``."""
    return key.removeprefix("--").replace("_", "-")

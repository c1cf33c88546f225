"""Command line, environment and defaults of mlx_lm.server. Pure."""

import sys
from collections.abc import Mapping

# By default, the server stops at 512 tokens, in mid-answer, and keeps up to ten prompt caches of any size, which grow
# until Metal is out of memory (mlx-lm#1390).
DEFAULT_ARGS: Mapping[str, str | int | float | bool | None] = {"max-tokens": 8192, "prompt-cache-bytes": "4GB"}

# The name by which every version serves the model given with --model. One name for all requests: requests with another
# name for the same model do not batch with the first, and an unknown name makes the server drop its model and ask the
# hub.
CANONICAL_MODEL = "default_model"


def argv(model: str, server_args: Mapping[str, str | int | float | bool | None]) -> tuple[str, ...]:
    """The command line, with ``{host}`` and ``{port}`` as placeholders.

    A flag set to true is given without a value; one set to false or null is left out.
    """
    args = {**DEFAULT_ARGS, **server_args}
    line = [sys.executable, "-m", "mlx_lm", "server", "--model", model, "--host", "{host}", "--port", "{port}"]
    for flag, value in args.items():
        if flag in ("host", "port") or value is None or value is False:
            continue
        line.append(f"--{flag}")
        if value is not True:
            line.append(str(value))
    return tuple(line)


def max_tokens(server_args: Mapping[str, object]) -> int:
    """Tokens of an answer at most, if the request does not say."""
    value = {**DEFAULT_ARGS, **server_args}["max-tokens"]
    return int(str(value)) if value else 512


def environment(*, local_folder: bool) -> dict[str, str]:
    """Unbuffered: otherwise the last lines before an abort are lost. Faulthandler: a SIGSEGV, otherwise silent, prints
    stacks. No progress bars: they share a line with log records. Offline for a local folder: no name in a request can
    start a download."""
    env = {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    if local_folder:
        env["HF_HUB_OFFLINE"] = "1"
    return env

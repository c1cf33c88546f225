"""What is peculiar to launching and probing mlx_lm.server. Pure."""

import sys
from collections.abc import Mapping

# Left alone, the server stops at 512 tokens, in mid-answer, and keeps up to ten prompt caches of any size: that is
# what grows until Metal is out of memory (mlx-lm#1390).
DEFAULT_ARGS: Mapping[str, str | int | float | bool | None] = {"max-tokens": 8192, "prompt-cache-bytes": "4GB"}

# The name by which every version serves the model given with --model. One name for every request: a second name for
# the same model does not batch with the first, and an unknown one makes the server drop its model and ask the hub.
CANONICAL_MODEL = "default_model"


def argv(model: str, server_args: Mapping[str, str | int | float | bool | None]) -> tuple[str, ...]:
    """The command line, with ``{host}`` and ``{port}`` still to be filled in.

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
    """How long an answer gets when the request does not say."""
    value = {**DEFAULT_ARGS, **server_args}["max-tokens"]
    return int(str(value)) if value else 512


def environment(*, local_folder: bool) -> dict[str, str]:
    """Unbuffered: the last lines before an abort would be lost in a pipe. Faulthandler: a silent SIGSEGV gets its
    stacks. No progress bars: they share their line with real records. Offline for a local folder: nothing that a
    request names can start a download."""
    env = {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    if local_folder:
        env["HF_HUB_OFFLINE"] = "1"
    return env

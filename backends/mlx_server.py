"""Command line, environment, defaults and batching of mlx_lm.server. Pure."""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

# By default, the server stops at 512 tokens, in mid-answer, and keeps up to ten prompt caches of any size, which grow
# until Metal is out of memory (mlx-lm#1390). The size of the prompt cache is filled in at each launch.
DEFAULT_ARGS: Mapping[str, str | int | float | bool | None] = {
    "max-tokens": 8192,
    "prompt-cache-bytes": "{prompt_cache_bytes}",
    "prompt-cache-size": "{prompt_cache_size}",
}
PROMPT_CACHE_BYTES = 4 * 10**9  # where nothing is known of the model's size
PROMPT_CACHE_ENTRIES = 10  # default of --prompt-cache-size

# The name by which every version serves the model given with --model. One name for all requests: requests with another
# name for the same model do not batch with the first, and an unknown name makes the server drop its model and ask the
# hub.
CANONICAL_MODEL = "default_model"

INSTRUMENT = Path(__file__).parent / "instrument" / "instrument.py"

# Defaults of flags of the server. It reports progress on a prompt after each step.
PREFILL_STEP = 2048  # tokens (--prefill-step-size)
PROMPT_CONCURRENCY = 8  # prompts that are read together (--prompt-concurrency)
DECODE_CONCURRENCY = 32  # sequences that are decoded together (--decode-concurrency)


def argv(
    model: str, server_args: Mapping[str, str | int | float | bool | None], *, instrumented: bool
) -> tuple[str, ...]:
    """The command line, with ``{host}``, ``{port}`` and, where it is ours to choose, the size of the prompt cache as
    placeholders.

    A flag set to true is given without a value; one set to false or null is left out.
    """
    args = {**DEFAULT_ARGS, **server_args, **_concurrency(server_args)}
    bound = args["prompt-cache-bytes"]
    if (bound is None or bound is False) and "prompt-cache-size" not in server_args:
        del args["prompt-cache-size"]  # more prompts than by default need a bound in bytes
    # -P: a folder or file in the working directory with the name of a module must not be imported in its place, nor one
    # in the folder of the instrument.
    program = [str(INSTRUMENT)] if instrumented else ["-m", "mlx_lm"]
    line = [sys.executable, "-P", *program, "server", "--model", model, "--host", "{host}", "--port", "{port}"]
    for flag, value in args.items():
        if flag in ("host", "port") or value is None or value is False:
            continue
        line.append(f"--{flag}")
        if value is not True:
            line.append(str(value))
    return tuple(line)


def _concurrency(server_args: Mapping[str, object]) -> Mapping[str, int]:
    """The server decodes as many as the larger of the two flags allows (``BatchGenerator``), so that
    --decode-concurrency 4 alone, beside the default of the other, means 8."""
    decode = server_args.get("decode-concurrency")
    if not decode or server_args.get("prompt-concurrency"):
        return {}
    return {"prompt-concurrency": min(PROMPT_CONCURRENCY, int(str(decode)))}


def concurrency(server_args: Mapping[str, object]) -> tuple[int, int]:
    """(sequences that the server has in its batch, prompts that it reads together). It takes a prompt into the batch
    while fewer sequences than the first are decoded, and fewer prompts than the second are read
    (``BatchGenerator._next``)."""
    prompts = prompt_concurrency(server_args)
    return max(int(str(server_args.get("decode-concurrency") or DECODE_CONCURRENCY)), prompts), prompts


def prompt_concurrency(server_args: Mapping[str, object]) -> int:
    """Prompts that the server reads together."""
    return int(str({**server_args, **_concurrency(server_args)}.get("prompt-concurrency") or PROMPT_CONCURRENCY))


def cache_flags(argv: Sequence[str]) -> tuple[bool, bool]:
    """Whether bytes and entries of the prompt cache are filled in at the launch; else the user chose them, or there are
    none."""
    return DEFAULT_ARGS["prompt-cache-bytes"] in argv, DEFAULT_ARGS["prompt-cache-size"] in argv


def max_tokens(server_args: Mapping[str, object]) -> int:
    """Tokens of an answer at most, if the request does not say."""
    value = {**DEFAULT_ARGS, **server_args}["max-tokens"]
    return int(str(value)) if value else 512


def batches(server_args: Mapping[str, object]) -> bool:
    """Whether the server answers several requests at a time (``ResponseGenerator._is_batchable``). A model whose cache
    cannot be merged (llama4's) is not batched either; the flags do not show that."""
    return not server_args.get("kv-bits") and not server_args.get("draft-model")


def is_batchable(field: Callable[[str], Any]) -> bool:
    """Whether a request may share a batch with others; else the server first ends all that it has begun, and takes
    nothing meanwhile (``ResponseGenerator._generate``). ``field``: what is sent under that name; None = nothing."""
    return field("seed") is None and field("adapters") is None and field("draft_model") is None


def notices_reset(heard: bytes, *, one_piece: bool, unbatchable: bool) -> bool:
    """Whether a connection that is reset after these bytes ends the work on its request. The server notices only when
    it writes: never if the answer comes in one piece, and not if these are its last bytes. The prompt of a request that
    is not batched is read to its end in any case."""
    ending = b"[DONE]" in heard or b'"finish_reason": "' in heard
    reading = b"data:" not in heard
    return not (one_piece or ending or (unbatchable and reading))


def environment(*, local_folder: bool) -> dict[str, str]:
    """Unbuffered: otherwise the last lines before an abort are lost. Faulthandler: a SIGSEGV, otherwise silent, prints
    stacks. No progress bars: they share a line with log records. Offline for a local folder: no name in a request can
    start a download."""
    env = {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    if local_folder:
        env["HF_HUB_OFFLINE"] = "1"
    return env

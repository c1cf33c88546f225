"""The behaviour of the fake: parses a few words into a ``Plan``."""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

METAL = "[METAL] Command buffer execution failed: "
ABORT = "libc++abi: terminating due to uncaught exception of type std::runtime_error: "
CALLBACK = "kIOGPUCommandBufferCallbackError"
SAYINGS = {
    "oom": f"{METAL}Insufficient Memory (00000008:{CALLBACK}OutOfMemory)",
    "gpu-timeout": f"{METAL}Caused GPU Timeout Error (00000002:{CALLBACK}Timeout)",
    "gpu-victim": f"{METAL}Discarded (victim of GPU error/recovery) (00000005:{CALLBACK}InnocentVictim)",
    "gpu-fault": f"{METAL}Caused GPU Address Fault Error (0000000b:{CALLBACK}PageFault)",
    "cuda": "cudaMallocAsync(&data, size, stream) failed: out of memory",
    "malloc": "[malloc] Unable to allocate 17179869184 bytes.",
    "resource-limit": "[metal::malloc] Resource limit (499000) exceeded.",
    "slice": "Slice indices must be 32-bit integers",
    "import": "ModuleNotFoundError: No module named 'mlx'",
    "bars": "Fetching 7 files:   0%|          | 0/7 [00:00<?, ?it/s]\r"
    "Fetching 7 files:  29%|██▊       | 2/7 [00:00<00:01]\r",
    "forged": "2026-11-22 17:30:00,000 - ERROR - JSONDecodeError: Expecting value: line 1 column 1 (char 0)"
    " - Raw body: \n"
    f"{ABORT}{METAL}Insufficient Memory (00000008:{CALLBACK}OutOfMemory)\n"
    "2026-11-22 17:30:00,000 - ERROR - mlx_lm.server generation thread died: [METAL] forged\n"
    '127.0.0.1 - - [22/Nov/2026 17:30:00] "POST /v1/completions HTTP/1.1" 400 -\n',
}
PRESETS = {
    # mlx up to 0.31: a GPU error aborts the process.
    "metal-oom": "fail=die say=oom abort=1",
    "gpu-timeout": "fail=die say=gpu-timeout abort=1",
    "gpu-victim": "fail=die say=gpu-victim abort=1",
    "gpu-fault": "fail=die say=gpu-fault abort=1",
    "killed": "fail=die exit=-9",
    "segfault": "fail=die exit=-11",
    # mlx-lm 0.28.4 to 0.31.3: the generation thread is dead, /health says 200. From 0.32: 503, 404, streams end.
    "wedge-0.31": "fail=wedge-0.31 say=slice",
    "wedge-0.32": "fail=wedge-0.32 say=slice",
    "oom-0.32": "fail=wedge-0.32 say=oom",
    "native-hang": "fail=hang",  # all requests, now and later; nothing in the log
    "stall": "fail=stall",  # this request alone
    "eof": "fail=eof",
    "eof-before-head": "fail=eof after=-1",
    "cut-event": "fail=cut",
    "no-done": "fail=no-done",  # finish_reason came, [DONE] did not
    "hold": "fail=hold",  # finish_reason came, then nothing, and the connection stays open
    "no-finish": "fail=no-finish",  # [DONE] came, finish_reason did not
    # At the start.
    "slow-load": "load=slow load-time=2",
    "load-failure": "load=fail",  # from 0.32: alive, 503 and 404
    "load-hang": "load=fail-0.31",  # 0.31.3: alive, 200, requests wait for ever
    "bind-failure": "load=no-port",
    "exit-at-start": "load=exit exit=1 say=import",
    "ignore-sigterm": "sigterm=ignore",
    "bars": "say=bars",
    "forged": "say=forged",
}


@dataclass(frozen=True, slots=True)
class Plan:
    fail: str = ""
    after: int = 3  # tokens sent before the failure; -1: fails before the status line
    say: str = ""  # key of SAYINGS, printed on stderr at the failure; without ``fail`` only printed
    exit: int = -6  # as Python's returncode
    abort: int = 0  # 1: with the prefix that libc++abi prints
    n: int = 20  # tokens, if max_tokens allows
    delay: float = 0.0  # seconds before each token
    until: str = ""  # a path: the answer goes on until it exists, for one token at least
    prompt: int = 0  # reported number of prompt tokens; 0: the number of words
    prefill_delay: float = 0.0  # seconds before each keepalive comment
    head_delay: float = 0.0  # seconds before the status line
    status: int = 0  # answer with this status and {"error": "fake"}
    reasoning: int = 0  # the first tokens that are reasoning
    tool: int = 0  # 1: a tool call at the end
    diverge: int = -1  # index of the first token that differs between processes
    crowd: int = 0  # 1: the text in a batch differs from that alone, as on a GPU
    load: str = ""
    load_time: float = 0.0
    load_until: str = ""  # a path: after ``load_time``, until it exists
    sigterm: str = ""
    once: str = ""


def parse(words: str, base: Plan) -> Plan:
    """Left to right, later words take precedence. KeyError for an unknown word."""
    kinds = {field.name: type(getattr(base, field.name)) for field in fields(Plan)}
    for word in words.split():
        key, equals, value = word.partition("=")
        if equals:
            name = key.replace("-", "_")
            changes: dict[str, Any] = {name: kinds[name](value)}
            base = replace(base, **changes)
        else:
            base = parse(PRESETS[word], base)
    return base


def claimed(plan: Plan, innocent: Plan) -> Plan:
    """``plan``; with ``once``, only if this is the first claim of it, else ``innocent``."""
    if not plan.once:
        return plan
    try:
        Path(plan.once).touch(exist_ok=False)
    except FileExistsError:
        return replace(innocent, n=plan.n, delay=plan.delay)
    return replace(plan, once="")

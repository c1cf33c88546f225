"""What each cause is called in a message, what a person should do about it, and whose doing it mostly is.

Pure: no I/O, no clock.
"""

from collections.abc import Mapping

from backends.domain.failure import Blame, Cause

# (message, advice, blame)
_WORDS: Mapping[Cause, tuple[str, str, Blame]] = {
    Cause.OOM: (
        "it ran out of memory",
        (
            "Do not send the same prompt again: it fails again. Lower max_context, --prefill-step-size, "
            "--prompt-cache-bytes or max_inflight, use fewer replicas or a smaller model; after a restart wait "
            "until the memory is really free"
        ),
        Blame.BACKEND,
    ),
    Cause.RESOURCE_LIMIT: (
        "it reached the limit of live Metal buffers, a count and not an amount of memory",
        "Restart it; if that happens often, lower max_inflight or plan restarts, and update mlx and mlx-lm",
        Blame.BACKEND,
    ),
    Cause.GPU_TIMEOUT: (
        "the GPU watchdog ended a command that took too long",
        (
            "Lower --prefill-step-size (512, say), free memory so that nothing swaps, let the display sleep, then"
            " try again"
        ),
        Blame.BACKEND,
    ),
    Cause.GPU_VICTIM: (
        "its work was thrown away because another process made the GPU reset",
        "Look for the culprit among the other processes that use the GPU; this one only needs a restart",
        Blame.MACHINE,
    ),
    Cause.GPU_FAULT: (
        "the GPU or its driver reported a fault",
        ("Restart it after a pause; if it comes back, update mlx and macOS, run one MLX process per GPU, reboot"),
        Blame.BACKEND,
    ),
    Cause.LOAD_FAILURE: (
        "the model could not be loaded",
        (
            "Check the model folder: config.json, tokenizer files, complete safetensors; check that this mlx-lm "
            "supports the model type. Trying again changes nothing"
        ),
        Blame.OPERATOR,
    ),
    Cause.MODEL_NOT_FOUND: (
        "there is no such model",
        (
            "Check `model`: a hub name OWNER/NAME or an existing folder; a private one needs HF_TOKEN; offline it"
            " must be in the cache"
        ),
        Blame.OPERATOR,
    ),
    Cause.DOWNLOAD: (
        "the model could not be downloaded",
        (
            "Check the network and the hub, then try again later; a gated model needs an accepted licence and "
            "HF_TOKEN. Downloading beforehand with `hf download` avoids it"
        ),
        Blame.OPERATOR,
    ),
    Cause.DISK_FULL: (
        "the disk is full",
        "Free disk space, or move HF_HOME to another volume",
        Blame.OPERATOR,
    ),
    Cause.PORT_IN_USE: (
        "its port could not be bound",
        (
            "Find who listens there (`lsof -i :PORT`) and stop it, or choose another port; newer servers stay "
            "alive without a listener and must be killed"
        ),
        Blame.OPERATOR,
    ),
    Cause.DEPENDENCY: (
        "it could not start on this machine: a package, library, Metal device or command-line flag is missing",
        (
            "Reinstall mlx and mlx-lm in the right environment, in versions that fit each other, this macOS and "
            "the configured flags"
        ),
        Blame.OPERATOR,
    ),
    Cause.DISTRIBUTED: (
        "it lost another rank of its group",
        (
            "Stop all ranks on all hosts, wait for their ports to be free, check the links between the hosts, "
            "start all again"
        ),
        Blame.MACHINE,
    ),
    Cause.WEDGE: (
        "it answers HTTP but generates no more",
        (
            "Restart it; if one request does this again and again, look at its fields (an empty prompt, top_k, "
            "stop, logit_bias)"
        ),
        Blame.BACKEND,
    ),
    Cause.NATIVE_CRASH: (
        "it crashed in native code",
        "Restart it; set PYTHONFAULTHANDLER=1 to see where, look for a crash report (.ips), update mlx",
        Blame.BACKEND,
    ),
    Cause.KILLED: (
        "it was killed from outside",
        (
            "If nobody did it, the system ran out of memory: look for JetsamEvent reports (macOS) or dmesg "
            "(Linux), and use less"
        ),
        Blame.MACHINE,
    ),
    Cause.STALLED: (
        "it made no progress for too long",
        "Restart it; if the prompt was long, raise timeouts.progress or lower --prefill-step-size",
        Blame.BACKEND,
    ),
    Cause.START_TIMEOUT: (
        "it was not ready in time",
        "Raise timeouts.start for a large model or a download; else look at its output",
        Blame.BACKEND,
    ),
    Cause.UNREACHABLE: (
        "it could not be reached or would not take the request",
        "Check that the server runs, its address and its key",
        Blame.BACKEND,
    ),
    Cause.CLIENT_GONE: (
        "a client closed its connection",
        "Nothing: the backend is fine",
        Blame.REQUEST,
    ),
    Cause.BAD_REQUEST: (
        "a request was not acceptable",
        "Correct the request: the backend is fine",
        Blame.REQUEST,
    ),
    Cause.NONE: (
        "nothing in the output tells of a failure",
        "Nothing",
        Blame.BACKEND,
    ),
}

MESSAGE: Mapping[Cause, str] = {cause: words[0] for cause, words in _WORDS.items()}
ADVICE: Mapping[Cause, str] = {cause: words[1] for cause, words in _WORDS.items()}
BLAME: Mapping[Cause, Blame] = {cause: words[2] for cause, words in _WORDS.items()}

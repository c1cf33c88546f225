"""For each cause: its message, the advice to the operator, and the usual blame.

Pure: no I/O, no clock.
"""

from collections.abc import Mapping

from backends.domain.failure import Blame, Cause

# (message, advice, blame)
_TEXTS: Mapping[Cause, tuple[str, str, Blame]] = {
    Cause.OOM: (
        "it ran out of memory",
        (
            "If one prompt did it, the same prompt will do it again: send a shorter one. Lower max_context, "
            "--prefill-step-size, --prompt-cache-bytes or max_inflight, use fewer replicas or a smaller model; wait "
            "with a restart until the memory has been released"
        ),
        Blame.BACKEND,
    ),
    Cause.RESOURCE_LIMIT: (
        "it reached the limit on the number of live Metal buffers (a count, not an amount of memory)",
        "Restart it; if that happens often, lower max_inflight or plan restarts, and update mlx and mlx-lm",
        Blame.BACKEND,
    ),
    Cause.GPU_TIMEOUT: (
        "the GPU watchdog ended a command that took too long",
        (
            "Lower --prefill-step-size (for example to 512), free memory to avoid swapping, let the display sleep, "
            "then try again"
        ),
        Blame.BACKEND,
    ),
    Cause.GPU_VICTIM: (
        "its GPU work was discarded because other work on the GPU caused a reset",
        "Look for the cause among the other processes that use the GPU; a restart is enough for this one",
        Blame.MACHINE,
    ),
    Cause.GPU_FAULT: (
        "the GPU or its driver reported a fault",
        "Restart it after a pause; if the fault recurs, update mlx and macOS, run one MLX process per GPU, reboot",
        Blame.BACKEND,
    ),
    Cause.LOAD_FAILURE: (
        "the model could not be loaded",
        (
            "Check the model folder: config.json, tokenizer files, complete safetensors; check that this mlx-lm "
            "supports the model type. Trying again helps only once something was changed"
        ),
        Blame.OPERATOR,
    ),
    Cause.MODEL_NOT_FOUND: (
        "the model was not found",
        (
            "Check `model`: a hub name OWNER/NAME or an existing folder; a private model needs HF_TOKEN; offline"
            " the model must be in the cache"
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
            "Find the process that listens there (`lsof -i :PORT`) and stop it, or choose another port; newer "
            "servers stay alive without a listener and must be killed"
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
        "it lost another rank of its group, or did not reach it",
        (
            "Stop all ranks on all hosts, wait for their ports to be free, check the links between the hosts, "
            "start all again"
        ),
        Blame.MACHINE,
    ),
    Cause.WEDGE: (
        "it answers HTTP but generates no more",
        (
            "Restart it; if one request causes this repeatedly, check its fields (an empty prompt, top_k, stop, "
            "logit_bias)"
        ),
        Blame.BACKEND,
    ),
    Cause.NATIVE_CRASH: (
        "it crashed in native code",
        "Restart it; set PYTHONFAULTHANDLER=1 to see where, check for a crash report (.ips), update mlx",
        Blame.BACKEND,
    ),
    Cause.KILLED: (
        "it was killed from outside",
        (
            "If no person or program killed it, the system probably ran out of memory: look for JetsamEvent reports "
            "(macOS) or in dmesg (Linux), and use less memory"
        ),
        Blame.MACHINE,
    ),
    Cause.STALLED: (
        "it made no progress for too long",
        "Restart it; if a long prompt was being read, raise timeouts.progress or lower --prefill-step-size",
        Blame.BACKEND,
    ),
    Cause.START_TIMEOUT: (
        "it was not ready in time",
        "Raise timeouts.start if its output shows a load or a download that goes on; otherwise look there for why",
        Blame.BACKEND,
    ),
    Cause.UNREACHABLE: (
        "it could not be reached or refused the request",
        "Check that the server is running, its address and its key",
        Blame.BACKEND,
    ),
    Cause.CLIENT_GONE: (
        "a client closed its connection",
        "Nothing: the backend is fine",
        Blame.REQUEST,
    ),
    Cause.BAD_REQUEST: (
        "a request was invalid",
        "Correct the request: the backend is fine",
        Blame.REQUEST,
    ),
    Cause.NONE: (
        "the output shows no failure",
        "Nothing",
        Blame.BACKEND,
    ),
}

MESSAGE: Mapping[Cause, str] = {cause: texts[0] for cause, texts in _TEXTS.items()}
ADVICE: Mapping[Cause, str] = {cause: texts[1] for cause, texts in _TEXTS.items()}
BLAME: Mapping[Cause, Blame] = {cause: texts[2] for cause, texts in _TEXTS.items()}
# For a process that was still loading its model: no request has anything to do with it.
LOADING_ADVICE: Mapping[Cause, str] = {
    Cause.OOM: (
        "The model does not fit beside what else uses the memory: use a smaller or more strongly quantised model, "
        "fewer replicas, or end other programs"
    ),
    Cause.KILLED: (
        "If no person or program killed it, the system probably ran out of memory while the model was loaded: use a "
        "smaller model, fewer replicas, or end other programs"
    ),
}

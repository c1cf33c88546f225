"""Texts in which a server says of itself that its model, or the process that runs it, is dead, unloaded or not loaded
yet. Such servers answer with whatever status comes to hand (LM Studio: 400; Ollama: 500; vLLM: 500 or an error event
within a stream of status 200), so the text counts, not the status: it is the backend's failure, whatever was asked.

Sources: lmstudio-bug-tracker#1057, #1347, #1492, #914 and openhuman#4181 (LM Studio); ollama#8770, #11710, #14093,
#10517 (Ollama); llama-swap ``internal/process``; vllm#42362, #2281, vllm-metal#112 (vLLM); llama.cpp ``tools/server``
(``Loading model``); omlx#62, #2063.

The text may quote the client, so it counts only where it *begins* so, apart from names of exceptions before it: the
subject is the model or what runs it, and the verb says that it is gone.

Pure: no I/O, no clock.
"""

import re

from backends.domain.failure import Cause

MAX_TEXT_CHARS = 300  # from the beginning; what follows is detail, or a quotation

# "unspecific error: ", "litellm.InternalServerError: OpenAIException - ", "Error: "
_PREFIX = r"(?:(?:\w{1,20} )?[\w.]{0,40}(?:error|exception) ?[:\-]\s*){0,3}"
_ABOUT = (
    r"(?:(?:the|an?|your|this|requested|loaded|current|llama(?:\.cpp|-server)?|llm|mlx|ollama|vllm|sglang|language|gguf"
    r"|upstream|inference|generation|background) ){0,4}"
)
_SUBJECT = r"(?:model|engine|engine ?core|engine loop|runner|worker|backend|command|process|server|loop|task|scheduler)"
_NAME = r"(?: (?:'[^']{1,200}'|\"[^\"]{1,200}\"|[\w./:@-]{0,100}[/:.\d-][\w./:@-]{0,100}))?"  # of the model
_BE = r"(?: (?:process|thread|runner|server))?(?: (?:has|have|was|is|been|got|unexpectedly|already|exited and)){0,4}"
_DEAD = r"(?:crash(?:ed)?|terminated|died|dead|exited|killed|aborted|stopped|no longer running|not running)\b"
_UNLOADED = r"(?:unloaded|reloaded|not (?:yet )?loaded|not ready|(?:currently )?loading|failed to load)\b"
_RATHER_A_FILE = r"(?! (?:an? |the )?(?:image|audio|video|file|url|media))"

_CRASHED = re.compile(
    rf"{_PREFIX}{_ABOUT}{_SUBJECT}{_NAME}{_BE} {_DEAD}"
    rf"|{_PREFIX}(?:engine ?core|engine|background loop) (?:encountered an issue|has errored already)"
    rf"|{_PREFIX}task finished unexpectedly"
    rf"|{_PREFIX}an error was encountered while running the model"
    rf"|{_PREFIX}(?:async|mq|mqllm)?engine(?:dead|stopped)(?:error)?\b"
    rf"|{_PREFIX}generation thread died"
    rf"|{_PREFIX}(?:post predict|do encode request): ",
    re.IGNORECASE,
)
_GONE = re.compile(
    rf"{_PREFIX}{_ABOUT}{_SUBJECT}{_NAME}{_BE} {_UNLOADED}{_RATHER_A_FILE}"
    rf"|{_PREFIX}no models? (?:is |are |was )?(?:currently )?loaded"
    rf"|{_PREFIX}loading (?:the )?model"
    rf"|{_PREFIX}(?:failed|unable|could not|cannot|error)(?: to)? load(?:ing)? (?:the )?(?:llama )?(?:model|server)"
    rf"|{_PREFIX}cannot load \S{{1,200}}: projected memory"
    rf"|{_PREFIX}timed out waiting for (?:the )?(?:llama |model )?(?:runner|server|model)"
    rf"|{_PREFIX}(?:unable|failed) to start (?:the )?process"
    rf"|{_PREFIX}process (?:can ?not|was already)"
    rf"|{_PREFIX}health check timed out",
    re.IGNORECASE,
)
_TOO_BIG = re.compile(rf"{_PREFIX}{_ABOUT}model requires more (?:system |gpu )?memory", re.IGNORECASE)


def cause_in(text: str) -> Cause | None:
    """NATIVE_CRASH: what runs the model has crashed; UNREACHABLE: the model is not loaded; OOM: it does not fit in
    memory. None: the text says nothing of that."""
    begin = text[:MAX_TEXT_CHARS].lstrip()
    if _TOO_BIG.match(begin):
        return Cause.OOM
    if _CRASHED.match(begin):
        return Cause.NATIVE_CRASH
    return Cause.UNREACHABLE if _GONE.match(begin) else None

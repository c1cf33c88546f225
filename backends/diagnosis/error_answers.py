"""What an HTTP error answer of a backend means.

mlx_lm.server says 404 for nearly everything, and the cause stands only in the body, never in its log (≤0.32.2): a dead
generation thread, a model that cannot be loaded, a bad template. The body may also quote the client (a template that
raises with the role it was given), so a cause is believed only where the text *begins* as the library begins it.

Pure: no I/O, no clock.
"""

import json
import re
from dataclasses import dataclass

from backends.diagnosis.signatures import match
from backends.domain.failure import Blame, Cause

MAX_MESSAGE = 600  # characters


@dataclass(frozen=True, slots=True)
class AnswerVerdict:
    """``message`` is the backend's own text; ``code`` a code of the gateway's catalogue, where one was named or is
    plain from the status; ``retry_after`` in seconds."""

    cause: Cause
    blame: Blame
    message: str
    code: str | None = None
    param: str | None = None
    retry_after: float | None = None


# The codes of a gateway like this one, upstream: what they say about the backend that answered.
CODES: dict[str, tuple[Cause, Blame]] = {
    "backend_oom": (Cause.OOM, Blame.BACKEND),
    "backend_gpu_error": (Cause.GPU_FAULT, Blame.BACKEND),
    "backend_crashed": (Cause.NATIVE_CRASH, Blame.BACKEND),
    "backend_wedged": (Cause.WEDGE, Blame.BACKEND),
    "backend_stalled": (Cause.STALLED, Blame.BACKEND),
    "stream_truncated": (Cause.NATIVE_CRASH, Blame.BACKEND),
    "model_loading": (Cause.UNREACHABLE, Blame.BACKEND),
    "model_unavailable": (Cause.UNREACHABLE, Blame.BACKEND),
    "insufficient_memory": (Cause.OOM, Blame.MACHINE),
    "overloaded": (Cause.UNREACHABLE, Blame.BACKEND),
    "shutting_down": (Cause.UNREACHABLE, Blame.BACKEND),
    "generation_failed": (Cause.NONE, Blame.REQUEST),
    "context_length_exceeded": (Cause.BAD_REQUEST, Blame.REQUEST),
    "invalid_request": (Cause.BAD_REQUEST, Blame.REQUEST),
    "model_not_found": (Cause.MODEL_NOT_FOUND, Blame.OPERATOR),
    "not_found": (Cause.BAD_REQUEST, Blame.REQUEST),
    "method_not_allowed": (Cause.BAD_REQUEST, Blame.REQUEST),
    "unsupported_media_type": (Cause.BAD_REQUEST, Blame.REQUEST),
    "request_too_large": (Cause.BAD_REQUEST, Blame.REQUEST),
    "invalid_api_key": (Cause.UNREACHABLE, Blame.OPERATOR),
    "internal_error": (Cause.UNREACHABLE, Blame.BACKEND),
}

_BEGINNING = re.compile(
    r"\[(?:METAL|metal::|malloc|load|read|ring|jaccl|nccl|Errno )|Attempting to allocate|cuda\w{1,40}"
    r"|\d{3} (?:Client|Server) Error|Got: |An error happened while trying|Cannot (?:find|reach|access)|Couldn't "
    r"|Repo id must|Repository |No (?:safetensors|module)|Model (?:type|not found)|Missing \d|Received \d"
    r"|Expected shape|Tokenizer class|The (?:model|adapter) |There is no Stream"
    r"|We couldn't connect|The cached snapshot|\(Request ID|Can't load|Data processing error|Failed to load"
)
_OPERATOR = frozenset({Cause.LOAD_FAILURE, Cause.MODEL_NOT_FOUND, Cause.DOWNLOAD, Cause.DISK_FULL, Cause.DEPENDENCY})
_FIELD = re.compile(r"([a-z_]{2,40}) must be ")
_THREAD_DIED = "generation thread died"


def judge_answer(status: int, body: bytes, *, is_mlx: bool) -> AnswerVerdict | None:
    """None for a status that is no error."""
    if status < 400:
        return None
    error = _error_of(body)
    code = error.get("code") or error.get("type")
    text = _text(error.get("message")) or f"HTTP {status}"
    if isinstance(code, str) and code in CODES:
        cause, blame = CODES[code]
        return AnswerVerdict(cause, blame, text, code, _string(error.get("param")), _seconds(error.get("retry_after")))
    verdict = _of_mlx(status, text) if is_mlx else _of_other(status, text)
    if verdict.cause is Cause.BAD_REQUEST and verdict.param is None:
        param = _string(error.get("param")) or (found[1] if (found := _FIELD.match(text)) else None)
        return AnswerVerdict(verdict.cause, verdict.blame, text, verdict.code, param)
    return verdict


def _of_mlx(status: int, text: str) -> AnswerVerdict:
    if text == _THREAD_DIED or status == 503:
        return AnswerVerdict(Cause.WEDGE, Blame.BACKEND, text)
    if _BEGINNING.match(text) and (row := match(text)):
        return AnswerVerdict(row.cause, Blame.OPERATOR if row.cause in _OPERATOR else Blame.BACKEND, text)
    if status >= 500 and status != 501:
        return AnswerVerdict(Cause.NONE, Blame.REQUEST, text, "generation_failed")
    return AnswerVerdict(Cause.BAD_REQUEST, Blame.REQUEST, text)


def _of_other(status: int, text: str) -> AnswerVerdict:
    if status in (401, 403):
        return AnswerVerdict(Cause.UNREACHABLE, Blame.OPERATOR, text)
    if status == 429:
        return AnswerVerdict(Cause.UNREACHABLE, Blame.BACKEND, text, "overloaded")
    if status == 413:
        return AnswerVerdict(Cause.BAD_REQUEST, Blame.REQUEST, text, "request_too_large")
    if status == 404 and "model" in text.lower():
        return AnswerVerdict(Cause.MODEL_NOT_FOUND, Blame.OPERATOR, text)
    if status < 500:
        return AnswerVerdict(Cause.BAD_REQUEST, Blame.REQUEST, text)
    if row := match(text):
        return AnswerVerdict(row.cause, Blame.OPERATOR if row.cause in _OPERATOR else Blame.BACKEND, text)
    if status in (502, 503, 504, 507, 529):
        return AnswerVerdict(Cause.UNREACHABLE, Blame.BACKEND, text)
    return AnswerVerdict(Cause.NONE, Blame.REQUEST, text, "generation_failed")


def _error_of(body: bytes) -> dict[str, object]:
    """The error object: ``{"error": {…}}``, ``{"error": "text"}``, ``{"detail": …}``, or plain text."""
    try:
        parsed: object = json.loads(body)
    except (ValueError, RecursionError):
        return {"message": body.decode("utf-8", errors="replace")}
    if not isinstance(parsed, dict):
        return {"message": parsed}
    inner = parsed.get("error", parsed)
    if isinstance(inner, dict):
        return {**inner, "message": inner.get("message") or inner.get("detail") or inner.get("status")}
    return {**parsed, "message": inner}


def _text(value: object) -> str:
    if value is None:
        return ""
    text = value if isinstance(value, str) else json.dumps(value)
    return text.strip()[:MAX_MESSAGE]


def _string(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


def _seconds(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) and value >= 0 else None

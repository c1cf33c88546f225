"""What an HTTP error answer of a backend means.

mlx_lm.server answers nearly every error with 404, and the cause is only in the body, never in the log (≤0.32.2): a dead
generation thread, a model that cannot be loaded, a bad template. The body may also quote the client (a template that
raises an error with the role from the request), so a cause counts only where the text *begins* as the library's does.

Pure: no I/O, no clock.
"""

import json
import re
from dataclasses import dataclass, replace

from backends.diagnosis.dead_model import cause_in
from backends.diagnosis.signatures import match
from backends.domain.failure import NO_CODES, Blame, Cause, Codes, Reason, Sent

MAX_MESSAGE_CHARS = 600


@dataclass(frozen=True, slots=True)
class AnswerVerdict:
    """``message``: the backend's own text. ``code``: the error code of another gateway, if the answer has a known
    one. ``retry_after``: seconds. ``doubtful``: blamed on the request, but it may as well be the server's failure."""

    cause: Cause
    blame: Blame
    message: str
    sent: Sent = Sent.MAYBE
    reason: Reason | None = None
    code: str | None = None
    param: str | None = None
    retry_after: float | None = None
    doubtful: bool = False


_LIBRARY_ERROR_START = re.compile(
    r"\[(?:METAL|metal::|malloc|load|read|ring|jaccl|nccl|Errno )|Attempting to allocate|cuda\w{1,40}"
    r"|\d{3} (?:Client|Server) Error|Got: |An error happened while trying|Cannot (?:find|reach|access)|Couldn't "
    r"|Repo id must|Repository |No (?:safetensors|module)|Model (?:type|not found)|Missing \d|Received \d"
    r"|Expected shape|Tokenizer class|The (?:model|adapter) |There is no Stream"
    r"|We couldn't connect|The cached snapshot|\(Request ID|Can't load|Data processing error|Failed to load"
)
_OPERATOR_CAUSES = frozenset(
    {Cause.LOAD_FAILURE, Cause.MODEL_NOT_FOUND, Cause.DOWNLOAD, Cause.DISK_FULL, Cause.DEPENDENCY}
)
_FIELD_NAME = re.compile(r"([a-z_]{2,40}) must be ")
_THREAD_DIED = "generation thread died"


def judge_answer(status: int, body: bytes, *, is_mlx: bool, codes: Codes = NO_CODES) -> AnswerVerdict | None:
    """None for a status that is no error. ``codes``: the error codes of another mlx-gateway."""
    if status < 400:
        return None
    error = _error_of(body)
    code = error.get("code") or error.get("type")
    text = _text(error.get("message")) or f"HTTP {status}"
    if isinstance(code, str) and (meaning := codes.get(code)) is not None:
        return AnswerVerdict(
            meaning.cause,
            meaning.blame,
            text,
            sent=meaning.sent,
            code=code,
            param=_string(error.get("param")),
            retry_after=_seconds(error.get("retry_after")),
        )
    verdict = _of_mlx(status, text) if is_mlx else _of_other(status, text)
    if verdict.cause is Cause.BAD_REQUEST and verdict.param is None:
        param = _string(error.get("param")) or (found[1] if (found := _FIELD_NAME.match(text)) else None)
        return replace(verdict, param=param)
    return verdict


def _of_mlx(status: int, text: str) -> AnswerVerdict:
    if text == _THREAD_DIED or status == 503:
        return AnswerVerdict(Cause.WEDGE, Blame.BACKEND, text)
    if _LIBRARY_ERROR_START.match(text) and (row := match(text)):
        return AnswerVerdict(row.cause, Blame.OPERATOR if row.cause in _OPERATOR_CAUSES else Blame.BACKEND, text)
    if status >= 500 and status != 501:
        return AnswerVerdict(Cause.NONE, Blame.REQUEST, text)
    return AnswerVerdict(Cause.BAD_REQUEST, Blame.REQUEST, text)


def judge_event(text: str, code: str | None = None) -> AnswerVerdict:
    """An error event, within an answer of status 200, of a server that is no gateway like this one. ``code``: of the
    event; some servers put a status there."""
    status = int(code) if code is not None and len(code) == 3 and code.isascii() and code.isdigit() else 500
    return _of_other(status if 400 <= status < 600 else 500, text)


def _of_other(status: int, text: str) -> AnswerVerdict:
    """The text counts before the status: see ``dead_model``."""
    if (cause := cause_in(text)) is not None:
        sent = Sent.NOTHING if cause is Cause.UNREACHABLE else Sent.MAYBE  # no model: no work
        return AnswerVerdict(cause, Blame.BACKEND, text, sent)
    if status in (401, 403):
        return AnswerVerdict(Cause.UNREACHABLE, Blame.OPERATOR, text)
    if status == 429:
        return AnswerVerdict(Cause.UNREACHABLE, Blame.BACKEND, text, Sent.NOTHING, Reason.BUSY)
    if status == 413:
        return AnswerVerdict(Cause.BAD_REQUEST, Blame.REQUEST, text, reason=Reason.TOO_LARGE)
    if status == 404 and "model" in text.lower():
        return AnswerVerdict(Cause.MODEL_NOT_FOUND, Blame.OPERATOR, text)
    if status < 500:
        return AnswerVerdict(Cause.BAD_REQUEST, Blame.REQUEST, text)
    if row := match(text):
        return AnswerVerdict(row.cause, Blame.OPERATOR if row.cause in _OPERATOR_CAUSES else Blame.BACKEND, text)
    if status in (502, 503, 504, 507, 529):
        return AnswerVerdict(Cause.UNREACHABLE, Blame.BACKEND, text)
    return AnswerVerdict(Cause.NONE, Blame.REQUEST, text, doubtful=True)


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
    return text.strip()[:MAX_MESSAGE_CHARS]


def _string(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


def _seconds(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) and value >= 0 else None

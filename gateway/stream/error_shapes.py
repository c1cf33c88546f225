"""Errors inside a body with status 200, in the shapes that servers use for them.

Upstreams report a failure after the 200 as an object (``error``, ``errors``, ``detail``, ``code`` + ``message``,
``status``, flat or inside a choice or its delta), as a ``finish_reason``, or as a line that is no server-sent event.
SDKs take most of these for success. A field that is present and empty (``"error": ""``, ``{"code": 0}``) says nothing.

Pure: no I/O, no clock.
"""

import re
from dataclasses import dataclass
from typing import Any

from gateway.api.json_codec import dumps, loads

Json = dict[str, Any]

MAX_MESSAGE = 2000  # characters of an upstream's text in our errors

# No chunk has these unless it reports something; nearly all chunks are told to be good by this one look.
_REPORTS = frozenset(
    {"error", "errors", "detail", "status", "code", "success", "ok", "error_code", "error_msg", "error_message",
     "base_resp", "fault", "exception", "type", "err", "status_code", "statusCode"}
)  # fmt: skip
_ERRORS = ("error", "errors", "error_message", "error_msg", "error_code", "fault", "exception", "err")
_TEXTS = ("message", "detail", "error_message", "error_msg", "status_msg", "msg", "error", "err", "reason", "title")
_FAILED = re.compile(r"error|fail|fatal|exception|abort|cancel", re.IGNORECASE)
# A finish_reason that says failure. None of ``stop``, ``length``, ``tool_calls``, ``content_filter``, ``eos_token``,
# ``max_tokens``, ``end_turn``, ``stop_sequence``, ``safety``, ``refusal``, ``model_context_window_exceeded`` matches.
_FAILED_FINISH = re.compile(
    r"error|fail|fatal|exception|abort|cancel|crash|kill|insufficient|unavailable|interrupt|disconnect"
    r"|time_?d?_?out|user_?stopped|invalid|malformed|load|dead|died|shut_?down|(?<![a-z])oom|out_?of_?mem|dropped|evict"
    r"|preempt|panic|stalled|connection|lost",
    re.IGNORECASE,
)
_FAILED_EVENT = re.compile(rb"error|fail|fatal|exception|abort|panic", re.IGNORECASE)
_ENVELOPE = frozenset({"object", "created", "model"})
_BEAT = re.compile(r"^(?:ping|keep-?_?alive|heart-?_?beat)", re.IGNORECASE)
_ERROR_FIELD = re.compile(rb"\W*(?:[\w.]*error|[\w.]*exception|fatal|panic|traceback)\b", re.IGNORECASE)
_FIELD_NAME = re.compile(rb"[\w-]{1,40}")  # other than prose


@dataclass(frozen=True, slots=True)
class UpstreamError:
    """``code`` as the upstream gave it; ``protocol``: it reported no error, what it sent is not this protocol.
    ``lost_call``: it claims a tool call that is not in the answer."""

    message: str
    code: str | None = None
    protocol: bool = False
    lost_call: bool = False


def find_error(body: Json) -> UpstreamError | None:
    """The error in a chunk or in a JSON answer, in any of the shapes seen, or None."""
    choices = body.get("choices")
    if not choices or not _REPORTS.isdisjoint(body):
        found = _reported(body, bare=not choices and not body.get("usage"))
        if found is not None:
            return found
    for choice in choices if choices.__class__ is list else ():
        if choice.__class__ is dict and (found := _in_choice(choice)) is not None:
            return found
    return None


def failed_event(name: bytes) -> bool:
    """``name``: what stands after ``event:``."""
    return _FAILED_EVENT.search(name) is not None


def foreign(chunk: Json) -> UpstreamError | None:
    """A chunk with nothing in it that a chunk of this protocol has: a heartbeat of a kind that is not known, or a
    report of one. Where the answer has no finish_reason, it is taken for the reason."""
    if not chunk or "choices" in chunk or "usage" in chunk or not chunk.keys().isdisjoint(_ENVELOPE) or _is_beat(chunk):
        return None
    return described(chunk)


def _is_beat(chunk: Json) -> bool:
    return chunk.keys() <= {"type"} or any(_BEAT.search(value) for value in chunk.values() if isinstance(value, str))


def failed_finish(reason: str) -> bool:
    return _FAILED_FINISH.search(reason) is not None


def bare_error(lines: bytes) -> UpstreamError | None:
    """What lines that are no fields of a server-sent event report. A field with an unknown name is none, as the
    standard has it; prose, and JSON, were not meant as a field."""
    text = lines.strip()
    if text[:1] in (b"{", b"["):
        return event_error(text)
    first = text.partition(b"\n")[0]
    if _ERROR_FIELD.match(first):
        name, colon, value = text.partition(b":")
        report = value.strip()
        return event_error(report) if colon and name.strip().lower() == b"error" and report else described(show(text))
    name = first.partition(b":")[0].strip()
    return None if not name or _FIELD_NAME.fullmatch(name) else described(show(text))


def event_error(data: bytes) -> UpstreamError:
    """Of an event that is an error by its name or its place, whatever its form."""
    try:
        value = loads(data)
    except ValueError:
        return UpstreamError(show(data) if data.strip() else "an error event without text")
    if isinstance(value, dict):
        return find_error(value) or described(value)
    return described(value)


def described(value: Any) -> UpstreamError:
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
        value = value[0]
    if not isinstance(value, dict):
        return UpstreamError(clip(value if isinstance(value, str) else _json(value)))
    code = value.get("code") or value.get("error_code")
    message = next((text for name in _TEXTS if isinstance(text := value.get(name), str) and text.strip()), None)
    return UpstreamError(
        clip(message if message is not None else _json(value)),
        code=str(code)[:MAX_MESSAGE] if isinstance(code, str | int) and code else None,
    )


def not_this_protocol(what: str) -> UpstreamError:
    return UpstreamError(f"the backend sent {what}", protocol=True)


def show(data: bytes) -> str:
    return clip(data[: 4 * MAX_MESSAGE].decode("utf-8", "replace").strip())


def clip(text: str) -> str:
    text = text.encode("utf-8", "replace").decode()  # lone surrogates would break logs
    return text if len(text) <= MAX_MESSAGE else text[:MAX_MESSAGE] + "…"


def _reported(body: Json, *, bare: bool) -> UpstreamError | None:
    """``bare``: there is nothing of an answer in it."""
    for name in _ERRORS:
        if _says(value := body.get(name)):
            return described(body if not isinstance(value, str | dict | list) or name not in _ERRORS[:2] else value)
    if body.get("object") == "error" or body.get("type") == "error":  # flat: old vLLM, the Responses API
        return described(body)
    if _is_failure(body.get("status")) or body.get("success") is False or body.get("ok") is False:
        return described(body)
    base = body.get("base_resp")  # MiniMax
    if isinstance(base, dict) and _says(base.get("status_code")):
        return described(base)
    if any(_is_failure(body.get(name)) for name in ("code", "status_code", "statusCode")):
        return described(body)
    if bare and any(_says(body.get(name)) for name in ("detail", "message", "msg")):
        return described(body)
    return None


def _in_choice(choice: Json) -> UpstreamError | None:
    for holder in (choice, choice.get("delta"), choice.get("message")):
        if holder.__class__ is dict and ("error" in holder or "errors" in holder):
            for name in ("error", "errors"):
                if _says(error := holder.get(name)):
                    return described(error)
    finish = choice.get("finish_reason")
    if finish.__class__ is str and failed_finish(finish):
        return UpstreamError(f'the answer ended with finish_reason "{clip(finish)[:100]}"')
    return None


def _says(value: Any) -> bool:
    """Present and not empty; an object or list of empty values is empty."""
    if isinstance(value, dict):
        return any(item not in (None, "", 0) for item in value.values())
    return bool(value.strip() if isinstance(value, str) else value)


def _is_failure(status: Any) -> bool:
    """``error``, ``failed``, 500; not ``success``, 0, 200."""
    if isinstance(status, int):
        return status >= 400
    return isinstance(status, str) and (_FAILED.search(status) is not None or bool(re.fullmatch("[45]\\d\\d", status)))


def _json(value: Any) -> str:
    try:
        return dumps(value).decode()
    except ValueError:
        return "an error that JSON cannot show"

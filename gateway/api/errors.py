"""The catalogue of errors: code to status and type, and their JSON, header and SSE forms.

A client gets one form for every failure, before the stream and within it. The form is what the SDKs read (``code``
and ``type`` as text, ``message`` inside ``error``); a bare string loses its code, a flat object passes as success.

Pure: no I/O, no clock.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from gateway.api.json_codec import dumps

Headers = tuple[tuple[bytes, bytes], ...]

# Retry-After: openai-node takes 0 as "at once"; openai-python gives up above 120, others fall back above 60.
MIN_RETRY_AFTER = 1
MAX_RETRY_AFTER = 59


class Code(StrEnum):
    BACKEND_OOM = "backend_oom"
    BACKEND_GPU_ERROR = "backend_gpu_error"
    BACKEND_CRASHED = "backend_crashed"
    BACKEND_WEDGED = "backend_wedged"
    BACKEND_STALLED = "backend_stalled"
    STREAM_TRUNCATED = "stream_truncated"
    MODEL_LOADING = "model_loading"
    MODEL_UNAVAILABLE = "model_unavailable"
    INSUFFICIENT_MEMORY = "insufficient_memory"
    OVERLOADED = "overloaded"
    SHUTTING_DOWN = "shutting_down"
    TOOL_CALL_MALFORMED = "tool_call_malformed"
    TOOL_CALL_TRUNCATED = "tool_call_truncated"
    GENERATION_FAILED = "generation_failed"
    CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"
    INVALID_REQUEST = "invalid_request"
    MODEL_NOT_FOUND = "model_not_found"
    NOT_FOUND = "not_found"
    METHOD_NOT_ALLOWED = "method_not_allowed"
    UNSUPPORTED_MEDIA_TYPE = "unsupported_media_type"
    REQUEST_TOO_LARGE = "request_too_large"
    INVALID_API_KEY = "invalid_api_key"
    FORBIDDEN_ORIGIN = "forbidden_origin"
    CONFLICT = "conflict"
    INTERNAL_ERROR = "internal_error"


class ErrorType(StrEnum):
    SERVER = "server_error"
    REQUEST = "invalid_request_error"
    AUTHENTICATION = "authentication_error"


@dataclass(frozen=True, slots=True)
class Entry:
    status: int
    type: ErrorType


_UNAVAILABLE = Entry(503, ErrorType.SERVER)
_FAILED = Entry(500, ErrorType.SERVER)
_BAD_REQUEST = Entry(400, ErrorType.REQUEST)

CATALOGUE: Mapping[Code, Entry] = MappingProxyType(
    {
        Code.BACKEND_OOM: _UNAVAILABLE,
        Code.BACKEND_GPU_ERROR: _UNAVAILABLE,
        Code.BACKEND_CRASHED: _UNAVAILABLE,
        Code.BACKEND_WEDGED: _UNAVAILABLE,
        Code.BACKEND_STALLED: _UNAVAILABLE,
        Code.STREAM_TRUNCATED: _UNAVAILABLE,
        Code.MODEL_LOADING: _UNAVAILABLE,
        Code.MODEL_UNAVAILABLE: _UNAVAILABLE,
        Code.INSUFFICIENT_MEMORY: _UNAVAILABLE,
        Code.OVERLOADED: _UNAVAILABLE,
        Code.SHUTTING_DOWN: _UNAVAILABLE,
        Code.TOOL_CALL_MALFORMED: _FAILED,
        Code.TOOL_CALL_TRUNCATED: _BAD_REQUEST,
        Code.GENERATION_FAILED: _FAILED,
        Code.CONTEXT_LENGTH_EXCEEDED: _BAD_REQUEST,
        Code.INVALID_REQUEST: _BAD_REQUEST,
        Code.MODEL_NOT_FOUND: Entry(404, ErrorType.REQUEST),
        Code.NOT_FOUND: Entry(404, ErrorType.REQUEST),
        Code.METHOD_NOT_ALLOWED: Entry(405, ErrorType.REQUEST),
        Code.UNSUPPORTED_MEDIA_TYPE: Entry(415, ErrorType.REQUEST),
        Code.REQUEST_TOO_LARGE: Entry(413, ErrorType.REQUEST),
        Code.INVALID_API_KEY: Entry(401, ErrorType.AUTHENTICATION),
        Code.FORBIDDEN_ORIGIN: Entry(403, ErrorType.REQUEST),
        Code.CONFLICT: Entry(409, ErrorType.REQUEST),
        Code.INTERNAL_ERROR: _FAILED,
    }
)


@dataclass(frozen=True, slots=True)
class GatewayError:
    """What a client is told. ``message`` says what happened, to which backend, and what to do.

    ``retry_after`` in seconds, None = unknown; matters only with 503. ``should_retry`` False keeps the SDKs from
    sending this request again; None leaves it to them. ``extra_headers`` with names in lower case, e.g. ``allow``.
    ``http_status``: instead of the code's own.
    """

    code: Code
    message: str
    param: str | None = None
    model: str | None = None
    backend: str | None = None
    retry_after: float | None = None
    should_retry: bool | None = None
    extra_headers: Headers = ()
    http_status: int | None = None

    @property
    def status(self) -> int:
        return self.http_status or CATALOGUE[self.code].status


class RequestError(Exception):
    """Carries a GatewayError up to the code that answers the client."""

    def __init__(self, error: GatewayError) -> None:
        super().__init__(f"{error.code.value}: {error.message}")
        self.error = error


def internal_error(request_id: str) -> GatewayError:
    message = f"a bug in the gateway; its log has the traceback under request id {request_id}"
    return GatewayError(Code.INTERNAL_ERROR, message)


def clamp_retry_after(seconds: float | None) -> int:
    """Whole seconds, 1 to 59, rounded up: a client that comes back early fails again."""
    if seconds is None or not seconds > MIN_RETRY_AFTER:  # NaN too
        return MIN_RETRY_AFTER
    return MAX_RETRY_AFTER if seconds >= MAX_RETRY_AFTER else math.ceil(seconds)


def body(error: GatewayError, request_id: str) -> bytes:
    entry = CATALOGUE[error.code]
    return dumps(
        {
            "error": {
                "message": error.message,
                "type": entry.type.value,
                "param": error.param,
                "code": error.code.value,
                "request_id": request_id,
                "model": error.model,
                "backend": error.backend,
                "retry_after": clamp_retry_after(error.retry_after) if error.status == 503 else None,
            }
        }
    )


def headers(error: GatewayError) -> list[tuple[bytes, bytes]]:
    """Those the error itself calls for; not content-type and the like."""
    out = list(error.extra_headers)
    if error.status == 503:
        out.append((b"retry-after", b"%d" % clamp_retry_after(error.retry_after)))
    if error.status == 401:
        out.append((b"www-authenticate", b"Bearer"))  # RFC 9110, 15.5.2: a 401 must name a scheme
    if error.should_retry is not None:
        out.append((b"x-should-retry", b"true" if error.should_retry else b"false"))
    return out


def sse_tail(error: GatewayError, request_id: str) -> bytes:
    """The end of a stream that has begun: the error as a last data event, then ``[DONE]``."""
    return b"data: " + body(error, request_id) + b"\n\ndata: [DONE]\n\n"

"""The catalogue against the public table, the shapes of errors, and JSON at its edges."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.api import errors
from gateway.api.errors import CATALOGUE, Code, GatewayError, RequestError, clamp_retry_after
from gateway.api.json_codec import dumps, loads

TABLE = """
backend_oom 503 server_error
backend_gpu_error 503 server_error
backend_crashed 503 server_error
backend_wedged 503 server_error
backend_stalled 503 server_error
stream_truncated 503 server_error
model_loading 503 server_error
model_unavailable 503 server_error
insufficient_memory 503 server_error
overloaded 503 server_error
shutting_down 503 server_error
tool_call_malformed 500 server_error
tool_call_truncated 400 invalid_request_error
generation_failed 500 server_error
context_length_exceeded 400 invalid_request_error
invalid_request 400 invalid_request_error
model_not_found 404 invalid_request_error
not_found 404 invalid_request_error
method_not_allowed 405 invalid_request_error
unsupported_media_type 415 invalid_request_error
request_too_large 413 invalid_request_error
invalid_api_key 401 authentication_error
forbidden_origin 403 invalid_request_error
conflict 409 invalid_request_error
internal_error 500 server_error
"""


def test_the_catalogue_is_the_public_table() -> None:
    rows = {(code.value, str(entry.status), entry.type.value) for code, entry in CATALOGUE.items()}
    assert rows == {tuple(line.split()) for line in TABLE.split("\n") if line}
    assert set(CATALOGUE) == set(Code)


KEYS = ["message", "type", "param", "code", "request_id", "model", "backend", "retry_after"]


@pytest.mark.parametrize("code", Code)
def test_the_body_has_exactly_the_public_keys(code: Code) -> None:
    answer = json.loads(errors.body(GatewayError(code, "it broke"), "req-1"))
    assert list(answer) == ["error"]
    assert list(answer["error"]) == KEYS
    assert answer["error"]["code"] == code.value
    assert answer["error"]["request_id"] == "req-1"
    assert answer["error"]["param"] is answer["error"]["model"] is answer["error"]["backend"] is None
    assert answer["error"]["retry_after"] == (1 if CATALOGUE[code].status == 503 else None)


@pytest.mark.parametrize("code", Code)
def test_every_503_and_nothing_else_says_when_to_come_back(code: Code) -> None:
    error = GatewayError(code, "x", retry_after=12.2)
    found = dict(errors.headers(error))
    assert found.get(b"retry-after") == (b"13" if error.status == 503 else None)
    assert b"x-should-retry" not in found
    assert (found.get(b"www-authenticate") == b"Bearer") == (error.status == 401)


def test_headers_of_the_error_and_of_its_case() -> None:
    error = GatewayError(Code.METHOD_NOT_ALLOWED, "x", should_retry=False, extra_headers=((b"allow", b"GET"),))
    assert errors.headers(error) == [(b"allow", b"GET"), (b"x-should-retry", b"false")]
    assert errors.headers(GatewayError(Code.INTERNAL_ERROR, "x", should_retry=True)) == [(b"x-should-retry", b"true")]


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        *[(None, 1), (0, 1), (-5, 1), (0.2, 1), (1, 1), (1.01, 2), (30, 30), (58.5, 59), (59, 59), (600, 59)],
        *[(math.inf, 59), (-math.inf, 1), (math.nan, 1)],
    ],
)
def test_retry_after_is_clamped(seconds: float | None, expected: int) -> None:
    assert clamp_retry_after(seconds) == expected


@given(st.floats() | st.none())
def test_retry_after_is_always_1_to_59_whole_seconds(seconds: float | None) -> None:
    value = clamp_retry_after(seconds)
    assert isinstance(value, int)
    assert 1 <= value <= 59


def test_the_tail_of_a_stream_is_two_whole_events() -> None:
    error = GatewayError(Code.BACKEND_OOM, "out of memory\n\ndata: no", model="m", backend="m:0", retry_after=3)
    first, second, rest = errors.sse_tail(error, "r").split(b"\n\n")
    assert second == b"data: [DONE]"
    assert rest == b""
    inner = json.loads(first.removeprefix(b"data: "))["error"]
    assert inner["message"] == "out of memory\n\ndata: no"
    assert (inner["model"], inner["backend"], inner["retry_after"]) == ("m", "m:0", 3)


def test_a_request_error_carries_it() -> None:
    error = GatewayError(Code.OVERLOADED, "the queue is full")
    with pytest.raises(RequestError, match="overloaded: the queue is full") as caught:
        raise RequestError(error)
    assert caught.value.error is error


# ---- JSON


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (b'{"a": [1, null, "\xe2\x98\x83"]}', {"a": [1, None, "\u2603"]}),
        ('"text"', "text"),
        (b'"\\ud83d"', "\ud83d"),
        (b"[Infinity, 1e999]", [math.inf, math.inf]),
        (b'\xef\xbb\xbf{"bom": 1}', {"bom": 1}),
        (b"[" * 200 + b"]" * 200, None),
    ],
)
def test_what_python_servers_send_is_read(text: bytes | str, value: object) -> None:
    read = loads(text)
    if value is not None:
        assert read == value


def test_nan_is_read() -> None:
    assert math.isnan(loads(b'{"logprob": NaN}')["logprob"])


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"nope",
        b'{"a":1}x',
        b'"\xff"',
        b"\xff\xfe[\x00]\x00",
        b"[" * 200_000,
        b'{"a":' * 100_000,
        b"1" * 5000,
    ],
)
def test_what_is_not_json_is_a_value_error(text: bytes) -> None:
    with pytest.raises(ValueError, match=r".+"):
        loads(text)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"a": "\u2603"}, '{"a":"\u2603"}'.encode()),
        ({"a": "\ud83d"}, b'{"a":"\\ud83d"}'),
        ({"a": 2**70}, b'{"a":1180591620717411303424}'),
        ([math.nan, math.inf], b"[null,null]"),
        (["\ud83d", math.nan, {"b": (math.inf,)}], b'["\\ud83d",null,{"b":[null]}]'),
    ],
)
def test_what_is_written_is_json(value: object, text: bytes) -> None:
    assert dumps(value) == text


def test_what_json_cannot_say_is_a_value_error() -> None:
    deep: list[object] = []
    for _ in range(5000):
        deep = [deep]
    for value in (object(), {(1, 2): 3}, deep):
        with pytest.raises(ValueError, match=r".+"):
            dumps(value)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.text(st.characters(categories=["Cs", "L"])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


@given(VALUES)
def test_json_is_read_back_as_written(value: object) -> None:
    assert json.loads(dumps(value)) == value
    assert json.loads(dumps(loads(dumps(value)))) == json.loads(dumps(loads(json.dumps(value))))

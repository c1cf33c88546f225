"""Clients that leave, and clients that send what cannot be answered."""

import gzip
import json
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.conftest import Launch
from tests.integration.harness import Gateway, fake, launched, wait_until
from tests.integration.wire import CHAT, chat, endless, whole

pytestmark = pytest.mark.slow

FREED_WITHIN = 5.0  # seconds; it is the event loop that frees it, but the machine may be busy
SILENT = "FAKE head-delay=600"


def assert_freed(gateway: Gateway, model: str = "tiny") -> None:
    wait_until(lambda: gateway.inflight(model) == 0, FREED_WITHIN, "the slot was freed")


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    models = {"tiny": fake(aliases=["default"]), "one": fake(max_inflight=1)}
    config = {"server": {"max_body": "64KiB"}, "models": models}
    with launched(config, tmp_path_factory.mktemp("clients")) as running:
        yield running


# -- leaving -----------------------------------------------------------------------------------------------------------


def test_leaving_in_mid_stream(gateway: Gateway) -> None:
    with gateway.stream(endless()) as stream:
        stream.until_text()
        assert gateway.inflight() == 1
    assert_freed(gateway)


@pytest.mark.parametrize("stream", [True, False])
def test_leaving_before_the_first_word(gateway: Gateway, stream: bool) -> None:
    body = json.dumps(chat(SILENT, stream=stream)).encode()
    host, port = gateway.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as sock:
        head = f"POST {CHAT} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: {len(body)}\r\n\r\n"
        sock.sendall(head.encode() + body)
        wait_until(lambda: gateway.inflight() == 1)
    assert_freed(gateway)


def test_leaving_while_waiting_in_line(gateway: Gateway) -> None:
    with gateway.stream(endless("one")) as first:
        first.until_text()
        with pytest.raises(httpx.ReadTimeout), httpx.Client(base_url=gateway.url, timeout=0.5) as impatient:
            impatient.post(CHAT, json=chat("hello", "one"))
        wait_until(lambda: gateway.queued("one") == 0, FREED_WITHIN)
        assert gateway.inflight("one") == 1
    assert_freed(gateway, "one")
    assert whole(gateway.ask(chat("hello", "one")))


def test_leaving_in_the_middle_of_the_body(gateway: Gateway) -> None:
    host, port = gateway.url.removeprefix("http://").split(":")
    before = gateway.log.count("client_left")
    with socket.create_connection((host, int(port))) as sock:
        sock.sendall(f"POST {CHAT} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: 1000\r\n\r\n{{".encode())
    wait_until(lambda: gateway.log.count("client_left") > before)
    assert whole(gateway.ask(chat("hello")))


@pytest.mark.parametrize("stream", [True, False])
def test_the_real_server_stops_working(tiny_model: Path, launch: Launch, stream: bool) -> None:
    """Left alone, mlx_lm.server would generate an answer that is not streamed to its end."""
    gateway = launch({"models": {"tiny": {"model": str(tiny_model)}}})
    process = psutil.Process(gateway.backend("tiny:0")["pid"])
    body = chat("once", max_tokens=8000)
    if stream:
        with gateway.stream(body) as leaving:
            leaving.until_text()
    else:
        with httpx.Client(base_url=gateway.url, timeout=1) as impatient, pytest.raises(httpx.ReadTimeout):
            impatient.post(CHAT, json=body)
    assert_freed(gateway)

    def idle() -> bool:
        return process.cpu_percent(interval=0.5) < 30

    wait_until(idle, 8, "an idle backend")
    assert "tokens=8000" not in gateway.log
    assert whole(gateway.ask(chat("hello", max_tokens=5)))


# -- what cannot be answered -------------------------------------------------------------------------------------------


@pytest.fixture
def untouched(gateway: Gateway) -> Iterator[None]:
    """No backend may hear of any of it."""

    def posts() -> int:
        return sum(gateway.output(f"{name}:0").count('"POST ') for name in ("tiny", "one"))

    before = posts()
    yield
    assert posts() == before
    assert gateway.backend("tiny:0")["restarts"] == 0


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize(
    ("content", "status", "code", "param"),
    [
        (b"", 400, "invalid_request", None),
        (b"hello", 400, "invalid_request", None),
        (b"[]", 400, "invalid_request", None),
        (b'{"model": "tiny"', 400, "invalid_request", None),
        (b'{"model": "tiny"}', 400, "invalid_request", "messages"),
        (b'{"model": "tiny", "messages": []}', 400, "invalid_request", "messages"),
        (b'{"model": "tiny", "messages": "hello"}', 400, "invalid_request", "messages"),
        (b'{"model": 7, "messages": [{"role": "user", "content": "x"}]}', 400, "invalid_request", "model"),
        (b'{"model": "no", "messages": [{"role": "user", "content": "x"}]}', 404, "model_not_found", "model"),
        (b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": "9"}', 400, "invalid_request", "max_tokens"),
        (b'{"messages": [{"role": "user", "content": "x"}], "stop": [1]}', 400, "invalid_request", "stop"),
        (b'{"messages": [{"role": "user", "content": "' + b"x" * 70_000 + b'"}]}', 413, "request_too_large", None),
    ],
)
def test_bad_bodies(gateway: Gateway, *, content: bytes, status: int, code: str, param: str | None) -> None:
    answer = gateway.http.post(CHAT, content=content, headers={"content-type": "application/json"})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (status, code)
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    assert error["request_id"] == answer.headers["x-request-id"]
    if param is not None:
        assert error["param"] is not None
        assert error["param"].split("[")[0] == param


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", CHAT, 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("POST", "/v1/embeddings", 404, "not_found"),
        ("GET", "/nothing/here", 404, "not_found"),
        ("GET", "/v1/models/nothing", 404, "model_not_found"),
        ("POST", "/api/backends/nothing:0/stop", 404, "not_found"),
    ],
)
def test_bad_paths(gateway: Gateway, *, method: str, path: str, status: int, code: str) -> None:
    answer = gateway.http.request(method, path)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (status, code)
    assert error["request_id"] == answer.headers["x-request-id"]
    if status == 405:
        assert answer.headers["allow"]


@pytest.mark.usefixtures("untouched")
def test_forms_and_packed_bodies(gateway: Gateway) -> None:
    form = gateway.http.post(CHAT, files={"file": b"hello"})
    unknown = gateway.http.post(CHAT, content=b"hello", headers={"content-encoding": "zstd"})
    for answer in (form, unknown):
        assert answer.status_code == 415
        assert answer.json()["error"]["code"] == "unsupported_media_type"
    broken = gateway.http.post(CHAT, content=b"\x1f\x8b", headers={"content-encoding": "gzip"})
    assert (broken.status_code, broken.json()["error"]["code"]) == (400, "invalid_request")


def test_a_packed_body_is_a_body(gateway: Gateway) -> None:
    packed = gzip.compress(json.dumps(chat("hello")).encode())
    assert gateway.http.post(CHAT, content=packed, headers={"content-encoding": "gzip"}).status_code == 200


@pytest.mark.usefixtures("untouched")
def test_no_http_at_all(gateway: Gateway) -> None:
    host, port = gateway.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as sock:
        sock.sendall(b"\x16\x03\x01\x02\x00 this is not HTTP\r\n\r\n")
        assert sock.recv(100).startswith(b"HTTP/1.1 400")


def test_names_of_paths(gateway: Gateway) -> None:
    for path in (CHAT, f"{CHAT}/", "/chat/completions", f"{CHAT}?api-version=1"):
        assert whole(gateway.ask(chat("hello", "default"), path))


def test_request_ids(gateway: Gateway) -> None:
    body = chat("hello")
    assert gateway.ask(body, CHAT, **{"x-request-id": "mine-7"}).headers["x-request-id"] == "mine-7"
    made = gateway.ask(body, CHAT, **{"x-request-id": "not sane"}).headers["x-request-id"]
    assert made != "not sane"
    wait_until(lambda: f"request_id={made} " in gateway.log, what="the line of the request, which follows its answer")


def test_keys(launch: Launch) -> None:
    gateway = launch({"server": {"api_keys": ["secret"]}, "models": {"tiny": fake()}}, ready=False)
    wait_until(lambda: gateway.http.get("/health").json() == {"status": "ok"})
    for path in ("/v1/models", "/api/status"):
        assert gateway.http.get(path).status_code == 401
    answer = gateway.ask(chat("hello"))
    assert (answer.status, answer.code) == (401, "invalid_api_key")
    assert gateway.ask(chat("hello"), CHAT, authorization="Bearer wrong").status == 401
    assert whole(gateway.ask(chat("hello"), CHAT, authorization="Bearer secret"))
    assert whole(gateway.ask(chat("hello"), CHAT, **{"x-api-key": "secret"}))
    full = gateway.http.get("/health", headers={"x-api-key": "secret"}).json()
    assert full["models"]["tiny"]["backends"][0]["state"] == "ready"

"""mlx_lm.server is recognised by what it says, and nothing else is taken for it."""

import json

import pytest

from backends.diagnosis.engine import EngineIdentity, is_mlx_server
from backends.domain.engine import Engine
from backends.domain.spec import BackendSpec, Remote
from backends.upstream.exchange import Head, Headers

PYTHON = ((b"server", b"BaseHTTP/0.6 Python/3.12.3"),)
OPEN: Headers = (
    (b"access-control-allow-origin", b"*"),
    (b"access-control-allow-methods", b"*"),
    (b"access-control-allow-headers", b"*"),
)
NGINX = ((b"server", b"nginx/1.27"),)
HEALTHY = b'{"status": "ok"}'
DEAD = b'{"error": "generation thread died"}'
CHUNK = (
    b'data: {"id": "x", "system_fingerprint": "0.32.2-0.32.4-macOS-26.0-arm64-arm-64bit-applegpu_g16s", "choices": []}'
)


def identity(name: str = "tiny", engine: Engine = Engine.OTHER, *, named: bool = True) -> EngineIdentity:
    return EngineIdentity(BackendSpec("far:0", "far", 0, name, Remote("http://far"), engine, named=named))


@pytest.mark.parametrize(
    ("status", "headers", "body"),
    [
        (200, PYTHON + OPEN, HEALTHY),
        (503, PYTHON + OPEN, b'{"status": "unavailable"}'),
        (404, PYTHON + OPEN, b"Not Found"),
        (200, PYTHON + OPEN[1:], b""),  # --allowed-origins
        (200, NGINX + OPEN, HEALTHY),
        (200, NGINX + OPEN, CHUNK),
        (404, NGINX, DEAD),
        (404, NGINX, DEAD + b"\n"),
    ],
)
def test_recognised(status: int, headers: Headers, body: bytes) -> None:
    assert is_mlx_server(Head(status, headers), body)


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        (PYTHON, HEALTHY),  # any small server of Python's own
        (PYTHON, CHUNK),
        (PYTHON + OPEN[:1], b'{"error": "busy"}'),
        (NGINX, CHUNK),  # LiteLLM and other gateways pass on the fingerprint
        (NGINX + OPEN, b'{"status": "ok", "models": {}}'),
        (NGINX + OPEN, b'{"system_fingerprint": "fp_ollama"}'),
        (NGINX + OPEN, b'{"system_fingerprint": "b5000-abcdef"}'),
        (NGINX, json.dumps({"error": {"message": "generation thread died"}}).encode()),
        (NGINX, b'{"error": "the template said: generation thread died"}'),
        ((), b""),
    ],
)
def test_not_recognised(headers: Headers, body: bytes) -> None:
    assert not is_mlx_server(Head(200, headers), body)


def test_configured_is_known_from_the_start() -> None:
    own = identity("default_model", Engine.MLX_LM)
    assert (own.is_mlx, own.model) == (True, "default_model")
    own.note_get(Head(200, NGINX), b"OK")
    assert own.is_mlx


@pytest.mark.parametrize(
    ("configured", "sent"),
    [
        ("tiny", "default_model"),  # no path and no name of the hub: the server could only ask the hub in vain
        ("mlx-community/Qwen3-4B-4bit", "mlx-community/Qwen3-4B-4bit"),
        ("/models/tiny", "/models/tiny"),
    ],
)
def test_a_raw_server_need_not_be_told_its_model(configured: str, sent: str) -> None:
    one = identity(configured)
    assert (one.is_mlx, one.model) == (False, configured)
    one.note_get(Head(200, PYTHON + OPEN), HEALTHY)
    assert (one.engine, one.model) == (Engine.MLX_LM, sent)


def test_a_public_name_is_not_asked_of_the_hub() -> None:
    one = identity("org/public", named=False)
    one.note_get(Head(200, PYTHON + OPEN), HEALTHY)
    assert one.model == "default_model"


def test_behind_a_router_it_keeps_the_name_that_the_router_knows() -> None:
    one = identity()
    one.note_get(Head(200, ((b"content-type", b"text/plain"),)), b"OK")  # llama-swap's own /health
    one.note_answer(Head(200, PYTHON + OPEN))
    assert (one.is_mlx, one.model) == (True, "tiny")

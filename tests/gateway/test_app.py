"""The whole application without a server: routes, what the router refuses, bugs, CORS, and what is up while it runs."""

import asyncio
import json
import logging
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import psutil
import pytest
from starlette.types import Message

from backends.domain.state import State
from backends.fleet import Fleet
from gateway.app import NoState, application, for_children, forwarder_of, running, service_of
from gateway.config import Config, parse
from gateway.forward.body_workers import BodyWorkers
from gateway.http import status
from gateway.http.endpoints import MODEL_PATHS
from gateway.plan import plans
from tests.lives import runtime

Headers = Iterable[tuple[bytes, bytes]]

MODELS = """\
models:
  tiny: {urls: [http://127.0.0.1:9], aliases: [default]}
  org/big: {urls: [http://127.0.0.1:9, http://127.0.0.2:9]}
"""
ORIGIN = (b"origin", b"https://app.example")
KEY = (b"authorization", b"Bearer secret")


class Answer:
    def __init__(self, messages: list[Message]) -> None:
        self.status = int(messages[0]["status"])
        self.headers = dict(messages[0]["headers"])
        self.body = b"".join(m.get("body", b"") for m in messages[1:])

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        found: dict[str, Any] = self.json["error"]
        assert set(found) == {"message", "type", "param", "code", "request_id", "model", "backend", "retry_after"}
        assert found["request_id"] == self.headers[b"x-request-id"].decode()
        return found


def config(server: str = "{}") -> Config:
    return parse(f"server: {server}\n{MODELS}", "c.yaml", {})


class App:
    """Nothing is started: every backend is ``stopped``."""

    def __init__(self, server: str = "{}") -> None:
        made = config(server)
        clock = asyncio.get_running_loop().time
        fleet = Fleet(plans(made), runtime())
        workers = BodyWorkers()
        forwarder = forwarder_of(made, fleet, workers, clock)
        self.service = service_of(made, fleet, forwarder, workers, clock=clock, created=int(time.time()))
        self._app = application(self.service)

    async def __call__(self, method: str, path: str, headers: Headers = (), body: bytes = b"") -> Answer:
        messages: list[Message] = []
        asked: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            if asked:
                return asked.pop()
            await asyncio.get_running_loop().create_future()
            raise AssertionError("nothing more comes")

        async def send(message: Message) -> None:
            messages.append(message)

        target, _, query = path.partition("?")
        scope = {
            "type": "http",
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": unquote(target),
            "raw_path": target.encode(),
            "root_path": "",
            "query_string": query.encode(),
            "headers": list(headers),
            "server": ("127.0.0.1", 8080),
            "client": ("127.0.0.1", 5000),
        }
        await self._app(scope, receive, send)
        return Answer(messages)


# -- routes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slash", ["", "/"])
@pytest.mark.parametrize("path", sorted(MODEL_PATHS))
async def test_every_form_of_the_openai_routes(path: str, slash: str) -> None:
    answer = await App()("POST", f"{path}{slash}?api-version=1", body=b"{")
    assert (answer.status, answer.error["code"]) == (400, "invalid_request")


@pytest.mark.parametrize("slash", ["", "/"])
@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/v1/models", 200),
        ("/models", 200),
        ("/v1/models/tiny", 200),
        ("/models/tiny", 200),
        ("/health", 503),
        ("/livez", 200),
        ("/readyz", 503),
        ("/api/status", 200),
    ],
)
async def test_a_trailing_slash_changes_nothing_and_neither_does_head(path: str, slash: str, status: int) -> None:
    app = App()
    for method in ("GET", "HEAD"):
        answer = await app(method, path + slash)
        assert answer.status == status
        assert answer.headers[b"x-request-id"]


@pytest.mark.parametrize("path", ["/v1/models/org/big", "/v1/models/org%2Fbig", "/models/org/big/"])
async def test_a_model_whose_name_has_a_slash(path: str) -> None:
    answer = await App()("GET", path)
    assert (answer.status, answer.json["id"], answer.json["object"]) == (200, "org/big", "model")


async def test_a_model_by_its_alias_and_one_that_is_not_there() -> None:
    app = App()
    assert (await app("GET", "/v1/models/default")).json["id"] == "tiny"
    answer = await app("GET", "/v1/models/nope")
    assert (answer.status, answer.error["code"], answer.error["param"]) == (404, "model_not_found", "model")
    assert [m["id"] for m in (await app("GET", "/v1/models")).json["data"]] == ["tiny", "org/big"]


async def test_the_output_of_a_backend_whose_name_has_a_slash() -> None:
    app = App()
    for line in ("one", "two", "three"):
        app.service.fleet.backends["org/big:1"].output.append(line)
    assert (await app("GET", "/api/backends/org%2Fbig%3A1/logs?lines=2")).body == b"two\nthree\n"
    assert (await app("GET", "/api/backends/org/big:1/logs")).body == b"one\ntwo\nthree\n"
    answer = await app("GET", "/api/backends/org/big:1/logs?lines=many")
    assert (answer.status, answer.error["param"]) == (400, "lines")
    answer = await app("GET", "/api/backends/big:7/logs")
    assert (answer.status, answer.error["code"]) == (404, "not_found")
    assert "org/big:1" in answer.error["message"]


async def test_commands() -> None:
    app = App()
    answer = await app("POST", "/api/backends/org/big:1/stop")
    assert (answer.status, answer.error["code"], answer.error["backend"]) == (409, "conflict", "org/big:1")
    assert "the gateway cannot stop it" in answer.error["message"]
    answer = await app("POST", "/api/backends/tiny:0/start")
    assert (answer.status, answer.json) == (202, {"id": "tiny:0", "state": "starting"})
    for path, words in (("tiny:0/explode", "valid: start, stop"), ("nope:0/start", "valid: tiny:0")):
        answer = await app("POST", f"/api/backends/{path}")
        assert (answer.status, answer.error["code"]) == (404, "not_found")
        assert words in answer.error["message"]
    await app.service.fleet.close()


# -- what the router refuses -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/nope", "/v1", "/v1/chat", "/v1/chat/completions/x", "/health/x", "//"])
async def test_no_such_path(path: str) -> None:
    answer = await App()("GET", path)
    assert (answer.status, answer.error["code"], answer.error["type"]) == (404, "not_found", "invalid_request_error")
    assert f"GET {path}: no such path" in answer.error["message"]


@pytest.mark.parametrize(
    "path", ["/livez//", "/api/status//", "//evil.example/..", "/api/quarantine/a/", "/v1/chat/completions//"]
)
async def test_nobody_is_sent_anywhere_else(path: str) -> None:
    """Least of all to the host that the client names itself."""
    for method in ("GET", "POST", "DELETE"):
        answer = await App("{allowed_hosts: [evil.example]}")(method, path, [(b"host", b"evil.example")])
        assert answer.status in (404, 405)
        assert b"location" not in answer.headers


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", "/v1/chat/completions", {"POST"}),
        ("HEAD", "/v1/completions", {"POST"}),
        ("DELETE", "/v1/models", {"GET", "HEAD"}),
        ("OPTIONS", "/v1/chat/completions", {"POST"}),
    ],
)
async def test_a_path_that_takes_another_method(method: str, path: str, allowed: set[str]) -> None:
    answer = await App()(method, path)
    assert (answer.status, answer.error["code"]) == (405, "method_not_allowed")
    assert set(answer.headers[b"allow"].decode().split(", ")) == allowed


# -- keys --------------------------------------------------------------------------------------------------------------


async def test_health_says_less_to_those_without_a_key() -> None:
    app = App("{api_keys: [secret]}")
    assert (await app("GET", "/health")).json == {"status": "unavailable"}
    assert set((await app("GET", "/health", [KEY])).json) == {"status", "draining", "models"}
    assert (await app("GET", "/api/status")).status == 401


# -- bugs --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("server", ["{}", '{cors_origins: ["*"]}'])
async def test_a_bug_in_a_handler(
    server: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def bug(*_: object, **__: object) -> None:
        raise KeyError("secret detail")

    app = App(server)
    monkeypatch.setattr(status, "health", bug)
    answer = await app("GET", "/health", [ORIGIN, (b"x-request-id", b"mine")])
    assert (answer.status, answer.error["code"], answer.error["request_id"]) == (500, "internal_error", "mine")
    assert b"secret detail" not in answer.body
    (record,) = caplog.records
    assert (record.levelno, record.__dict__["request_id"]) == (logging.ERROR, "mine")
    assert record.exc_info is not None
    assert "secret detail" in str(record.exc_info[1])
    assert (b"access-control-allow-origin" in answer.headers) == ("cors" in server)


async def test_a_bug_while_a_model_is_asked(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    app = App()

    async def bug(*_: object) -> None:
        raise KeyError("secret detail")

    monkeypatch.setattr(app.service, "_answer", bug)
    answer = await app("POST", "/v1/chat/completions", body=b"{}")
    assert (answer.status, answer.error["code"]) == (500, "internal_error")
    assert any(record.exc_info for record in caplog.records)


# -- CORS --------------------------------------------------------------------------------------------------------------

PREFLIGHT = [ORIGIN, (b"access-control-request-method", b"POST"), (b"access-control-request-headers", b"authorization")]


async def test_a_preflight_needs_no_key() -> None:
    answer = await App('{api_keys: [secret], cors_origins: ["https://app.example"]}')(
        "OPTIONS", "/v1/chat/completions", PREFLIGHT
    )
    assert answer.status == 200
    assert answer.headers[b"access-control-allow-origin"] == ORIGIN[1]
    assert b"POST" in answer.headers[b"access-control-allow-methods"]
    assert answer.headers[b"access-control-allow-headers"] == b"authorization"


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [("GET", "/v1/models", [], 401), ("GET", "/v1/models", [KEY], 200), ("GET", "/nope", [KEY], 404)],
)
async def test_every_answer_can_be_read_by_a_page_that_may(
    method: str, path: str, headers: list[tuple[bytes, bytes]], status: int
) -> None:
    app = App('{api_keys: [secret], cors_origins: ["https://app.example"]}')
    answer = await app(method, path, [ORIGIN, *headers])
    assert answer.status == status
    assert answer.headers[b"access-control-allow-origin"] == ORIGIN[1]
    assert b"x-request-id" in answer.headers[b"access-control-expose-headers"]


async def test_other_pages_may_not() -> None:
    app = App('{cors_origins: ["https://app.example"]}')
    other = (b"origin", b"https://evil.example")
    assert (await app("OPTIONS", "/v1/models", [other, *PREFLIGHT[1:]])).status == 400
    answer = await app("GET", "/v1/models", [other])
    assert answer.headers.get(b"access-control-allow-origin") != other[1]
    plain = await App()("GET", "/v1/models", [ORIGIN])
    assert b"access-control-allow-origin" not in plain.headers


# -- while it runs -----------------------------------------------------------------------------------------------------


def runs(folder: Path) -> list[Path]:
    return list(folder.rglob("*.json"))


async def test_what_is_up_while_it_runs_and_gone_afterwards(tmp_path: Path, nothing_left: None) -> None:
    async with running(config(), tmp_path) as service:
        assert list(service.fleet.backends) == ["tiny:0", "org/big:0", "org/big:1"]
        assert {backend.state for backend in service.fleet.backends.values()} == {State.STARTING}
        assert len(runs(tmp_path)) == 1
        assert len(psutil.Process().children()) == 1, "the reaper"
    assert runs(tmp_path) == []


async def test_a_step_of_the_end_that_fails_keeps_no_other_from_its_own(
    tmp_path: Path, nothing_left: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    close = Fleet.close

    async def faulty(fleet: Fleet) -> None:
        await close(fleet)
        raise KeyError("bug")

    async def run() -> None:
        async with running(config(), tmp_path):
            pass

    monkeypatch.setattr(Fleet, "close", faulty)
    with pytest.raises(KeyError, match="bug"):
        await run()
    assert runs(tmp_path) == [], "the record and the reaper are closed all the same"


async def test_children_that_nobody_could_find_again_are_not_started(tmp_path: Path, nothing_left: None) -> None:
    (tmp_path / "run").write_text("in the way")
    with pytest.raises(NoState, match="record of child processes"):
        async with running(config(), tmp_path):
            pass


# -- the environment of backends ---------------------------------------------------------------------------------------


def test_backends_get_all_variables_but_the_secrets() -> None:
    environ = {"PATH": "/bin", "KEY": "k", "FAR": "f", "HF_TOKEN": "t", "MLX_GATEWAY_API_KEY": "k", "NAME": "a"}
    config = parse(
        "server: {api_keys: ['${KEY}', 'x${OTHER:-y}']}\n"
        "models: {a: {urls: [http://127.0.0.1:9], api_key: '${FAR:-}'}, "
        "b: {command: [x, '{port}'], env: {TOKEN: '${HF_TOKEN}', MINE: '$${KEY}'}}}",
        "c.yaml",
        {**environ, "OTHER": "o"},
    )
    assert config.secret_variables == {"KEY", "OTHER", "FAR"}
    assert for_children(environ, config) == {"PATH": "/bin", "HF_TOKEN": "t", "NAME": "a"}

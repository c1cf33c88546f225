"""Who may come in, under which id, how many at once; and that nothing ends without an answer."""

import asyncio
import json
import logging
from collections.abc import Iterable

import pytest
from starlette.types import Message, Receive, Scope, Send

from gateway.http.middleware import OPEN_PATHS, AccessMiddleware
from gateway.http.web_guard import WebGuard

KEYS = ("first-key", "sécond")
GUARDED = ("/", "/v1/chat/completions", "/v1/models", "/metrics", "/api/status", "/healthy", "/health/x", "/v1/health")


class Answer:
    def __init__(self, messages: list[Message]) -> None:
        self.status = int(messages[0]["status"])
        self.headers = dict(messages[0]["headers"])
        self.body = b"".join(m.get("body", b"") for m in messages[1:])

    @property
    def code(self) -> str:
        return str(json.loads(self.body)["error"]["code"])


class Inner:
    """The application within: remembers the scopes, answers 200."""

    def __init__(self, headers: Iterable[tuple[bytes, bytes]] = ()) -> None:
        self.scopes: list[Scope] = []
        self.headers = list(headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scopes.append(scope)
        await send({"type": "http.response.start", "status": 200, "headers": self.headers})
        await send({"type": "http.response.body", "body": b"ok"})


async def nothing() -> Message:
    return {"type": "http.request", "body": b"", "more_body": False}


async def call(
    app: AccessMiddleware, path: str = "/v1/models", headers: Iterable[tuple[bytes, bytes]] = (), method: str = "GET"
) -> Answer:
    messages: list[Message] = []

    async def send(message: Message) -> None:
        messages.append(message)

    await app({"type": "http", "method": method, "path": path, "headers": list(headers)}, nothing, send)
    return Answer(messages)


def front(inner: object = None, *, keys: Iterable[str] = (), limit: int = 100) -> AccessMiddleware:
    return AccessMiddleware(inner or Inner(), api_keys=tuple(keys), max_connections=limit)  # type: ignore[arg-type]


# -- the request id --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [b"a", b"req_123", b"0f8b:1/2+3=@-._", b"x" * 128])
async def test_a_sane_id_is_kept(given: bytes) -> None:
    inner = Inner()
    answer = await call(front(inner), headers=[(b"x-request-id", given)])
    assert answer.headers[b"x-request-id"] == given
    assert inner.scopes[0]["request_id"] == given.decode()


@pytest.mark.parametrize(
    "given",
    [
        *[b"", b" ", b"a b", b"x" * 129, b"a\r\nset-cookie: x=1", b"a\n", b"\xff", "é".encode(), b'"', b"a;b", b"<b>"],
        *[b"\x00", b"a\x1b[31m", b"a,b", b"{}", b"a\\b"],
    ],
)
async def test_another_is_replaced(given: bytes) -> None:
    answer = await call(front(), headers=[(b"x-request-id", given)])
    made = answer.headers[b"x-request-id"]
    assert made.startswith(b"req_")
    assert made[4:].isalnum()


async def test_every_request_without_one_gets_its_own() -> None:
    app = front()
    ids = {(await call(app)).headers[b"x-request-id"] for _ in range(20)}
    assert len(ids) == 20


async def test_the_application_may_have_set_the_header_itself() -> None:
    messages: list[Message] = []

    async def send(message: Message) -> None:
        messages.append(message)

    app = front(Inner([(b"x-request-id", b"mine")]))
    await app({"type": "http", "method": "GET", "path": "/", "headers": []}, nothing, send)
    assert messages[0]["headers"] == [(b"x-request-id", b"mine")]


# -- keys ------------------------------------------------------------------------------------------------------------

RIGHT = [
    [(b"authorization", b"Bearer first-key")],
    [(b"authorization", b"bearer first-key")],
    [(b"authorization", b"Bearer   first-key ")],
    [(b"authorization", "Bearer sécond".encode())],
    [(b"x-api-key", b"first-key")],
    [(b"x-api-key", "sécond".encode())],
    [(b"authorization", b"Bearer wrong"), (b"x-api-key", b"first-key")],
    [(b"authorization", b"Basic abc"), (b"x-api-key", b"first-key")],
]
WRONG: list[list[tuple[bytes, bytes]]] = [
    [],
    [(b"authorization", b"")],
    [(b"authorization", b"Bearer")],
    [(b"authorization", b"Bearer ")],
    [(b"authorization", b"first-key")],
    [(b"authorization", b"Basic first-key")],
    [(b"authorization", b"Bearer first-key2")],
    [(b"authorization", b"Bearer first-ke")],
    [(b"authorization", b"Bearer FIRST-KEY")],
    [(b"authorization", "Bearer first-key sécond".encode())],
    [(b"x-api-key", b"")],
    [(b"x-api-key", b"Bearer first-key")],
    [(b"cookie", b"first-key")],
]


@pytest.mark.parametrize("path", GUARDED)
@pytest.mark.parametrize("headers", RIGHT)
async def test_either_key_in_either_header(path: str, headers: list[tuple[bytes, bytes]]) -> None:
    inner = Inner()
    assert (await call(front(inner, keys=KEYS), path, headers)).status == 200
    assert inner.scopes[0]["authorized"] is True


@pytest.mark.parametrize("path", GUARDED)
@pytest.mark.parametrize("headers", WRONG)
async def test_without_one_of_them_nothing_is_reached(path: str, headers: list[tuple[bytes, bytes]]) -> None:
    inner = Inner()
    answer = await call(front(inner, keys=KEYS), path, headers, method="POST")
    assert (answer.status, answer.code) == (401, "invalid_api_key")
    assert answer.headers[b"www-authenticate"] == b"Bearer"
    assert answer.headers[b"x-request-id"]
    assert inner.scopes == []
    assert not any(key.encode() in answer.body for key in KEYS)


@pytest.mark.parametrize("path", sorted(OPEN_PATHS | {path + "/" for path in OPEN_PATHS}))
@pytest.mark.parametrize("headers", [WRONG[0], WRONG[6]])
async def test_probes_need_no_key_and_are_told_apart(path: str, headers: list[tuple[bytes, bytes]]) -> None:
    inner = Inner()
    app = front(inner, keys=KEYS)
    assert (await call(app, path, headers)).status == 200
    assert (await call(app, path, RIGHT[0])).status == 200
    assert [scope["authorized"] for scope in inner.scopes] == [False, True]


async def test_without_keys_everybody_may() -> None:
    inner = Inner()
    assert (await call(front(inner), headers=WRONG[6])).status == 200
    assert inner.scopes[0]["authorized"] is True


# -- the limit -------------------------------------------------------------------------------------------------------


async def test_beyond_the_limit_it_says_so_at_once_and_probes_still_come_in() -> None:
    limiter = asyncio.Event()

    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/v1/models":
            await limiter.wait()
        await Inner()(scope, receive, send)

    app = front(slow, limit=2)
    tasks = [asyncio.ensure_future(call(app)) for _ in range(2)]
    await asyncio.sleep(0)
    refused = await call(app)
    assert (refused.status, refused.code) == (503, "overloaded")
    assert 1 <= int(refused.headers[b"retry-after"]) <= 59
    for path in OPEN_PATHS:
        assert (await call(app, path)).status == 200
    limiter.set()
    assert [(await task).status for task in tasks] == [200, 200]
    assert (await call(app)).status == 200


async def test_a_place_is_given_back_however_a_request_ends(caplog: pytest.LogCaptureFixture) -> None:
    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/raise":
            raise ValueError("broken")
        await asyncio.get_running_loop().create_future()

    app = front(broken, limit=1)
    for _ in range(3):
        assert (await call(app, "/raise")).code == "internal_error"
        task = asyncio.ensure_future(call(app, "/wait"))
        await asyncio.sleep(0)
        assert (await call(app)).code == "overloaded"
        task.cancel()
        await asyncio.wait({task})
        assert task.cancelled()


# -- bugs ------------------------------------------------------------------------------------------------------------


async def test_a_bug_is_told_to_the_client_and_to_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        raise KeyError("secret detail")

    answer = await call(front(broken), headers=[(b"x-request-id", b"mine")])
    assert (answer.status, answer.code) == (500, "internal_error")
    assert answer.headers[b"x-request-id"] == b"mine"
    assert b"secret detail" not in answer.body
    assert "mine" in json.loads(answer.body)["error"]["message"]
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert record.exc_info is not None
    assert record.__dict__["request_id"] == "mine"


async def test_once_the_head_is_out_the_server_has_to_cut_the_connection(caplog: pytest.LogCaptureFixture) -> None:
    sent: list[Message] = []

    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise KeyError("broken")

    async def send(message: Message) -> None:
        sent.append(message)

    app = front(broken)
    with pytest.raises(KeyError):
        await app({"type": "http", "method": "GET", "path": "/", "headers": []}, nothing, send)
    assert [message["type"] for message in sent] == ["http.response.start"]
    assert len(caplog.records) == 1


async def test_what_is_not_http_passes() -> None:
    seen: list[Scope] = []

    async def inner(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope)

    async def send(message: Message) -> None:
        raise AssertionError(message)

    await front(inner, keys=KEYS)({"type": "lifespan"}, nothing, send)
    assert seen == [{"type": "lifespan"}]


# -- pages of other sites --------------------------------------------------------------------------------------------

CHAT = "/v1/chat/completions"


async def test_a_page_of_another_site_reaches_nothing() -> None:
    inner = Inner()
    evil = [(b"origin", b"https://evil.example")]
    answer = await call(front(inner), CHAT, method="POST", headers=evil)
    assert (answer.status, answer.code) == (403, "forbidden_origin")
    assert inner.scopes == []
    assert (await call(front(inner), CHAT, method="POST")).status == 200
    assert (await call(front(inner), "/health", headers=evil)).status == 200
    shown = AccessMiddleware(inner, api_keys=(), max_connections=9, guard=WebGuard(has_keys=False, origins=["*"]))
    assert (await call(shown, CHAT, method="POST", headers=evil)).status == 200


@pytest.mark.parametrize("path", [CHAT, "/api/status", *sorted(OPEN_PATHS)])
async def test_a_name_that_leads_to_this_machine_reaches_nothing(path: str) -> None:
    inner = Inner()
    answer = await call(front(inner), path, headers=[(b"host", b"evil.example:8080")])
    assert (answer.status, answer.code) == (421, "forbidden_origin")
    assert inner.scopes == []


async def test_with_a_key_the_origin_and_the_host_are_nobodys_business() -> None:
    headers = [(b"origin", b"https://evil.example"), (b"authorization", b"Bearer " + KEYS[0].encode())]
    headers.append((b"host", b"any.example"))
    assert (await call(front(Inner(), keys=KEYS), CHAT, method="POST", headers=headers)).status == 200

"""Servers of other kinds at ``urls:``, each of which fails in its own way, behind the whole gateway but its sockets."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import httpx
import pytest

from backends.domain.state import State
from backends.fleet import Fleet
from gateway.app import application, forwarder_of, service_of
from gateway.config import parse
from gateway.forward.body_workers import BodyWorkers
from gateway.plan import plans
from tests.faultserver import Conn, FaultServer
from tests.lives import HURRIED, runtime, until

pytestmark = pytest.mark.usefixtures("nothing_left")

Json = dict[str, Any]
Reply = tuple[int, bytes]
CHAT = "/v1/chat/completions"
MLX_HEADERS = (
    b"Server: BaseHTTP/0.6 Python/3.12.3\r\nAccess-Control-Allow-Origin: *\r\n"
    b"Access-Control-Allow-Methods: *\r\nAccess-Control-Allow-Headers: *\r\n"
)
THREAD_DIED = (404, b'{"error": "generation thread died"}')
WELL = b'data: {"choices": [{"index": 0, "delta": {"content": "%b"}, "finish_reason": "stop"}]}\n\ndata: [DONE]\n\n'


class Foreign:
    """One server; its answers may be changed at any moment. ``bodies``: of the completions it was asked for."""

    def __init__(self, name: str, headers: bytes = b"Server: uvicorn\r\n") -> None:
        self.name = name
        self.headers = headers
        self.health: Reply = (200, b'{"status": "ok"}')
        self.models: Reply = (404, b"Not Found")
        self.completion: Callable[[Json], Reply] = lambda _: (200, WELL % name.encode())
        self.bodies: list[Json] = []
        self.url = ""

    async def __call__(self, conn: Conn) -> None:
        head, _, body = (await conn.request()).partition(b"\r\n\r\n")
        path = head.split(b" ")[1].decode()
        if path == "/health":
            status, told = self.health
        elif path == "/v1/models":
            status, told = self.models
        else:
            asked = json.loads(body)
            self.bodies.append(asked)
            await self.before(asked)
            status, told = self.completion(asked)
            if status == 200 and not asked["stream"]:
                told = b'{"choices": [{"index": 0, "message": {"content": "x"}, "finish_reason": "stop"}]}'
        kind = b"text/event-stream" if told.startswith(b"data:") else b"application/json"
        await conn.send(b"HTTP/1.0 %d X\r\nContent-Type: %b\r\n%b\r\n%b" % (status, kind, self.headers, told))
        conn.fin()

    async def before(self, _body: Json) -> None:
        """Before the answer to a completion."""

    def fails(self, status: int, text: str) -> None:
        self.completion = lambda _: (status, json.dumps({"error": text}).encode())

    @property
    def asked_by_clients(self) -> list[Json]:
        return [body for body in self.bodies if body["max_tokens"] != 1]


class Gateway:
    def __init__(self, client: httpx.AsyncClient, fleet: Fleet) -> None:
        self._client = client
        self.fleet = fleet

    async def ask(self, **more: Any) -> httpx.Response:
        body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 9, **more}
        return await self._client.post(CHAT, json=body)

    async def get(self, path: str) -> str:
        return (await self._client.get(path)).text

    def states(self, *models: str) -> list[State]:
        return [snapshot.state for model in models or ("m",) for snapshot in self.fleet.snapshots(model)]

    async def ready(self, *models: str) -> None:
        await until(lambda: set(self.states(*models)) == {State.READY}, "every replica ready")


@asynccontextmanager
async def gateway(*servers: Foreign, names: tuple[str, ...] = ("m",), model: str = "") -> AsyncIterator[Gateway]:
    """``names``: of the models, each of which has all servers as its replicas; ``model``: their further keys,
    with NAME for the name."""
    async with AsyncExitStack() as stack:
        for server in servers:
            port = (await stack.enter_async_context(FaultServer(server))).port
            server.url = f"http://127.0.0.1:{port}"
        urls = ", ".join(server.url for server in servers)
        lines = [f"  {name}: {{urls: [{urls}], {model.replace('NAME', name)}}}\n" for name in names]
        made = parse("models:\n" + "".join(lines), "c.yaml", {})
        clock, workers = asyncio.get_running_loop().time, BodyWorkers()
        fleet = Fleet(plans(made), runtime(cadence=HURRIED))
        stack.callback(workers.close)
        stack.push_async_callback(fleet.close)
        forwarder = forwarder_of(made, fleet, workers, clock)
        service = service_of(made, fleet, forwarder, workers, clock=clock, created=0)
        transport = httpx.ASGITransport(application(service))
        client = await stack.enter_async_context(httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1"))
        fleet.start()
        yield Gateway(client, fleet)


def text_of(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["message"]["content"])


# -- which engine answers ----------------------------------------------------------------------------------------------


async def test_each_replica_is_called_and_judged_as_what_it_is() -> None:
    raw, other = Foreign("raw", MLX_HEADERS), Foreign("other")
    async with gateway(raw, other) as g:
        await g.ready()
        assert [snapshot.engine.value for snapshot in g.fleet.snapshots("m")] == ["mlx_lm.server", "other"]
        raw.completion = other.completion = lambda _: THREAD_DIED
        assert (await g.ask()).status_code == 503
        asked = {body["model"] for body in raw.asked_by_clients}
        assert (asked, {body["model"] for body in other.asked_by_clients}) == ({"default_model"}, {"m"})


async def test_what_one_engine_cannot_take_goes_to_the_other() -> None:
    """The ids of a bias cannot be checked without the vocabulary: that is fatal for mlx_lm.server only."""
    raw, other = Foreign("raw", MLX_HEADERS), Foreign("other")
    async with gateway(raw, other) as g:
        await g.ready()
        for count in range(4):
            messages = [{"role": "user", "content": str(count)}]
            assert text_of(await g.ask(logit_bias={"5": 1.0}, messages=messages)) == "other"
        assert raw.asked_by_clients == []
    async with gateway(raw) as g:
        await g.ready()
        answer = await g.ask(logit_bias={"5": 1.0})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "logit_bias")


async def test_a_dead_generation_thread_behind_a_url_is_the_servers_failure() -> None:
    dead, well = Foreign("dead", MLX_HEADERS), Foreign("well", MLX_HEADERS)
    async with gateway(dead, well) as g:
        await g.ready()
        dead.completion = lambda _: THREAD_DIED
        assert {text_of(await g.ask(messages=[{"role": "user", "content": str(i)}])) for i in range(8)} == {"well"}
        dead.health = (503, b'{"status": "unavailable"}')
        await until(lambda: g.states() == [State.UNREACHABLE, State.READY])


async def test_it_is_recognised_by_an_answer_where_a_proxy_hides_the_rest() -> None:
    hidden = Foreign("hidden", b"Server: nginx\r\n")
    async with gateway(hidden) as g:
        await g.ready()
        hidden.completion = lambda _: THREAD_DIED
        answer = await g.ask()
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "backend_wedged")
        assert g.fleet.snapshots("m")[0].engine.value == "mlx_lm.server"


# -- what it says of its model -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("status", "text", "code"),
    [
        (400, "The model has crashed without additional information. (Exit code: 6)", "backend_crashed"),
        (400, "Model unloaded.", "model_unavailable"),
        (404, "No models loaded. Please load a model", "model_unavailable"),
        (500, "llama runner process has terminated: exit status 2", "backend_crashed"),
        (500, "unspecific error: upstream command exited prematurely", "backend_crashed"),
        (200, "EngineCore encountered an issue.", "backend_crashed"),
    ],
)
async def test_a_dead_model_is_the_servers_failure(status: int, text: str, code: str, stream: bool) -> None:
    broken, well = Foreign("broken"), Foreign("well")
    async with gateway(broken, well) as g:
        await g.ready()
        event = b"data: " + json.dumps({"error": {"message": text}}).encode() + b"\n\n"
        broken.completion = lambda _: (200, event) if status == 200 else (status, json.dumps({"error": text}).encode())
        for count in range(2):
            answer = await g.ask(stream=stream, messages=[{"role": "user", "content": str(count)}])
            assert answer.status_code == 200
            assert "well" in answer.text
        assert broken.asked_by_clients
        well.completion = broken.completion
        answer = await g.ask()
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, code)
        assert text in answer.json()["error"]["message"]


async def test_a_500_without_a_reason_gets_one_other_try() -> None:
    broken, well = Foreign("broken"), Foreign("well")
    async with gateway(broken, well) as g:
        await g.ready()
        broken.fails(500, "oops")
        answers = {text_of(await g.ask(messages=[{"role": "user", "content": str(i)}])) for i in range(4)}
        assert answers == {"well"}
        well.fails(500, "oops")
        broken.bodies.clear()
        well.bodies.clear()
        answer = await g.ask()
        assert (answer.status_code, answer.json()["error"]["code"]) == (500, "generation_failed")
        assert (len(broken.bodies), len(well.bodies)) == (1, 1)


async def test_a_500_of_the_only_replica_gets_one_more_try_there() -> None:
    lone = Foreign("lone")
    async with gateway(lone) as g:
        await g.ready()
        replies = [(500, b'{"error": "oops"}'), (200, WELL % b"lone")]
        lone.completion = lambda _: replies.pop(0)
        assert text_of(await g.ask()) == "lone"
        lone.fails(500, "oops")
        lone.bodies.clear()
        answer = await g.ask()
        assert (answer.status_code, answer.json()["error"]["code"], len(lone.bodies)) == (500, "generation_failed", 2)


# -- models that are loaded on request ---------------------------------------------------------------------------------


class Loader(Foreign):
    """Has room for one model, and loads the one that is asked for, which takes ``load_time`` seconds; answers about
    anything else meanwhile, as LM Studio, Ollama and llama-swap do. ``loads``: in order."""

    def __init__(self, *names: str, is_listing: bool = True, load_time: float = 0.0) -> None:
        super().__init__("loader")
        self.load_time = load_time
        self.loads: list[str] = []
        self.loading = self.most = 0  # at a time
        self._loaded = ""
        if is_listing:
            self.models = (200, json.dumps({"data": [{"id": name} for name in names]}).encode())

    async def before(self, body: Json) -> None:
        if body["model"] == self._loaded:
            return
        self.loading += 1
        self.most = max(self.most, self.loading)
        await asyncio.sleep(self.load_time)
        self.loading -= 1
        self._loaded = body["model"]
        self.loads.append(self._loaded)


THREE = ("a", "b", "c")


async def test_the_start_of_the_gateway_loads_nothing() -> None:
    loader = Loader(*THREE)
    async with gateway(loader, names=THREE) as g:
        await g.ready(*THREE)
        assert loader.loads == []
        assert [text_of(await g.ask(model=name)) for name in THREE] == ["loader"] * 3
        assert loader.loads == ["a", "b", "c"]


async def test_models_of_one_server_that_lists_none_are_asked_for_a_token_one_at_a_time() -> None:
    loader = Loader(*THREE, is_listing=False, load_time=0.05)
    async with gateway(loader, names=THREE) as g:
        await g.ready(*THREE)
        assert (sorted(loader.loads), loader.most) == (["a", "b", "c"], 1)


async def test_a_load_that_takes_longer_than_a_silence_may_is_no_stall() -> None:
    loader = Loader(*THREE[:2], load_time=0.25)
    async with gateway(loader, names=THREE[:2], model="timeouts: {start: 60s, progress: 100ms}") as g:
        await g.ready(*THREE[:2])
        assert [text_of(await g.ask(model=name)) for name in ("a", "b", "a")] == ["loader"] * 3
        assert [g.fleet.snapshots(name)[0].restarts for name in THREE[:2]] == [0, 0]
        assert loader.loads[-3:] == ["a", "b", "a"]


async def test_mlx_lm_server_loads_another_model_by_its_name() -> None:
    loader = Loader("org/a", "org/b", load_time=0.25)
    loader.headers = MLX_HEADERS
    names, patience = ("org/a", "org/b"), "model: NAME, timeouts: {start: 60s, progress: 100ms}"
    async with gateway(loader, names=names, model=patience) as g:
        await g.ready(*names)
        assert loader.loads == []
        assert [text_of(await g.ask(model=name)) for name in names] == ["loader"] * 2
        assert [g.fleet.snapshots(name)[0].restarts for name in names] == [0, 0]


# -- what it must not tell ---------------------------------------------------------------------------------------------

KEY = "sk-k3y-of-the-upstream"
QUOTES: dict[str, Reply] = {
    "request": (400, json.dumps({"error": {"message": f"bad: {KEY}", "param": f"x{KEY}"}}).encode()),
    "key": (401, f"wrong key {KEY}".encode()),
    "dead": (500, json.dumps({"error": f"The model has crashed ({KEY})"}).encode()),
    "event": (200, b"data: " + json.dumps({"error": {"message": KEY}}).encode() + b"\n\n"),
    "no json": (200, f"data: {{{KEY}\n\n".encode()),
    "no list": (200, f'data: {{"choices": "{KEY}"}}\n\n'.encode()),
}


@pytest.mark.parametrize("quote", QUOTES)
async def test_a_key_that_it_quotes_reaches_nobody(quote: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    server = Foreign("quoting")
    async with gateway(server, model=f"api_key: {KEY}") as g:
        await g.ready()
        server.completion = lambda _: QUOTES[quote]
        for stream in (True, False):
            answer = await g.ask(stream=stream)
            assert (KEY in answer.text, "***" in answer.text or quote.startswith("no ")) == (False, True), answer.text
        assert KEY not in await g.get("/api/status")
        assert KEY not in str(
            [vars(record) for record in caplog.records if record.name.startswith(("gateway", "back"))]
        )


async def test_a_key_that_it_quotes_to_a_probe_reaches_nobody() -> None:
    server = Foreign("quoting")
    server.completion = lambda _: QUOTES["key"]
    async with gateway(server, model=f"api_key: {KEY}") as g:
        await until(lambda: g.states() == [State.UNREACHABLE])
        shown = await g.get("/api/status") + await g.get("/health") + (await g.ask()).text
        assert (KEY in shown, "wrong key ***" in shown) == (False, True)

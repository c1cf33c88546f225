"""The only replica of a model restarts: what clients, watchdogs and raw connections see of that pause."""

import json
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from signal import SIGKILL

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from tests.integration.harness import HASTY_RESTART, Gateway, fake, launched, wait_until
from tests.integration.wire import CHAT, Json, chat

pytestmark = pytest.mark.slow

NODE_SDK = "openai@6.49.0"
NODE_SCRIPT = Path(__file__).with_name("openai_node.mjs")
LOAD = 1.0  # seconds
RESTART = {"min_backoff": "300ms"}
JSON = "content-type: application/json"
HEADERS = 1.0  # seconds after which the headers of a stream are sent
AT_ONCE = 10.0  # seconds: a third of the shortest patience here
Client = Callable[[str, str], tuple[str, str]]  # base URL, prompt -> text, finish


def short(name: str) -> str:
    return f"FAKE n=5\n{name}"


def long(name: str) -> str:
    """A prompt whose answer takes 1.6 s."""
    return f"FAKE n=80 delay=0.02\n{name}"


@pytest.fixture(scope="module")
def loading(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without this file no process gets ready."""
    path = tmp_path_factory.mktemp("loading") / "may-end"
    path.touch()
    return path


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, loading: Path) -> Iterator[Gateway]:
    models = {"tiny": fake(f"load-time={LOAD} load-until={loading}", restart=RESTART)}
    with launched({"models": models}, tmp_path_factory.mktemp("pause")) as running:
        yield running


@pytest.fixture
def gateway(shared: Gateway, loading: Path) -> Gateway:
    loading.touch()
    shared.await_health()
    wait_until(lambda: shared.health()["models"]["tiny"]["resume"] == "verified", what="the test of determinism")
    return shared


# -- clients -----------------------------------------------------------------------------------------------------------


def with_python(*, stream: bool) -> Client:
    def whole_answer(client: openai.OpenAI, messages: list[ChatCompletionMessageParam]) -> tuple[str, str]:
        choice = client.chat.completions.create(model="tiny", temperature=0, messages=messages).choices[0]
        return choice.message.content or "", choice.finish_reason

    def streamed(client: openai.OpenAI, messages: list[ChatCompletionMessageParam]) -> tuple[str, str]:
        text, finish = "", ""
        with client.chat.completions.create(model="tiny", temperature=0, messages=messages, stream=True) as chunks:
            for chunk in chunks:
                text += chunk.choices[0].delta.content or ""
                finish = chunk.choices[0].finish_reason or finish
        return text, finish

    def ask(url: str, content: str) -> tuple[str, str]:
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
            return (streamed if stream else whole_answer)(client, [{"role": "user", "content": content}])

    return ask


def printed(*command: str, **environ: str) -> str:
    """Its output; asserts that it ended well, without a word on stderr."""
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, env={**os.environ, **environ}
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def with_curl(url: str, content: str, *, stream: bool) -> tuple[str, str]:
    body = json.dumps(chat(content, temperature=0, stream=stream))
    out = printed("curl", "-sSN", "--fail-with-body", f"{url}/chat/completions", "-H", JSON, "-d", body)
    if not stream:
        choice = json.loads(out)["choices"][0]
        return choice["message"]["content"], choice["finish_reason"]
    *events, done = [line[6:] for line in out.splitlines() if line.startswith("data: ")]
    assert done == "[DONE]"
    choices = [choice for event in events for choice in json.loads(event)["choices"]]
    text = "".join(choice["delta"].get("content") or "" for choice in choices)
    return text, choices[-1]["finish_reason"]


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Client], str]:
    """The clients that are no Python packages, and why some of them are missing."""
    found: dict[str, Client] = {}
    missing = _install_node_sdk(folder := tmp_path_factory.mktemp("node"))
    if not missing:

        def with_node(url: str, content: str, mode: str) -> tuple[str, str]:
            got = json.loads(printed("node", str(folder / NODE_SCRIPT.name), url, content, mode))
            return got["text"], got["finish"]

        found["node, stream"] = partial(with_node, mode="stream")
        found["node, whole"] = partial(with_node, mode="whole")
    if shutil.which("curl"):
        found["curl, stream"] = partial(with_curl, stream=True)
        found["curl, whole"] = partial(with_curl, stream=False)
    else:
        missing += "; curl is not installed"
    return found, missing


def _install_node_sdk(folder: Path) -> str:
    """Why it cannot be had, or an empty text."""
    if not (shutil.which("node") and shutil.which("npm")):
        return "node or npm is not installed"
    install = ("npm", "install", "--no-audit", "--no-fund", "--prefix", str(folder), NODE_SDK)
    done = subprocess.run(install, capture_output=True, text=True, timeout=100, check=False)
    shutil.copy(NODE_SCRIPT, folder)  # where it finds its packages
    return f"{NODE_SDK} could not be installed: {done.stderr[-300:]}" if done.returncode else ""


@pytest.fixture(scope="module")
def clients(others: tuple[dict[str, Client], str]) -> dict[str, Client]:
    return {"python, stream": with_python(stream=True), "python, whole": with_python(stream=False), **others[0]}


def test_every_client_is_here(others: tuple[dict[str, Client], str]) -> None:
    if others[1]:
        pytest.skip(others[1])


Expected = dict[str, tuple[str, str]]
Asked = dict[str, "Future[tuple[str, str]]"]


def undisturbed(gateway: Gateway, names: Iterable[str], words: Callable[[str], str]) -> Expected:
    def ask(name: str) -> tuple[str, str]:
        answer = gateway.ask(chat(words(name), temperature=0, stream=True))
        return answer.text, answer.finish or ""

    with ThreadPoolExecutor(8) as pool:
        return dict(zip(names, pool.map(ask, names), strict=True))


def test_clients_that_ask_right_after_the_end_of_the_process(gateway: Gateway, clients: dict[str, Client]) -> None:
    expected = undisturbed(gateway, clients, short)
    with ThreadPoolExecutor(len(clients)) as pool:
        gateway.signal_backend("tiny:0", SIGKILL)
        asked = {name: pool.submit(ask, f"{gateway.url}/v1", short(name)) for name, ask in clients.items()}
        assert {name: one.result() for name, one in asked.items()} == expected
    assert " error=" not in gateway.log


def test_clients_whose_process_ends_in_their_middle(gateway: Gateway, clients: dict[str, Client]) -> None:
    names = [name for name in ("node, stream", "curl, stream", "python, stream", "python, whole") if name in clients]
    expected = undisturbed(gateway, names, long)
    asked: Asked = {}
    with ThreadPoolExecutor(len(names)) as pool:
        for name in names:  # the slowest to start first
            asked[name] = pool.submit(clients[name], f"{gateway.url}/v1", long(name))
            wait_until(lambda: gateway.inflight() == len(asked))
        gateway.signal_backend("tiny:0", SIGKILL)
        assert {name: one.result() for name, one in asked.items()} == expected
    assert gateway.log.count("attempts=2") >= len(names)


# -- the wire ----------------------------------------------------------------------------------------------------------


def sent(gateway: Gateway, body: Json) -> socket.socket:
    host, port = gateway.url.removeprefix("http://").split(":")
    content = json.dumps(body).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: {len(content)}\r\n\r\n"
    sock = socket.create_connection((host, int(port)), timeout=60)
    sock.sendall(head.encode() + content)
    return sock


def test_a_stream_is_told_what_it_waits_for(gateway: Gateway, loading: Path) -> None:
    """The phase, seconds and ETA, from the second after which headers are sent."""
    loading.unlink()
    gateway.signal_backend("tiny:0", SIGKILL)
    began = time.monotonic()
    with sent(gateway, chat("hello", temperature=0, stream=True)) as sock:
        everything = sock.recv(65536)
        at = time.monotonic() - began
        while b": model" not in everything:
            everything += (piece := sock.recv(65536))
            assert piece, everything
        loading.touch()
        while piece := sock.recv(65536):
            everything += piece
    assert 0.9 * HEADERS < at < 5 * HEADERS
    assert everything.startswith(b"HTTP/1.1 200 ")
    first = re.findall(rb"^: (.*)$", everything, re.MULTILINE)[0]
    assert re.fullmatch(rb"model tiny restarting after killed, \d s so far, about \d s to go\r?", first)
    assert everything.index(b": model") < everything.index(b"data: ")
    assert b"data: [DONE]" in everything
    assert b'"error"' not in everything


def test_a_watchdog_sees_no_outage(gateway: Gateway) -> None:
    killed = gateway.signal_backend("tiny:0", SIGKILL)
    seen, probes = set(), set()
    while not ((now := gateway.backend("tiny:0"))["state"] == "ready" and now["pid"] != killed):
        answer = gateway.http.get("/health")
        health = answer.json()
        state = health["models"]["tiny"]["backends"][0]["state"]
        if state != "ready":  # else it had not seen the end of the process yet
            seen.add((answer.status_code, health["status"], health["models"]["tiny"]["status"]))
        probes.add(gateway.http.get("/readyz").status_code)
    assert seen == {(200, "degraded", "loading")}
    assert probes == {200}


def test_clients_that_leave_while_they_wait(gateway: Gateway, loading: Path) -> None:
    """Their places are free at once, and nothing is sent to the new process for them."""
    posts = gateway.output("tiny:0").count('"POST ')
    loading.unlink()
    killed = gateway.signal_backend("tiny:0", SIGKILL)
    with sent(gateway, chat("gone", stream=True)), sent(gateway, chat("gone", stream=False)):
        wait_until(lambda: gateway.queued() == 2)
    wait_until(lambda: gateway.queued() == 0, 5.0)
    loading.touch()
    gateway.await_life("tiny:0", killed)
    assert gateway.ask(chat("hello")).status == 200
    assert gateway.output("tiny:0").count('"POST ') == posts + 2, "the probe of its readiness, and the last request"


# -- when a pause is too long ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """Models whose process is started again more than five minutes after it has answered and died."""
    folder = tmp_path_factory.mktemp("slow")
    broken = folder / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{}")
    models = {
        "patient": fake("load-time=0.1", queue_timeout="1h"),
        "queue": fake("load-time=0.2", queue_timeout="30s"),
        "total": fake("load-time=0.3", queue_timeout="1h", timeouts={"total": "30s"}),
        "broken": {"model": str(broken), "restart": HASTY_RESTART},
    }
    config = {"defaults": {"restart": {"min_backoff": "350s", "max_backoff": "10m"}}, "models": models}
    with launched(config, folder, ready=False) as running:
        for name in ("patient", "queue", "total"):
            running.await_state(f"{name}:0", "ready")
            assert running.ask(chat("hello", name)).status == 200
            running.signal_backend(f"{name}:0", SIGKILL)
            running.await_state(f"{name}:0", "backoff")
        yield running


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("model", "headers"),
    [("queue", {}), ("total", {}), ("patient", {"x-stainless-read-timeout": "30"})],
    ids=["queue_timeout", "timeouts.total", "x-stainless-read-timeout"],
)
def test_a_pause_beyond_the_patience_is_refused_at_once(
    slow: Gateway,
    model: str,
    headers: dict[str, str],
    stream: bool,
) -> None:
    began = time.monotonic()
    answer = slow.ask(chat("hello", model, stream=stream), CHAT, **headers)
    assert time.monotonic() - began < AT_ONCE
    assert (answer.status, answer.code) == (503, "model_unavailable")
    assert 1 <= int(answer.headers["retry-after"]) <= 59
    assert answer.error is not None
    assert "starts again in about 3" in answer.error["message"]


def test_a_pause_within_the_patience_is_waited_for(slow: Gateway) -> None:
    headers = {"x-stainless-read-timeout": "600"}  # as openai-python sends it by default
    with (
        httpx.Client(base_url=slow.url, timeout=5) as client,
        client.stream("POST", CHAT, json=chat("hello", "patient", stream=True), headers=headers) as answer,
    ):
        assert answer.status_code == 200
        assert re.match(
            r": model patient restarting after killed, \d s so far, about 3\d\d s to go", next(answer.iter_lines())
        )
        assert slow.queued("patient") == 1
    wait_until(lambda: slow.queued("patient") == 0, 2.0)


def test_what_only_a_person_can_mend_is_refused_at_once(slow: Gateway) -> None:
    slow.await_state("broken:0", "failed")
    for stream in (True, False):
        began = time.monotonic()
        answer = slow.ask(chat("hello", "broken", stream=stream))
        assert time.monotonic() - began < AT_ONCE
        assert (answer.status, answer.code) == (424, "model_unavailable")
        assert answer.headers["x-should-retry"] == "false"

"""The commands that look at a running gateway, against a server that answers as one does."""

import json
import re
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any, cast

import pytest

from backends.process.ports import free_port
from gateway.cli.inspect import logs, status


class Stub(ThreadingHTTPServer):
    """``answers``: what each path gets, as status and body; ``asked``: the paths and keys that came."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: dict[str, tuple[int, bytes]] = {}
        self.asked: list[tuple[str, str | None]] = []
        self.missing = 0  # bytes promised and not sent

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        stub = cast("Stub", self.server)
        stub.asked.append((self.path, self.headers["authorization"]))
        code, body = stub.answers.get(self.path, (404, error("not_found", f"GET {self.path}: no such path")))
        self.send_response(code)
        self.send_header("content-length", str(len(body) + stub.missing))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def error(code: str, message: str) -> bytes:
    return json.dumps({"error": {"message": message, "code": code}}).encode()


def backend(name: str, state: str = "ready", **more: Any) -> dict[str, Any]:
    plain = {"id": name, "state": state, "pid": 71, "inflight": 0, "restarts": 0, "last_failure": None}
    return {**plain, "responsive": True, "memory": None, **more}


def told(**models: Any) -> bytes:
    return json.dumps({"version": "0.1.0", "status": "degraded", "models": models}).encode()


def one_model(*backends: dict[str, Any], queued: int = 0) -> dict[str, Any]:
    return {"status": "degraded", "queued": queued, "backends": list(backends)}


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.delenv("MLX_GATEWAY_API_KEY", raising=False)
    with Stub() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def cells(line: str) -> list[str]:
    """Those that are not empty."""
    return [cell for cell in re.split(r"\s{2,}", line.strip()) if cell]


# -- status ------------------------------------------------------------------------------------------------------------


def test_the_table(stub: Stub, capsys: pytest.CaptureFixture[str]) -> None:
    at = (datetime.now(UTC) - timedelta(seconds=90)).isoformat()
    first = one_model(
        backend("qwen:0", memory=3 * 2**30, inflight=2, abandoned=1),
        backend("qwen:1", "backoff", pid=None, restarts=4, last_failure={"cause": "oom", "at": at}),
        queued=3,
    )
    second = one_model(
        backend("tiny:0", responsive=False, memory=5 * 2**20),
        backend("tiny:1", "backoff", crash_looping=True, failed_lives=7),
    )
    stub.answers["/api/status"] = 200, told(qwen=first, tiny=second)
    assert status(stub.url, watch=False) == 0
    out = capsys.readouterr().out
    assert "mlx-gateway 0.1.0: degraded" in out
    rows = [cells(line) for line in out.splitlines() if re.search(r":\d ", line)]
    assert rows[0] == ["qwen", "degraded (+3 queued)", "qwen:0", "ready", "71", "3.0 GiB", "2 (+1 abandoned)", "0", "-"]
    assert rows[1][:6] == ["qwen:1", "backoff", "-", "-", "0", "4"]
    assert rows[1][6] in ("oom 90 s ago", "oom 91 s ago", "oom 92 s ago")
    assert rows[2][:6] == ["tiny", "degraded", "tiny:0", "ready, silent", "71", "5 MiB"]
    assert rows[3][:2] == ["tiny:1", "backoff, crash looping (7 lives)"]


def test_the_table_says_what_a_start_waits_for(
    stub: Stub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    phase = "waits for memory: 1.0 GiB available, needs 6.0 GiB; PID 4711 (hog [x]) holds 25.0 GiB"
    loading = {"phase": phase, "seconds": 3.0, "expected_seconds": None}
    waiting = backend("a:0", "waiting_for_memory", pid=None, loading=loading)
    refused = backend("a:1", "waiting_for_memory", pid=None)
    stub.answers["/api/status"] = 200, told(a=one_model(waiting, refused))
    assert status(stub.url, watch=False) == 0
    shown = [cell for line in capsys.readouterr().out.splitlines() for cell in cells(line)]
    assert f"waiting_for_memory: {phase}" in shown
    assert "waiting_for_memory" in shown


def test_the_table_shows_the_batch_and_the_share_of_the_memory(stub: Stub, capsys: pytest.CaptureFixture[str]) -> None:
    batch, share = {"reading": 1, "decoding": 2, "longest": 900}, {"total": 6 * 2**30}
    full = backend("a:0", memory=3 * 2**30, share=share, inflight=3, abandoned=1, report=batch)
    idle = backend("a:1", memory=5 * 2**20, share=None, report={"reading": 0, "decoding": None})
    stub.answers["/api/status"] = 200, told(a=one_model(full, idle, backend("a:2", share=share)))
    assert status(stub.url, watch=False) == 0
    rows = [cells(line) for line in capsys.readouterr().out.splitlines() if re.search(r":\d ", line)]
    assert rows[0][5:7] == ["3.0 GiB of 6.0 GiB", "3 (1 reading, 2 writing, +1 abandoned)"]
    assert rows[1][3:5] == ["5 MiB", "0"]
    assert rows[2][3:5] == ["-", "0"]


def test_no_word_is_broken_in_a_terminal_of_usual_width(
    stub: Stub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    at = (datetime.now(UTC) - timedelta(seconds=90)).isoformat()
    failed = backend("tiny:1", "backoff", pid=None, restarts=4, last_failure={"cause": "killed", "at": at})
    batch, share = {"reading": 11, "decoding": 22}, {"total": 100 * 2**30}
    busy = backend("tiny:2", memory=55 * 2**30, share=share, inflight=33, report=batch)
    stub.answers["/api/status"] = (
        200,
        told(tiny=one_model(backend("tiny:0", "starting", pid=99999), busy, failed, queued=3)),
    )
    assert status(stub.url, watch=False) == 0
    words = set(capsys.readouterr().out.split())
    assert {"STATUS", "BACKEND", "FLIGHT", "RESTARTS", "FAILURE"} <= words
    assert {"degraded", "queued)", "tiny:0", "starting", "99999", "backoff", "killed"} <= words
    assert {"55.0", "100.0", "GiB", "reading,", "writing)"} <= words


def test_watching_looks_again_and_again(
    stub: Stub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    naps: list[float] = []

    def nap(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 3:
            del stub.answers["/api/status"]

    monkeypatch.setattr("gateway.cli.inspect.time", SimpleNamespace(sleep=nap))
    stub.answers["/api/status"] = 200, told(qwen=one_model(backend("qwen:0")))
    assert status(stub.url, watch=True) == 1
    assert len(stub.asked) == 4
    assert "qwen:0" in capsys.readouterr().out


# -- logs --------------------------------------------------------------------------------------------------------------


def test_the_output_of_one(stub: Stub, capsys: pytest.CaptureFixture[str]) -> None:
    stub.answers["/api/backends/qwen%3A0/logs?lines=7&follow=0"] = 200, "first\nzweite Zeile ü\n".encode()
    assert logs(stub.url, "qwen:0", lines=7, follow=False) == 0
    assert capsys.readouterr().out == "first\nzweite Zeile ü\n"


def test_the_output_of_all_says_whose_it_is(stub: Stub, capsys: pytest.CaptureFixture[str]) -> None:
    models = {"org/a": one_model(backend("org/a:0")), "b": one_model(backend("b:0"))}
    stub.answers["/api/status"] = 200, told(**models)
    stub.answers["/api/backends/org%2Fa%3A0/logs?lines=100&follow=0"] = 200, b"one\ntwo\n"
    stub.answers["/api/backends/b%3A0/logs?lines=100&follow=0"] = 200, b""
    assert logs(stub.url, None, lines=100, follow=False) == 0
    assert capsys.readouterr().out == "org/a:0 | one\norg/a:0 | two\n"


def test_following_takes_one(stub: Stub, capsys: pytest.CaptureFixture[str]) -> None:
    stub.answers["/api/status"] = 200, told(a=one_model(backend("a:0"), backend("a:1")))
    assert logs(stub.url, None, lines=1, follow=True) == 1
    assert capsys.readouterr().err == "--follow takes one backend: a:0, a:1\n"
    stub.answers["/api/status"] = 200, told(a=one_model(backend("a:0")))
    stub.answers["/api/backends/a%3A0/logs?lines=1&follow=1"] = 200, b"only\n"
    assert logs(stub.url, None, lines=1, follow=True) == 0
    assert capsys.readouterr().out == "a:0 | only\n"


def test_a_gateway_that_goes_away_in_the_middle(stub: Stub, capsys: pytest.CaptureFixture[str]) -> None:
    stub.answers["/api/backends/a%3A0/logs?lines=1&follow=1"] = 200, b"whole\nhalf"
    stub.missing = 1
    assert logs(stub.url, "a:0", lines=1, follow=True) == 1
    out, err = capsys.readouterr()
    assert out.startswith("whole\n")
    assert err.startswith(f"lost the connection to the gateway at {stub.url}: ")


# -- no answer ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((401, error("invalid_api_key", "missing")), "requires an API key; set MLX_GATEWAY_API_KEY"),
        ((503, error("overloaded", "too many")), "too many"),
        ((404, b"<html>nginx</html>"), "status 404; check that --url"),
        ((500, b'{"error": "text"}'), "status 500; check that --url"),
        ((502, b"[]"), "status 502; check that --url"),
    ],
)
def test_an_answer_that_is_none_is_explained(
    stub: Stub, answer: tuple[int, bytes], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    stub.answers["/api/status"] = stub.answers["/api/backends/a%3A0/logs?lines=1&follow=0"] = answer
    assert status(stub.url, watch=False) == 1
    first = capsys.readouterr()
    assert logs(stub.url, "a:0", lines=1, follow=False) == 1
    second = capsys.readouterr()
    for out, err in (first, second):
        assert (out, err.startswith(stub.url), words in err) == ("", True, True)


def test_the_key_is_taken_from_the_environment(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    stub.answers["/api/status"] = 200, told()
    assert status(stub.url, watch=False) == 0
    monkeypatch.setenv("MLX_GATEWAY_API_KEY", "secret")
    assert status(stub.url, watch=False) == 0
    assert [key for _, key in stub.asked] == [None, "Bearer secret"]


@pytest.mark.parametrize("url", ["http://127.0.0.1:{port}", "http://[", "nonsense"])
def test_nobody_there(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    url = url.format(port=free_port("127.0.0.1"))
    assert status(url, watch=False) == 1
    assert "no gateway answers at" in capsys.readouterr().err
    assert logs(url, "a:0", lines=1, follow=False) == 1
    assert capsys.readouterr().err


# -- what a terminal would obey ----------------------------------------------------------------------------------------

EVIL = "\x1b[2J\x9b[red]\u202e"


def test_output_of_a_backend_does_nothing_to_the_terminal(stub: Stub, capsys: pytest.CaptureFixture[str]) -> None:
    stub.answers["/api/backends/a%3A0/logs?lines=5&follow=0"] = (200, f"one {EVIL}\u2028two\x0cthree\nfour\n".encode())
    assert logs(stub.url, "a:0", lines=5, follow=False) == 0
    out = capsys.readouterr().out
    assert out == "one \\x1b[2J\\x9b[red]\\u202e\\u2028two\\x0cthree\nfour\n"


def test_neither_does_what_a_server_says_of_itself(stub: Stub, capsys: pytest.CaptureFixture[str]) -> None:
    stub.answers["/api/status"] = (200, told(**{EVIL: one_model(backend(EVIL, EVIL))}))
    assert status(stub.url, watch=False) == 0
    stub.answers["/api/status"] = (500, error("x", EVIL))
    assert status(stub.url, watch=False) == 1
    out, err = capsys.readouterr()
    assert "[red]" in out
    for text in (out, err):
        assert not set("\x1b\x9b\u202e") & set(text)

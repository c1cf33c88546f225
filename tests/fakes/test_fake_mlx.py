"""The fake fails as it is told to, in the ways the real server was seen to fail. Tests of the gateway lean on it."""

import http.client
import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("fake_mlx.py")


class Fake:
    def __init__(self, output: Path, mode: str, port: int = 0) -> None:
        self.port, self.output = port or free_port(), output
        argv = [sys.executable, str(SCRIPT), "--port", str(self.port), "--mode", mode, "--prefill-step-size", "512"]
        with output.open("wb") as sink:
            self.process = subprocess.Popen(argv, stdout=sink, stderr=sink)

    def text(self) -> str:
        return self.output.read_bytes().decode()

    def wait_for(self, what: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 30
        while not what():
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.01)

    def listening(self) -> "Fake":
        self.wait_for(lambda: "Starting httpd at" in self.text())
        return self

    def open(self, path: str, body: Any = None, timeout: float = 10) -> tuple[http.client.HTTPConnection, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        raw = body if isinstance(body, str | None) else json.dumps(body)
        connection.request("GET" if body is None else "POST", path, raw)
        try:
            return connection, connection.getresponse()
        except BaseException:
            connection.close()
            raise

    def ask(self, path: str, body: Any = None) -> tuple[int, bytes]:
        connection, answer = self.open(path, body)
        try:
            return answer.status, answer.read()
        finally:
            answer.close()
            connection.close()

    def chat(self, prompt: str, **rest: Any) -> tuple[int, bytes]:
        return self.ask("/v1/chat/completions", {"messages": [{"role": "user", "content": prompt}], **rest})

    def stream(self, prompt: str, **rest: Any) -> list[str]:
        status, body = self.chat(prompt, stream=True, **rest)
        assert status == 200
        return body.decode().split("\n\n")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Fake]]:
    fakes: list[Fake] = []

    def starter(mode: str = "", port: int = 0) -> Fake:
        fakes.append(Fake(tmp_path / f"output{len(fakes)}", mode, port))
        return fakes[-1]

    yield starter
    for fake in fakes:
        fake.process.kill()
        fake.process.wait()


def words(events: list[str]) -> str:
    deltas = [json.loads(event[6:])["choices"] for event in events if event.startswith("data: {")]
    return "".join(choices[0]["delta"].get("content", "") for choices in deltas if choices)


def test_healthy_stream_has_the_real_shape(start: Callable[..., Fake]) -> None:
    fake = start().listening()
    connection, answer = fake.open(
        "/v1/chat/completions",
        {
            "messages": [{"role": "user", "content": "FAKE prompt=5000"}],
            "stream": True,
            "max_tokens": 3,
            "stream_options": {"include_usage": True},
        },
    )
    assert answer.version == 10
    assert answer.getheader("Content-Length") is None
    events = answer.read().decode().split("\n\n")
    answer.close()
    connection.close()
    assert events[:4] == [f": keepalive {done}/5000" for done in (2048, 4096, 4999, 5000)]
    chunks = [json.loads(event[6:]) for event in events[4:9]]
    assert [chunk["choices"][0]["delta"].keys() for chunk in chunks[:3]] == [{"role", "content"}] * 3
    assert chunks[3]["choices"][0] == {"index": 0, "finish_reason": "length", "delta": {"role": "assistant"}}
    assert (chunks[4]["choices"], chunks[4]["usage"]["total_tokens"]) == ([], 5003)
    assert events[9:] == ["data: [DONE]", ""]


def test_two_fakes_tell_the_same_story_plain_or_streamed_unless_told_otherwise(start: Callable[..., Fake]) -> None:
    one, two = start().listening(), start().listening()
    told = words(one.stream("Hello"))
    assert words(two.stream("Hello")) == told
    assert json.loads(two.chat("Hello")[1])["choices"][0]["message"]["content"] == told
    assert words(one.stream("Hello!")) != told
    assert words(one.stream("Hello", temperature=1)) != words(two.stream("Hello", temperature=1))
    assert words(one.stream("Hello", temperature=1, seed=7)) == words(two.stream("Hello", temperature=1, seed=7))
    ours, theirs = (words(fake.stream("FAKE diverge=2")).split() for fake in (one, two))
    assert ours[:2] == theirs[:2]
    assert ours[2:] != theirs[2:]


@pytest.mark.parametrize(
    ("words_", "status", "printed"),
    [
        ("metal-oom", -6, "libc++abi: terminating due to uncaught exception of type std::runtime_error: [METAL]"),
        ("gpu-timeout", -6, "ErrorTimeout)"),
        ("gpu-victim", -6, "InnocentVictim)"),
        ("gpu-fault", -6, "PageFault)"),
        ("killed", -9, ""),
        ("segfault", -11, ""),
        ("fail=die exit=3 say=malloc", 3, "[malloc] Unable to allocate"),
    ],
)
@pytest.mark.parametrize("after", [0, 5])
def test_death_in_mid_stream_is_a_clean_end(
    start: Callable[..., Fake], *, words_: str, status: int, printed: str, after: int
) -> None:
    fake = start().listening()
    events = fake.stream(f"FAKE {words_} after={after}")
    assert fake.process.wait(10) == status
    assert printed in fake.text()
    assert sum(event.startswith("data: ") for event in events) == after
    assert events[-1] == ""


def test_death_of_a_plain_answer_leaves_zero_bytes_and_a_200_in_the_log(start: Callable[..., Fake]) -> None:
    fake = start().listening()
    with pytest.raises(http.client.RemoteDisconnected):
        fake.chat("FAKE metal-oom")
    assert '"POST /v1/chat/completions HTTP/1.1" 200 -' in fake.text()


def test_wedge_of_0_32_ends_streams_and_says_so(start: Callable[..., Fake]) -> None:
    fake = start().listening()
    connection, bystander = fake.open(
        "/v1/chat/completions", {"messages": [{"content": "FAKE n=500 delay=0.05"}], "stream": True}
    )
    events = fake.stream("FAKE oom-0.32 after=2")
    assert "[DONE]" not in "".join(events)
    assert b"[DONE]" not in bystander.read()
    bystander.close()
    connection.close()
    assert fake.ask("/health") == (503, b'{"status": "unavailable"}')
    assert fake.chat("Hello") == (404, b'{"error": "generation thread died"}')
    assert "ERROR - mlx_lm.server generation thread died: [METAL]" in fake.text()
    assert fake.process.poll() is None


@pytest.mark.parametrize("body", [{"prompt": ""}, {"prompt": ["a"]}, {"prompt": "a", "stop": [1]}])
def test_poison_kills_the_generation_thread(start: Callable[..., Fake], body: dict[str, Any]) -> None:
    fake = start().listening()
    assert fake.ask("/v1/completions", body) == (404, b'{"error": "generation thread died"}')
    assert fake.ask("/health")[0] == 503


@pytest.mark.parametrize(
    ("mode", "printed"),
    [("wedge-0.31", "Exception in thread Thread-1 (_generate):"), ("native-hang", ""), ("stall", "")],
)
def test_silent_failures_keep_health_at_200(start: Callable[..., Fake], mode: str, printed: str) -> None:
    fake = start().listening()
    connection, answer = fake.open(
        "/v1/chat/completions", {"messages": [{"content": f"FAKE {mode} after=1"}], "stream": True}, timeout=0.5
    )
    with pytest.raises(TimeoutError):
        answer.read()
    assert fake.ask("/health") == (200, b'{"status": "ok"}')
    fake.wait_for(lambda: printed in fake.text())
    if mode == "stall":
        assert fake.chat("Hello")[0] == 200
    else:
        with pytest.raises(TimeoutError):
            fake.open("/v1/completions", {"prompt": "a"}, timeout=0.3)
    answer.close()
    connection.close()


@pytest.mark.parametrize(
    ("mode", "tail"),
    [
        ("no-done", '"finish_reason": "stop", "delta": {"role": "assistant"}}]}\n\n'),
        ("no-finish", "data: [DONE]\n\n"),
        ("eof", '"finish_reason": null, "delta": {"role": "assistant", "content": "'),
        ("cut-event", '"object": "chat.completion.chunk", '),
    ],
)
def test_streams_that_lack_something(start: Callable[..., Fake], mode: str, tail: str) -> None:
    text = "\n\n".join(start().listening().stream(f"FAKE {mode}"))
    assert tail in text.split("data: ", 1)[1]
    assert ('"finish_reason": "stop"' in text) == (mode == "no-done")
    assert ("[DONE]" in text) == (mode == "no-finish")
    assert text.endswith("\n\n") == (mode != "cut-event")


def test_eof_before_the_status_line(start: Callable[..., Fake]) -> None:
    fake = start().listening()
    with pytest.raises(http.client.RemoteDisconnected):
        fake.stream("FAKE eof-before-head")
    assert fake.chat("Hello")[0] == 200


def test_the_port_opens_before_the_model_is_loaded(start: Callable[..., Fake]) -> None:
    fake = start("slow-load load-time=1").listening()
    assert fake.ask("/health")[0] == 200
    assert fake.chat("Hello")[0] == 200


def test_load_failures_stay_alive(start: Callable[..., Fake]) -> None:
    new, old = start("load-failure").listening(), start("load-hang").listening()
    assert new.chat("Hello") == (404, b'{"error": "generation thread died"}')
    assert new.ask("/health")[0] == 503
    with pytest.raises(TimeoutError):
        old.open("/v1/completions", {"prompt": "a"}, timeout=0.3)
    assert old.ask("/health")[0] == 200


def test_a_taken_port_leaves_a_process_without_a_listener(start: Callable[..., Fake]) -> None:
    first = start().listening()
    for second in (start(port=first.port), start("bind-failure")):
        second.wait_for(lambda fake=second: "Address already in use" in fake.text())  # type: ignore[misc]
        assert second.process.poll() is None


def test_exit_at_start(start: Callable[..., Fake]) -> None:
    fake = start("exit-at-start exit=2 say=import")
    assert fake.process.wait(10) == 2
    assert "No module named 'mlx'" in fake.text()


def test_sigterm_kills_unless_ignored(start: Callable[..., Fake]) -> None:
    meek, stubborn = start().listening(), start("ignore-sigterm").listening()
    for fake in (meek, stubborn):
        fake.process.terminate()
    assert meek.process.wait(10) == -15
    assert stubborn.ask("/health")[0] == 200


def test_once_spares_the_second_try(start: Callable[..., Fake], tmp_path: Path) -> None:
    one, two = start().listening(), start().listening()
    prompt = f"FAKE metal-oom after=2 n=5 once={tmp_path / 'done'}"
    assert "[DONE]" not in "".join(one.stream(prompt))
    assert "data: [DONE]" in two.stream(prompt)
    mode = f"exit-at-start once={tmp_path / 'started'}"
    assert start(mode).process.wait(10) == 1
    assert start(mode).listening().chat("Hello")[0] == 200


def test_a_file_ends_its_answer_and_its_load(start: Callable[..., Fake], tmp_path: Path) -> None:
    over, loaded = tmp_path / "over", tmp_path / "loaded"
    fake = start(f"load-until={loaded}").listening()
    messages = [{"role": "user", "content": f"FAKE delay=0.01 until={over}"}]
    body = {"messages": messages, "stream": True, "max_tokens": 5}
    with pytest.raises(TimeoutError):
        fake.open("/v1/chat/completions", body, timeout=0.5)
    loaded.touch()
    connection, answer = fake.open("/v1/chat/completions", body)
    with closing(connection), closing(answer):
        begun = [answer.readline() for _ in range(60)]
        assert b"data: [DONE]\n" not in begun
        over.touch()
        assert b"data: [DONE]\n" in answer.read()


def test_output_can_mislead(start: Callable[..., Fake]) -> None:
    fake = start("bars").listening()
    assert fake.ask("/v1/completions", "not json\nlibc++abi: terminating")[0] == 400
    assert "- Raw body: not json\nlibc++abi: terminating\n" in fake.text()
    assert fake.chat("FAKE forged")[0] == 200
    assert "Raw body: \nlibc++abi: terminating due to uncaught" in fake.text()
    assert "\rFetching 7 files:  29%" in fake.text()


@pytest.mark.parametrize(
    ("path", "body", "status", "error"),
    [
        ("/nowhere", {"prompt": "a"}, 404, b"Not Found"),
        ("/v1/completions", {"prompt": "a", "max_tokens": None}, 400, b"max_tokens must be of type"),
        ("/v1/completions", {"prompt": "a", "model": "gpt-4o"}, 404, b"Repository Not Found"),
        ("/v1/chat/completions", {"messages": []}, 404, b'{"error": "list index out of range"}'),
        ("/v1/completions", {"prompt": "FAKE status=502"}, 502, b'{"error": "fake"}'),
    ],
)
def test_refusals(start: Callable[..., Fake], *, path: str, body: Any, status: int, error: bytes) -> None:
    got = start().listening().ask(path, body)
    assert got[0] == status
    assert error in got[1]


def test_reasoning_and_tools(start: Callable[..., Fake]) -> None:
    fake = start().listening()
    message = json.loads(fake.chat("FAKE reasoning=2 tool=1 n=4")[1])["choices"][0]
    assert message["finish_reason"] == "tool_calls"
    assert message["message"].keys() == {"role", "content", "reasoning", "tool_calls"}
    events = "".join(fake.stream("FAKE reasoning=2 tool=1 n=4"))
    assert events.count('"reasoning"') == 2
    assert '"finish_reason": "tool_calls"' in events

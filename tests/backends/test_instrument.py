"""The instrument beside a fake engine: what it tells, and that nothing which fails in it reaches the server."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from backends import mlx_server
from backends.diagnosis.log_parser import read
from backends.domain.report import EngineReport, parse_report
from backends.instrument import instrument
from backends.instrument.instrument import Channel, Fix, Hooks, Reporter, apply_fixes, digest


class SizedTokens:
    def __init__(self) -> None:
        self.tokens: list[list[int]] = []

    def __len__(self) -> int:
        return len(self.tokens)


class Batch:
    def __init__(self) -> None:
        self._prompt_batch = SizedTokens()
        self._generation_batch = SizedTokens()
        self._unprocessed_sequences: list[Any] = []
        self._currently_processing: list[Any] = []

    def insert_segments(self, segments: list[list[int]], cached: list[int]) -> str:
        self._unprocessed_sequences.append((0, segments, 9, None, cached))
        return "uids"

    def next(self) -> None:
        """Reads half of what waits, then the rest, then generates."""
        if self._unprocessed_sequences:
            _, segments, _, _, cached = self._unprocessed_sequences.pop()
            total = sum(map(len, segments))
            self._prompt_batch.tokens.append(cached + [0] * (total // 2))
            self._currently_processing.append([segments, total // 2, total])
        elif self._currently_processing:
            _, done, total = self._currently_processing.pop()
            tokens = self._prompt_batch.tokens.pop()
            self._generation_batch.tokens.append(tokens + [0] * (total - done))
        else:
            self._generation_batch.tokens[0].append(0)

    def remove(self) -> None:
        self._generation_batch.tokens.clear()


class Cache:
    def __init__(self) -> None:
        self.entries: list[int] = []
        self.max_size, self.max_bytes = 10, 1 << 63

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def nbytes(self) -> int:
        return sum(self.entries)

    def insert_cache(self, size: int) -> None:
        self.entries.append(size)

    def trim_to(self, *, n_sequences: int | None = None, n_bytes: int | None = None) -> None:
        while n_bytes is not None and self.nbytes > n_bytes:
            del self.entries[0]
        if n_sequences is not None:
            del self.entries[: -n_sequences or None]


class Generator:
    def __init__(self, cache: Cache) -> None:
        self._stop = self._is_distributed = False
        self.prompt_cache = cache
        self.model_provider = SimpleNamespace(cli_args=SimpleNamespace(prompt_cache_bytes=None))
        self.ends = threading.Event()
        self._generation_thread = threading.Thread(target=self.ends.wait)
        self._generation_thread.start()

    def _next_request(self) -> str:
        return "request"


class Engine:
    """As much of mlx_lm.server as is hooked; each class is new, so that hooks do not add up."""

    def __init__(self) -> None:
        self.BatchGenerator = type("BatchGenerator", (Batch,), {})
        self.LRUPromptCache = type("LRUPromptCache", (Cache,), {})
        self.ResponseGenerator = type("ResponseGenerator", (Generator,), {})
        self.stream_generate = _stream_generate

    def generator(self) -> Any:
        return self.ResponseGenerator(self.LRUPromptCache())


def _stream_generate(*, prompt: list[int], prompt_cache: list[Any]) -> Iterator[int]:
    yield from prompt


class Bench:
    def __init__(self) -> None:
        self.engine = Engine()
        self.news = threading.Event()
        self.hooks = Hooks(self.news.set)
        self.hooks.install(self.engine)

    def members(self) -> tuple[int | None, int | None, int | None]:
        noted = self.hooks.noted
        return noted.reading, noted.decoding, noted.longest

    def generating(self) -> bool | None:
        return self.hooks.noted.generating

    def was_news(self) -> bool:
        was = self.news.is_set()
        self.news.clear()
        return was


@pytest.fixture
def bench() -> Bench:
    return Bench()


# -- what is noted -----------------------------------------------------------------------------------------------------


def test_the_members_of_a_batch(bench: Bench) -> None:
    batch = bench.engine.BatchGenerator()
    assert bench.members() == (0, 0, 0)
    assert batch.insert_segments([[1] * 6, [1] * 2], [1] * 4) == "uids"
    assert (bench.members(), bench.was_news()) == ((1, 0, 12), True)
    bench.hooks.measure()
    batch.next()
    assert (bench.members(), bench.was_news()) == ((1, 0, 12), False), "with the part that is not read yet"
    batch.next()
    assert (bench.members(), bench.was_news()) == ((0, 1, 12), True)
    batch.next()
    assert bench.members() == (0, 1, 12), "not at each step"
    bench.hooks.measure()
    batch.next()
    assert (bench.members(), bench.was_news()) == ((0, 1, 14), False)
    batch.remove()
    assert (bench.members(), bench.was_news()) == ((0, 0, 0), True)


def test_a_request_that_is_served_alone(bench: Bench) -> None:
    answers = bench.engine.stream_generate(prompt=[1, 2, 3], prompt_cache=[SimpleNamespace(offset=5)])
    assert next(answers) == 1
    assert bench.members() == (0, 1, 9)
    assert list(answers) == [2, 3]
    assert bench.members() == (0, 0, 0)


def test_the_prompt_cache(bench: Bench) -> None:
    cache = bench.engine.LRUPromptCache()
    cache.insert_cache(30)
    cache.insert_cache(12)
    assert (bench.hooks.noted.cached_sequences, bench.hooks.noted.cached_bytes) == (2, 42)


def test_the_prompt_cache_is_bounded_on_the_generation_thread(bench: Bench) -> None:
    with pytest.raises(RuntimeError):
        bench.hooks.bound_prompt_cache(size=1, entries=1)
    generator = bench.engine.generator()
    cache = generator.prompt_cache
    for size in (30, 20, 10):
        cache.insert_cache(size)
    bench.hooks.bound_prompt_cache(size=25, entries=None)
    assert len(cache) == 3, "not yet"
    assert generator._next_request() == "request"
    assert (cache.entries, cache.max_bytes, generator.model_provider.cli_args.prompt_cache_bytes) == ([10], 25, 25)
    assert (bench.hooks.noted.cached_sequences, cache.max_size) == (1, 10)
    generator._is_distributed = True
    with pytest.raises(RuntimeError):
        bench.hooks.bound_prompt_cache(size=None, entries=1)
    generator.ends.set()


def test_commands_that_nobody_carries_out_do_not_add_up(bench: Bench) -> None:
    generator = bench.engine.generator()
    for _ in range(instrument.MAX_JOBS):
        bench.hooks.bound_prompt_cache(size=1, entries=1)
    with pytest.raises(RuntimeError):
        bench.hooks.bound_prompt_cache(size=1, entries=1)
    generator.ends.set()


def test_the_end_of_the_generation_thread_is_news(bench: Bench) -> None:
    assert bench.generating() is None
    generator = bench.engine.generator()
    assert bench.generating() is True
    generator.ends.set()
    assert bench.news.wait(10.0)
    assert bench.generating() is False


def test_a_generation_thread_that_was_asked_to_stop_is_none(bench: Bench) -> None:
    generator = bench.engine.generator()
    generator._stop = True
    generator.ends.set()
    assert not bench.news.wait(0.1)
    assert bench.generating() is True


def test_a_note_that_fails_costs_one_line(bench: Bench, capfd: pytest.CaptureFixture[str]) -> None:
    batch = bench.engine.BatchGenerator()
    del batch._prompt_batch
    for _ in range(3):
        assert batch.insert_segments([[1]], []) == "uids"
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(instrument.PREFIX)
    assert "AttributeError" in line


@pytest.mark.parametrize("lacking", ["BatchGenerator", "LRUPromptCache", "ResponseGenerator", "stream_generate"])
def test_what_a_version_lacks_is_not_known(lacking: str, capfd: pytest.CaptureFixture[str]) -> None:
    engine = vars(Engine())
    del engine[lacking]
    hooks = Hooks(lambda: None)
    hooks.install(SimpleNamespace(**engine))
    noted = hooks.noted
    assert (noted.reading is None, noted.cached_bytes is None) == (
        lacking == "BatchGenerator",
        lacking == "LRUPromptCache",
    )
    assert all(line.startswith(instrument.PREFIX) for line in capfd.readouterr().err.splitlines())


# -- the channel -------------------------------------------------------------------------------------------------------


class Wire:
    """A reporter, and the gateway's end."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.ours, theirs = socket.socketpair()
        self.ours.settimeout(10.0)
        self.channel = Channel(theirs)
        Reporter(self.channel, bench.hooks, bench.news, {"a": "on"}).start()
        self.lines = self.ours.makefile("rb")

    def report(self) -> EngineReport:
        return parse_report(self.lines.readline())

    def close(self) -> None:
        self.lines.close()
        self.ours.close()
        self.channel.sock.close()


@pytest.fixture
def wire(bench: Bench) -> Iterator[Wire]:
    both = Wire(bench)
    yield both
    both.close()


def test_a_change_is_told_at_once(wire: Wire) -> None:
    assert wire.report().fixes == {"a": "on"}
    generator, began = wire.bench.engine.generator(), time.monotonic()
    wire.bench.engine.BatchGenerator().insert_segments([[1] * 6], [])
    told = wire.report()
    assert (told.reading, told.longest, told.generating) == (1, 6, True)
    generator.ends.set()
    assert wire.report().generating is False
    assert time.monotonic() - began < instrument.BUSY + 0.5


def test_commands(wire: Wire, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    mx = pytest.importorskip("mlx.core")
    called: list[Any] = []
    monkeypatch.setattr(mx, "clear_cache", lambda: called.append("released"))
    monkeypatch.setattr(mx, "set_cache_limit", called.append)
    monkeypatch.setattr(mx, "set_memory_limit", called.append)
    for command in (
        b'{"do": "limits", "cache": 5, "memory": null}',
        b'{"do": "limits", "cache": "x"}',
        b"garbage",
        b'{"do": "dance"}',
        b"[]",
        b'{"do": "limits", "memory": 7}',
        b'{"do": "release_pool"}',
    ):
        wire.ours.sendall(command + b"\n")
    while "released" not in called:
        time.sleep(0.005)
    assert called == [5, 7, "released"]
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 4
    assert not read(
        [line.replace("ValueError", "MemoryError: [metal::malloc] out of memory") for line in lines]
    ).present


def test_a_gateway_that_does_not_read_loses_reports_and_blocks_nothing() -> None:
    ours, theirs = socket.socketpair()
    channel = Channel(theirs)
    lines = [b'{"number": %d, "rest": "%s"}\n' % (number, b"x" * 5000) for number in range(1000)]
    for line in lines:
        channel.send(line)
    heard = b""
    while True:
        try:
            heard += ours.recv(1 << 20, socket.MSG_DONTWAIT)
        except BlockingIOError:
            break
    channel.send(b"last\n")
    heard += ours.recv(1 << 20)
    *whole, end = heard.splitlines(keepends=True)
    assert end == b"last\n"
    assert 0 < len(whole) < len(lines)
    assert whole == lines[: len(whole)], "no line is torn"
    ours.close()
    channel.send(b"x\n")
    assert channel.closed
    theirs.close()


def test_an_end_that_is_closed_ends_its_threads(wire: Wire) -> None:
    wire.report()
    wire.ours.shutdown(socket.SHUT_RDWR)
    deadline = time.monotonic() + 10.0
    while any(thread.name in ("instrument-report", "instrument-obey") for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_working_set_of_the_device(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """As Metal tells it; another device does not, or cannot be asked."""
    mx = pytest.importorskip("mlx.core")
    for answer, expected in (({"max_recommended_working_set_size": 77}, 77), ({}, None), (None, None)):
        monkeypatch.setattr(mx, "device_info", lambda answer=answer: answer)
        instrument.working_set.cache_clear()
        assert instrument.working_set() == expected
    instrument.working_set.cache_clear()
    assert capfd.readouterr().err.count(instrument.PREFIX) == 1


# -- engine fixes ------------------------------------------------------------------------------------------------------


def original(value: int) -> int:
    return value


def fix(**changed: Any) -> Fix:
    known: dict[str, Any] = {
        "title": "double",
        "module": __name__,
        "name": "original",
        "sources": frozenset({digest(original)}),
        "replace": lambda before: lambda value: before(value) * 2,
    }
    return Fix(**known | changed)


@pytest.mark.parametrize(
    ("changed", "state", "result"),
    [
        ({}, "on", 6),
        ({"sources": frozenset({"0"})}, "source differs", 3),
        ({"name": "Missing.method"}, "source differs", 3),
        ({"module": "no_such_module"}, "source differs", 3),
        ({"replace": lambda _: 1 / 0}, "source differs", 3),
    ],
)
def test_a_fix_replaces_only_what_it_was_made_for(
    changed: dict[str, Any], state: str, result: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules.setdefault(__name__, SimpleNamespace())  # type: ignore[arg-type]
    monkeypatch.setattr(module, "original", original, raising=False)
    assert apply_fixes((fix(**changed),), wanted=False) == {"double": "off"}
    assert module.original(3) == 3
    assert apply_fixes((fix(**changed),), wanted=True) == {"double": state}
    assert module.original(3) == result


# -- the program -------------------------------------------------------------------------------------------------------

FAKE_SERVER = """
import os, subprocess, sys
def main():
    print(sys.argv[1:], sys.path[0], [name for name in os.environ if name.startswith("MLX_GATEWAY_")])
    print(subprocess.run(["ls", "/dev/fd"], capture_output=True, text=True, close_fds=False).stdout.split())
    raise SystemExit(7)
"""
FAKE_MAIN = "import sys, mlx_lm.server; assert sys.argv.pop(1) == 'server'; mlx_lm.server.main()"


@pytest.mark.parametrize("channel", ["", "999", "x", "0"])
def test_the_program_runs_the_server_as_if_it_were_not_there(tmp_path: Any, channel: str) -> None:
    """Also where the descriptor is none, and where the engine has nothing that can be hooked."""
    package = tmp_path / "packages" / "mlx_lm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "server.py").write_text(FAKE_SERVER)
    (package / "__main__.py").write_text(FAKE_MAIN)
    (tmp_path / "mlx_lm.py").write_text("1 / 0")  # in the working directory
    ours, theirs = socket.socketpair()
    number = channel or str(theirs.fileno())
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(package.parent), "MLX_GATEWAY_CHANNEL": number}
    done = subprocess.run(
        [sys.executable, "-P", str(mlx_server.INSTRUMENT), "server", "--model", "m"],
        env=env,
        cwd=tmp_path,
        pass_fds=(theirs.fileno(),),
        capture_output=True,
        text=True,
        check=False,
    )
    said, descriptors = done.stdout.splitlines()
    assert (done.returncode, said) == (7, f"['--model', 'm'] {package.parent} []"), done.stderr
    assert str(theirs.fileno()) not in json.loads(descriptors.replace("'", '"')) or channel
    assert all(line.startswith(instrument.PREFIX) for line in done.stderr.splitlines())
    ours.close()
    theirs.close()

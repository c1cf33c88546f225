"""Writes to a pipe that nobody reads: they return at once, and what is lost is told."""

import contextlib
import os
import re
import sys
import threading
from collections.abc import Iterator

import pytest

from gateway.cli import logfmt
from gateway.cli.background_writer import BackgroundWriter, background_output

PATIENCE = 10.0
LINE = "x" * 99 + "\n"


def note(lines: int) -> str:
    return f"[{lines} dropped]\n"


class Pipe:
    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()

    def read_until(self, text: str) -> str:
        found = b""
        while text.encode() not in found:
            found += os.read(self.reader, 1 << 16)
        return found.decode()

    def fill(self) -> None:
        os.set_blocking(self.writer, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(self.writer, b"." * 512)
        os.set_blocking(self.writer, True)

    def close(self) -> None:
        for fd in (self.reader, self.writer):
            try:
                os.close(fd)
            except OSError:
                continue


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    one = Pipe()
    yield one
    one.close()


def accounted(text: str) -> int:
    """The lines that came, and those that a note says were dropped."""
    return text.count(LINE) + sum(map(int, re.findall(r"\[(\d+) dropped\]", text)))


def test_what_is_written_comes_in_order_and_whole(pipe: Pipe) -> None:
    out = BackgroundWriter(pipe.writer, note)
    print("one", 1, file=out, flush=True)
    for n in range(1000):
        out.write(f"line {n}\n")
    out.write("no end")
    out.flush()
    assert pipe.read_until("no end") == "one 1\n" + "".join(f"line {n}\n" for n in range(1000)) + "no end"
    assert out.drain(PATIENCE)


def test_nobody_reads_for_a_while(pipe: Pipe) -> None:
    pipe.fill()
    out = BackgroundWriter(pipe.writer, note, max_pending=10_000)
    for _ in range(5000):  # more than the queue holds
        out.write(LINE)
    assert not out.drain(0.01), "the bound in time holds"
    got = threading.Thread(target=lambda: texts.append(pipe.read_until("the end")), daemon=True)
    texts: list[str] = []
    got.start()
    assert out.drain(PATIENCE)
    out.write("the end\n")
    got.join(PATIENCE)
    (text,) = texts
    assert accounted(text) == 5000
    assert len(re.findall(r"dropped", text)) >= 1
    assert re.sub(r"\[\d+ dropped\]\n", "", text).replace(LINE, "").strip(".") == "the end\n", "only whole lines"


def test_the_number_of_dropped_lines_stands_where_they_would(pipe: Pipe) -> None:
    out = BackgroundWriter(pipe.writer, note, max_pending=1000)
    out.write("a" * 2000 + "\n")
    out.write("after\n")
    assert pipe.read_until("after") == "[1 dropped]\nafter\n"


def test_a_line_without_an_end_has_a_bound(pipe: Pipe) -> None:
    out = BackgroundWriter(pipe.writer, note, max_pending=1000)
    for _ in range(100):
        out.write("y" * 100)
    out.write("\nafter\n")
    assert "dropped]\n" in (text := pipe.read_until("after"))
    assert len(text) < 1100


def test_a_reader_that_exits_and_the_text_it_missed(pipe: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.cli.background_writer.RETRY_INTERVAL", 0.01)
    os.close(pipe.reader)
    out = BackgroundWriter(pipe.writer, note)
    for _ in range(50):
        out.write(LINE)
    assert out.drain(PATIENCE), "nothing can be waited for"
    pipe.reader, fresh = os.pipe()
    os.dup2(fresh, pipe.writer)  # a new reader
    os.close(fresh)
    out.write(LINE)
    assert accounted(pipe.read_until(LINE)) == 51


def test_a_descriptor_that_another_process_has_made_non_blocking(pipe: Pipe) -> None:
    os.set_blocking(pipe.writer, False)
    out = BackgroundWriter(pipe.writer, note)
    for _ in range(3000):
        out.write(LINE)
    out.write("the end\n")
    assert accounted(pipe.read_until("the end")) == 3000


def test_text_that_is_no_unicode(pipe: Pipe) -> None:
    BackgroundWriter(pipe.writer, note).write("\ud800\n")
    assert pipe.read_until("\n") == "\\ud800\n"


def test_stdout_and_stderr_are_replaced_and_put_back(capfd: pytest.CaptureFixture[str]) -> None:
    with capfd.disabled():
        before = sys.stdout, sys.stderr
        with background_output(note):
            assert (sys.stdout.fileno(), sys.stderr.fileno()) == (1, 2)
            assert isinstance(sys.stderr, BackgroundWriter)
        assert (sys.stdout, sys.stderr) == before


def test_the_line_about_dropped_lines_has_the_form_of_the_log() -> None:
    assert re.fullmatch(
        r'\d{4}-\d\d-\d\d \S+ warning output dropped lines=240 reason="nobody read it in time"\n', logfmt.dropped(240)
    )

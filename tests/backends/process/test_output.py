"""Lines out of bytes however they are cut, and the ring that keeps the last of them."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.process.output import CUT_MARK, SLICE, Backlog, Entry, LineSplitter, Ring


def split(*pieces: bytes, max_line: int = 8192) -> list[str]:
    splitter = LineSplitter(max_line)
    lines = [line for piece in pieces for line in splitter.feed(piece)]
    return [*lines, *splitter.flush()]


@pytest.mark.parametrize(
    ("data", "lines"),
    [
        (b"", []),
        (b"one\ntwo\n", ["one", "two"]),
        (b"one\r\ntwo\r\n", ["one", "two"]),
        (b"no end", ["no end"]),
        (b"a\n\nb\n", ["a", "", "b"]),
        (b"\n", [""]),
        (b"\r 10%\r 20%\r 30%\n", [" 10%", " 20%", " 30%"]),
        (b"bar 1\r\rbar 2\n", ["bar 1", "bar 2"]),
        (b"Fetching:  0%|\rlibc++abi: terminating\n", ["Fetching:  0%|", "libc++abi: terminating"]),
        ("é\u2028x\n".encode(), ["é\u2028x"]),
        (b"bad \xff byte\n", ["bad � byte"]),
    ],
)
def test_lines(data: bytes, lines: list[str]) -> None:
    assert split(data) == lines


@given(st.lists(st.sampled_from([b"a", b"bc", b"\r", b"\n", b"\r\n", "é".encode(), b"\xff"]), max_size=30))
def test_the_cuts_do_not_matter(parts: list[bytes]) -> None:
    data = b"".join(parts)
    assert split(*(data[i : i + 1] for i in range(len(data)))) == split(data)


@given(st.binary(max_size=200))
def test_nothing_but_line_ends_and_blank_lines_is_lost(data: bytes) -> None:
    kept = [line.encode() for line in split(data) if line]
    pieces = [piece for piece in re.split(rb"[\r\n]", data) if piece]
    assert kept == [piece.decode("utf-8", errors="replace").encode() for piece in pieces]


@pytest.mark.parametrize("step", [1, 3, 7, 100])
def test_an_endless_line_is_bounded_and_marked(step: int) -> None:
    data = b"x" * 50 + b"\nnext\n"
    pieces = [data[i : i + step] for i in range(0, len(data), step)]
    assert split(*pieces, max_line=10) == ["x" * 10 + CUT_MARK, "next"]
    assert split(b"x" * 10 + b"\n", max_line=10) == ["x" * 10]


def test_memory_stays_bounded_while_no_line_end_comes() -> None:
    splitter = LineSplitter(16)
    for _ in range(1000):
        assert splitter.feed(b"y" * 1000) == []
    assert splitter.flush() == ["y" * 16 + CUT_MARK]


def test_flush_twice_gives_nothing_new() -> None:
    splitter = LineSplitter()
    assert splitter.feed(b"tail") == []
    assert splitter.flush() == ["tail"]
    assert splitter.flush() == []


def test_ring_numbers_go_on_when_old_lines_are_dropped() -> None:
    ring = Ring(max_lines=3)
    assert [ring.append(f"line {n}") for n in range(1, 6)] == [1, 2, 3, 4, 5]
    assert ring.tail(2) == ["line 4", "line 5"]
    assert ring.tail(100) == ["line 3", "line 4", "line 5"]
    assert ring.tail(0) == []
    assert ring.since(0) == [Entry(3, "line 3"), Entry(4, "line 4"), Entry(5, "line 5")]
    assert ring.last_seq == 5


def test_a_follower_resumes_where_it_was_and_sees_a_gap() -> None:
    ring = Ring(max_lines=3)
    for n in range(1, 6):
        ring.append(str(n))
    assert ring.since(4) == [(5, "5")]
    assert ring.since(5) == []
    assert ring.since(99) == []
    assert [seq for seq, _ in ring.since(0)] == [3, 4, 5]


def test_ring_is_bounded_by_bytes() -> None:
    ring = Ring(max_lines=100, max_bytes=10)
    for line in ("aaaa", "bbbb", "cccc"):
        ring.append(line)
    assert ring.tail(10) == ["bbbb", "cccc"]
    ring.append("é" * 50)
    assert ring.tail(10) == ["é" * 50]
    ring.append("d")
    assert ring.tail(10) == ["d"]


@given(st.lists(st.text(max_size=8), max_size=60), st.integers(1, 8), st.integers(0, 70))
def test_since_and_tail_agree(lines: list[str], size: int, seq: int) -> None:
    ring = Ring(max_lines=size)
    for line in lines:
        ring.append(line)
    held = list(enumerate(lines, 1))[-size:]
    assert ring.since(0) == held
    assert ring.since(seq) == [entry for entry in held if entry[0] > seq]
    assert ring.tail(3) == [line for _, line in held[-3:]]


def test_subscribers_hear_of_each_line_until_they_leave() -> None:
    ring = Ring()
    heard: list[int] = []
    leave = ring.subscribe(lambda: heard.append(ring.last_seq))
    ring.append("a")
    ring.append("b")
    leave()
    leave()
    ring.append("c")
    assert heard == [1, 2]


def test_a_backlog_gives_out_what_it_got() -> None:
    backlog = Backlog()
    data = bytes(range(256)) * 40
    for at in range(0, len(data), 3000):
        backlog.put(data[at : at + 3000])
    assert len(backlog) == len(data)
    pieces = []
    while piece := backlog.take():
        assert len(piece) <= SLICE
        pieces.append(piece)
    assert b"".join(pieces) == data
    assert (len(backlog), backlog.dropped) == (0, 0)


def test_a_backlog_loses_its_oldest_part_and_counts_the_lines() -> None:
    backlog = Backlog(max_bytes=1000)
    for n in range(100):
        backlog.put(b"%03d a line\n" % n * 10)
    assert len(backlog) <= 1000
    kept = backlog.take_last(10_000).splitlines()
    assert kept[-1] == b"099 a line"
    assert len(kept) + backlog.dropped == 1000


def test_the_end_of_a_backlog() -> None:
    backlog = Backlog()
    backlog.put(b"".join(b"%d\n" % n for n in range(100)) + b"no end")
    assert backlog.take_last(3) == b"97\n98\n99\nno end"
    assert backlog.dropped == 97
    assert not backlog

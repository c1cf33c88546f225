"""Framing: the same events however the bytes are cut, and nothing without its blank line."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.stream.sse import Event, EventTooLarge, Framer, read

SNOWMAN = 'data: {"t": "\u2603 \u2028 \U0001f600"}\n\n'.encode()  # U+2028 ends a line for text decoders, not here

STREAMS = {
    "mlx": b': keepalive 2048/12010\n\ndata: {"a": 1}\n\n' + SNOWMAN + b"data: [DONE]\n\n",
    "crlf": b"data: one\r\n\r\n: c\r\ndata: two\r\n\r\ndata: [DONE]\r\n\r\n",
    "cr": b"data: one\r\rdata: two\r\revent: error\rdata: x\r\r",
    "mixed": b"data: one\r\n\ndata: two\n\r\ndata: three\r\r\n\n\n\n\ndata: four\n\rdata: five\r\n\r\n\r\n",
    "bom": b"\xef\xbb\xbfdata: one\n\ndata: \xef\xbb\xbftwo\n\n",
    "fields": b"event: error\ndata: a\ndata:b\ndata\ndata:  c\nid: 7\nretry: 5\nodd\n:x\n: y\n\nid: 8\n\n",
    "unfinished": b'data: one\n\ndata: {"cut": "he',
    "almost": b"data: one\n\ndata: two\n",
}


def feed(framer: Framer, data: bytes) -> list[Event]:
    return [read(raw) for raw in framer.feed(data)]


def rest(framer: Framer) -> list[Event]:
    """What was kept of an event that has not ended: a blank line makes it one."""
    return feed(framer, b"\n\n")


def whole(stream: bytes) -> tuple[list[Event], list[Event]]:
    framer = Framer()
    return feed(framer, stream), rest(framer)


def pieces(stream: bytes, cuts: list[int]) -> tuple[list[Event], list[Event]]:
    framer = Framer()
    events: list[Event] = []
    edges = [0, *sorted(cuts), len(stream)]
    for start, stop in pairwise(edges):
        events += feed(framer, stream[start:stop])
    return events, rest(framer)


def test_a_stream_of_mlx_lm_server() -> None:
    events, unfinished = whole(STREAMS["mlx"])
    assert [event.data for event in events] == [None, b'{"a": 1}', SNOWMAN[6:-2], b"[DONE]"]
    assert events[0] == Event(None, b"", b"keepalive 2048/12010")
    assert unfinished == []


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("crlf", [b"one", b"two", b"[DONE]"]),
        ("cr", [b"one", b"two", b"x"]),
        ("mixed", [b"one", b"two", b"three", b"four", b"five"]),
        ("bom", [b"one", b"\xef\xbb\xbftwo"]),
        ("unfinished", [b"one"]),
        ("almost", [b"one"]),
    ],
)
def test_every_line_end_ends_lines(name: str, data: list[bytes]) -> None:
    assert [event.data for event in whole(STREAMS[name])[0]] == data


def test_fields_are_told_apart_and_their_lines_joined() -> None:
    first, second = whole(STREAMS["fields"])[0]
    assert first[:3] == (b"a\nb\n\n c", b"error", b"x\ny")
    assert second == Event(None, b"", None)


def test_what_lacks_its_blank_line_is_no_event() -> None:
    framer = Framer()
    assert feed(framer, b"data: [DONE]\n") == []
    assert feed(framer, b"\n") == [Event(b"[DONE]", b"", None)]
    assert rest(framer) == []


def test_an_event_that_ends_in_cr_does_not_wait_for_more() -> None:
    framer = Framer()
    assert [event.data for event in feed(framer, b"data: x\r\n\r")] == [b"x"]
    assert [event.data for event in feed(framer, b"\ndata: y\r\n\r\n")] == [b"y"]


@pytest.mark.parametrize("name", STREAMS)
def test_every_cut_in_two_and_in_single_bytes_gives_the_same(name: str) -> None:
    stream = STREAMS[name]
    expected = whole(stream)
    for cut in range(len(stream) + 1):
        assert pieces(stream, [cut]) == expected
    assert pieces(stream, list(range(len(stream)))) == expected


@pytest.mark.parametrize("name", ["cr", "mixed", "crlf"])
def test_every_cut_in_three_gives_the_same(name: str) -> None:
    stream = STREAMS[name][:60]
    expected = whole(stream)
    for first in range(len(stream)):
        for second in range(first, len(stream)):
            assert pieces(stream, [first, second]) == expected


TOKENS = st.sampled_from(
    [b"\n", b"\r", b"\r\n", b"data", b":", b" ", b"x", b"event: error", b"\xef\xbb\xbf", b"\xe2\x98"]
)


@given(st.lists(TOKENS, max_size=40).map(b"".join), st.lists(st.integers(0, 120), max_size=6))
def test_events_do_not_depend_on_the_cuts(stream: bytes, cuts: list[int]) -> None:
    inside = [cut for cut in cuts if cut <= len(stream)]
    assert pieces(stream, inside) == whole(stream)


def reference(stream: bytes) -> list[bytes | None]:
    """The algorithm of the standard, line by line over the whole text."""
    lines = stream.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
    out: list[bytes | None] = []
    data: list[bytes] = []
    any_line = False
    for line in lines[:-1]:  # what follows the last line end is no line yet
        if line:
            any_line = True
            name, _, value = line.partition(b":")
            if name == b"data":
                data.append(value.removeprefix(b" "))
        elif any_line:
            out.append(b"\n".join(data) if data else None)
            data, any_line = [], False
    return out


@given(st.lists(TOKENS, max_size=40).map(b"".join))
def test_events_are_those_of_the_standard(stream: bytes) -> None:
    if stream.endswith(b"\r"):
        stream += b"x"  # half a CRLF or a whole CR: open until more comes
    assert [event.data for event in whole(stream)[0]] == reference(stream)


@pytest.mark.parametrize("step", [1, 7, 1000])
def test_too_large_an_event_is_refused_however_it_comes(step: int) -> None:
    stream = b"data: ok\n\n" + b"data: " + b"x" * 60 + b"\n\n"
    framer = Framer(max_event=50)
    events: list[Event] = []
    caught: EventTooLarge | None = None
    for start in range(0, len(stream), step):
        try:
            events += feed(framer, stream[start : start + step])
        except EventTooLarge as exc:
            caught = exc
            break
    assert caught is not None
    assert [event.data for event in events + list(map(read, caught.events))] == [b"ok"]
    with pytest.raises(EventTooLarge):
        feed(framer, b"data: more\n\n")


@pytest.mark.parametrize("step", [1, 7, 1000])
@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n"])
def test_an_event_of_just_the_limit_passes(step: int, end: bytes) -> None:
    event = b"data: " + b"x" * 44
    stream = event + end + event + end
    framer = Framer(max_event=50)
    raws = [raw for start in range(0, len(stream), step) for raw in framer.feed(stream[start : start + step])]
    assert raws == [event, event]

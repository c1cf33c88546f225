"""A bound on the number of values in a body, counted before it is parsed. Pure.

The time that a parser takes grows with the values more than with the bytes: 25 MB of text are parsed in 20 ms, 25 MB of
empty lists took 2.5 s (orjson 3.11, Python 3.11), in one call that nothing can interrupt; and each value is looked at
again. No request that a model could answer has so many. The bound is one for the whole body: JSON within a string, as
the arguments of tool calls are, counts too.
"""

from collections.abc import Iterator

MAX_VALUES = 250_000
LARGE = 256 << 10  # bytes of a body whose text takes about 1 ms
MANY = 4000  # values whose checks take about 2 ms
PIECE = 64 << 10  # bytes looked at in one call, in less than 2 ms


def is_costly(size: int, values: int) -> bool:
    """Whether work on such a body would hold up the event loop. ``size``: bytes; ``values``: or more."""
    return size > LARGE or values > MANY


def is_costly_body(body: bytes) -> bool:
    """The same before parsing. Of a large one nothing is counted: that alone would hold up the event loop."""
    return len(body) > LARGE or most_values(body) > MANY


def most_values(body: bytes) -> int:
    """As many values as ``body`` has at most: what stands in strings counts here."""
    return 1 + _marks(body)


def count_values(body: bytes, most: int = MAX_VALUES) -> int:
    """``body``: JSON in UTF-8; of what is not JSON, anything may be said. Counts no further than a little beyond
    ``most``. Empty containers count twice, and where there are few values, commas and brackets in strings count too."""
    upper = most_values(body)
    if upper <= min(MANY, most):
        return upper
    count, in_string = 1, False
    for piece in _pieces(body):
        parts = piece.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')
        count += _marks(b"".join(parts[in_string::2]))
        if count > most:
            break
        in_string ^= len(parts) % 2 == 0
    return count


def _marks(body: bytes) -> int:
    """Each value but the first of its container follows a comma; the first is counted by what opens the container."""
    return body.count(b",") + body.count(b"[") + body.count(b"{")


def _pieces(body: bytes) -> Iterator[bytes]:
    """No escape is cut in two."""
    at = 0
    while at < len(body):
        piece = body[at : at + PIECE]
        if (len(piece) - len(piece.rstrip(b"\\"))) % 2:
            piece = body[at : at + PIECE + 1]
        yield piece
        at += len(piece)

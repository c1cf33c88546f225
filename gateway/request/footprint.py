"""The memory that a parsed request takes until it is answered. Pure."""

from collections.abc import Mapping
from sys import getsizeof

from gateway.request.values import ParsedRequest

PER_BYTE = 5  # bytes of memory for one of text: four where it holds a character beyond U+FFFF, and one to send it
PER_VALUE = 100  # bytes of memory


def kept_size(parsed: ParsedRequest) -> int:
    """Bytes: of its values, and of the body that is made of them for a backend. Of a small one an upper bound, since to
    look at each value costs more than it is worth."""
    if not parsed.costly:
        return PER_BYTE * parsed.body_size + PER_VALUE * parsed.values
    return parsed.body_size + _memory([parsed.params, *parsed.parts])


def _memory(values: list[object]) -> int:
    size = 0
    while values:
        value = values.pop()
        size += getsizeof(value)
        if isinstance(value, Mapping):
            values += value.keys()
            values += value.values()
        elif isinstance(value, list):
            values += value
    return size

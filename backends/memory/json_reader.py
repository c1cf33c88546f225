"""A large JSON object, read one member at a time.

``json.loads`` of a header of 20 MB is one C call that holds the GIL: even in a thread, it blocks the event loop. Read
member by member, the thread can be interrupted between any two.

Pure: no I/O, no clock.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

_SPACE = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()


class JsonReader:
    """For each name that ``members`` yields, the value must be consumed, by ``value`` or ``members``, before the next
    name. Every method raises ValueError where the text is not what it expects."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0

    def members(self) -> Iterator[str]:
        """The names in the object that begins here. Must be iterated to the end."""
        self._take("{")
        if self._next() == "}":
            self._at += 1
            return
        while True:
            name = self.value()
            if not isinstance(name, str):
                raise ValueError(f"at character {self._at}: expected a name, got {name!r}")  # noqa: TRY004
            self._take(":")
            yield name
            if self._next() == "}":
                self._at += 1
                return
            self._take(",")

    def value(self) -> Any:
        """The complete value that begins here."""
        self._next()
        value, self._at = _DECODER.raw_decode(self._text, self._at)
        return value

    def end(self) -> None:
        """Only white space may be left."""
        if left := self._next():
            raise ValueError(f"at character {self._at}: expected the end, got {left!r}")

    def _next(self) -> str:
        """The next character after white space, not consumed; "" at the end."""
        space = _SPACE.match(self._text, self._at)
        self._at = space.end() if space is not None else self._at
        return self._text[self._at : self._at + 1]

    def _take(self, character: str) -> None:
        if (found := self._next()) != character:
            raise ValueError(f"at character {self._at}: expected {character!r}, got {found!r}")
        self._at += 1

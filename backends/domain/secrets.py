"""The secrets of the config, kept out of texts that others wrote. Pure: no I/O, no clock.

A server may quote the key that it was given in its error, and a process may print one; such a text reaches the log,
``/health`` and the clients. What a model says is not touched: a key like ``ollama`` may be part of any answer.
"""

import re
from collections.abc import Iterable

HIDDEN = "***"
MIN_CHARS = 3  # a shorter key protects nothing, and would be found everywhere


class Secrets:
    def __init__(self, texts: Iterable[str] = ()) -> None:
        longest_first = sorted({text for text in texts if len(text) >= MIN_CHARS}, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    def hide(self, text: str) -> str:
        return text if self._pattern is None else self._pattern.sub(HIDDEN, text)

    def __repr__(self) -> str:
        return "Secrets(…)"


NO_SECRETS = Secrets()

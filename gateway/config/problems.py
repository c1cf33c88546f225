"""Problems of a config, written as repair instructions. Pure.

``ConfigError`` carries every problem of the file, in the order of the lines. Caveat: a config holds API keys. What was
*got* is shown only where the caller knows that it is no key.
"""

import re
from dataclasses import dataclass

KeyPath = tuple[str | int, ...]

_BARE = re.compile(r"[\w./:@+<-]+")
_LONGEST = 80


@dataclass(frozen=True, slots=True)
class Problem:
    """``path`` is dotted, as in ``models.qwen3-4b.urls[1]``; ``line`` counts from 1."""

    file: str
    line: int
    path: str
    expected: str
    got: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.path}: expected {self.expected}, got {self.got}; {self.remedy}"


class ConfigError(Exception):
    """The config has problems; nothing is started with it."""

    def __init__(self, problems: tuple[Problem, ...]) -> None:
        super().__init__("\n".join(map(str, problems)))
        self.problems = problems


class Unfit(Exception):
    """A value that does not fit where it stands. ``got`` is empty where the value itself may be shown."""

    def __init__(self, expected: str, remedy: str, got: str = "") -> None:
        super().__init__(expected)
        self.expected = expected
        self.remedy = remedy
        self.got = got

    def at(self, file: str, line: int, path: KeyPath) -> Problem:
        return Problem(file, line, dotted(path), self.expected, self.got, self.remedy)


def dotted(path: KeyPath) -> str:
    parts = ""
    for step in path:
        if isinstance(step, int):
            parts += f"[{step}]"
        else:
            parts += f".{step if _BARE.fullmatch(step) else show(step)}"
    return parts.lstrip(".") or "(file)"


def show(text: str) -> str:
    """A text from the file in one line of a terminal: control characters and lone surrogates are escaped."""
    return repr(text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…")


def listed(words: tuple[str, ...] | list[str], joint: str = "or") -> str:
    if len(words) < 2:
        return "".join(words)
    return f"{', '.join(words[:-1])} {joint} {words[-1]}"

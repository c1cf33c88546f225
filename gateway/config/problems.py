"""What is wrong with a config, said as a repair instruction. Pure.

A config is judged whole: ``ConfigError`` carries every problem found, in the order of the lines. The awkward bit is
secrets: a config holds keys, so what was *got* is shown only where the caller knows that it cannot be one.
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
    """Nothing may be started with this config."""

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


def dotted(path: KeyPath) -> str:
    parts = ""
    for step in path:
        if isinstance(step, int):
            parts += f"[{step}]"
        else:
            parts += f".{step if _BARE.fullmatch(step) else show(step)}"
    return parts.lstrip(".") or "(file)"


def show(text: str) -> str:
    """A text from the file, fit for one line of a terminal: control characters and lone surrogates are escaped."""
    return repr(text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…")


def listed(words: tuple[str, ...] | list[str], joint: str = "or") -> str:
    if len(words) < 2:
        return "".join(words)
    return f"{', '.join(words[:-1])} {joint} {words[-1]}"

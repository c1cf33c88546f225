r"""Literals of a regex: for each alternative, a text without which it cannot match.

Used to look a line up in the signature table: most rows are ruled out because none of their literals is in the line,
which costs far less than trying each row's pattern. The literals are derived from the patterns, so both always agree.

    r"\[Errno 28\]|[Dd]isk (?:quota|limit) exceeded"    ->    {"[Errno 28]", " exceeded"}

Supports the part of the syntax that the table uses: literals, escapes, classes, groups without capture, look-around,
``?``, ``*``, ``+`` and ``{m,n}``. Other syntax raises ValueError when the table is built.

Pure: no I/O, no clock.
"""

import re
from collections.abc import Iterator

MIN_LITERAL_CHARS = 4

_TOKEN = re.compile(
    r"(?P<open>\((?P<kind>\?(?:[:=!]|<[=!]))?)|(?P<close>\))|(?P<or>\|)|(?P<class>\[\^?\]?(?:\\.|[^\]\\])*\])"
    r"|(?P<repeat>[?*+]|\{(?P<least>\d+)(?P<most>,\d*)?\})|(?P<special>\\[A-Za-z0-9]|[.^$])|\\?(?P<char>.)",
    re.DOTALL,
)
_Texts = frozenset[str]
_NONE: _Texts = frozenset()


def literals(pattern: str) -> frozenset[str]:
    """Any text that the pattern matches contains one of these. Raises ValueError where there is no such set."""
    found = _alternatives(_TOKEN.finditer(pattern))
    if not found:
        raise ValueError(f"an alternative without {MIN_LITERAL_CHARS} literal characters in a row: {pattern!r}")
    return found


def _alternatives(tokens: Iterator[re.Match[str]]) -> _Texts:
    """Consumes tokens up to the closing parenthesis of this group, or the end. Empty: an alternative has no literal."""
    branch = _Branch()
    branches = [branch]
    for token in tokens:
        if token["close"]:
            break
        if token["or"]:
            branches.append(branch := _Branch())
        elif token["open"]:
            branch.group(token["kind"], tokens)
        else:
            branch.take(token)
    found = [branch.best() for branch in branches]
    return frozenset[str]().union(*found) if all(found) else _NONE


class _Branch:
    """One alternative. ``_required``: sets of texts; one text of each set has to occur."""

    def __init__(self) -> None:
        self._required: list[_Texts] = []
        self._run = ""  # literal characters in a row
        self._after_group = False  # the last set of ``_required`` is from a group, which a ``?`` may make optional

    def take(self, token: re.Match[str]) -> None:
        if token["char"]:
            self._run += token["char"]
            self._after_group = False
        elif token["repeat"]:
            self._repeat(token)
        else:  # a class, or an assertion
            self._end_run()

    def group(self, kind: str | None, tokens: Iterator[re.Match[str]]) -> None:
        if kind is None:
            raise ValueError("a group that captures, or has flags; write (?:…)")
        self._end_run()
        texts = _alternatives(tokens)
        if texts and kind == "?:":  # the text in a look-around is no part of the match
            self._required.append(texts)
            self._after_group = True

    def best(self) -> _Texts:
        """The set whose shortest text is the longest."""
        self._end_run()
        return max(self._required, key=lambda texts: min(map(len, texts)), default=_NONE)

    def _repeat(self, token: re.Match[str]) -> None:
        least = int(token["least"]) if token["least"] else int(token["repeat"] == "+")
        if least and not token["most"] and token["least"] and self._run:
            self._run += self._run[-1] * (least - 1)
            return
        if not least and self._after_group:
            self._required.pop()
        elif not least:
            self._run = self._run[:-1]
        self._end_run()

    def _end_run(self) -> None:
        if len(self._run) >= MIN_LITERAL_CHARS:
            self._required.append(frozenset({self._run}))
        self._run = ""
        self._after_group = False

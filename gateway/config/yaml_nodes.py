"""YAML text → a tree of values with their lines, environment variables filled in.

The tree is made from PyYAML's *nodes*, never from loaded objects: loading silently keeps the last of two equal keys,
loses the lines, and turns ``no`` into False. Merge keys and aliases are resolved here. Caveat: an alias may contain
itself, or double the size at each level; the depth and the number of values are bounded.
"""

from collections.abc import Mapping as Environment
from dataclasses import dataclass

import yaml
from yaml.resolver import Resolver

from gateway.config.parsers import is_unicode, number, substitute
from gateway.config.problems import KeyPath, Problem, Unfit, show

MERGE_TAG = "tag:yaml.org,2002:merge"
_NULLS = frozenset({"", "~", "null", "Null", "NULL"})
_BOOLEANS = {
    spelling: value
    for words, value in (("true yes on", True), ("false no off", False))
    for word in words.split()
    for spelling in (word, word.capitalize(), word.upper())
}
_MAX_VALUES = 100_000
_MAX_DEPTH = 64


@dataclass(frozen=True, slots=True)
class Scalar:
    """``text`` after substitution, ``source`` before it; ``quoted`` covers block texts (``|``, ``>``) too."""

    line: int
    text: str
    source: str
    quoted: bool
    broken: bool = False  # could not be read; the problem is reported already

    @property
    def substituted(self) -> bool:
        return self.text != self.source

    @property
    def is_null(self) -> bool:
        return not self.quoted and self.text in _NULLS and not (self.text == "" and self.substituted)

    @property
    def boolean(self) -> bool | None:
        """The boolean that YAML 1.1 reads, yes, no, on and off included; None for other texts."""
        return _BOOLEANS.get(self.text) if self.substituted or not self.quoted else None

    @property
    def number(self) -> int | float | None:
        return number(self.text) if self.substituted or not self.quoted else None


@dataclass(frozen=True, slots=True)
class Listing:
    line: int
    items: "tuple[Value, ...]"


@dataclass(frozen=True, slots=True)
class Entry:
    key: str
    line: int
    value: "Value"


@dataclass(frozen=True, slots=True)
class Mapping:
    line: int
    entries: tuple[Entry, ...]


Value = Scalar | Listing | Mapping


class _TooMuch(Exception):
    pass


def read(text: str, filename: str, environ: Environment[str, str]) -> tuple[Value | None, tuple[Problem, ...]]:
    """The tree, as far as it could be read, and the problems. None for an empty file, for example."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        return None, (_syntax_problem(error, filename),)
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        got = f"the character U+{ord(text[error.position]):04X}" if error.position < len(text) else "something else"
        return None, (Problem(filename, line, "(file)", "YAML", got, "remove the character, or escape it in quotes"),)
    except RecursionError:
        return None, (_nesting_problem(filename),)
    except (ValueError, OverflowError) as error:  # escapes and %YAML versions beyond what int() and chr() take
        remedy = "correct the escape or the directive"
        return None, (Problem(filename, 1, "(file)", "YAML", f"something unreadable ({error})", remedy),)
    if node is None:
        return None, ()
    reader = _Reader(filename, environ)
    try:
        return reader.read(node, ()), tuple(reader.problems)
    except _TooMuch:
        return None, (_nesting_problem(filename),)


def _nesting_problem(filename: str) -> Problem:
    expected = f"at most {_MAX_DEPTH} levels and {_MAX_VALUES} values"
    return Problem(filename, 1, "(file)", expected, "more", "flatten it, or use fewer aliases")


def _syntax_problem(error: yaml.MarkedYAMLError, filename: str) -> Problem:
    mark = error.problem_mark or error.context_mark
    got = ", ".join(part for part in (error.context, error.problem) if part) or "a syntax error"
    remedy = "correct the syntax there or just above"
    if "'\\t'" in got:
        remedy = "indent with spaces, not with tabs"
    elif "mapping values are not allowed" in got:
        remedy = "put a text that holds a colon and a space into quotes, or correct the indentation"
    elif "but got '{'" in got:
        remedy = "correct the syntax; within { } and [ ] a ${…} has to be in quotes"
    elif "single document" in got:
        remedy = "keep one document: remove the --- line and what does not belong"
    return Problem(filename, mark.line + 1 if mark else 1, "(file)", "YAML", " ".join(got.split()), remedy)


class _Reader:
    def __init__(self, filename: str, environ: Environment[str, str]) -> None:
        self.problems: list[Problem] = []
        self._filename = filename
        self._environ = environ
        self._open: set[int] = set()
        self._count = 0
        self._resolver = Resolver()

    def read(self, node: yaml.Node, path: KeyPath) -> Value:
        self._count += 1
        if self._count > _MAX_VALUES or len(self._open) > _MAX_DEPTH:
            raise _TooMuch
        line = node.start_mark.line + 1
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, path)
        if id(node) in self._open:
            self._report(line, path, Unfit("a value", "remove the alias", "an alias of a value that it is part of"))
            return Scalar(line, "", "", quoted=True, broken=True)
        self._check_tag(node, path)
        self._open.add(id(node))
        try:
            if isinstance(node, yaml.SequenceNode):
                items = tuple(self.read(item, (*path, index)) for index, item in enumerate(node.value))
                return Listing(line, items)
            return Mapping(line, self._entries(node.value, path))
        finally:
            self._open.discard(id(node))

    def _scalar(self, node: yaml.ScalarNode, path: KeyPath) -> Scalar:
        line = node.start_mark.line + 1
        quoted = node.style is not None
        source: str = node.value
        self._check_tag(node, path)
        try:
            return Scalar(line, substitute(source, self._environ), source, quoted)
        except Unfit as unfit:
            self._report(line, path, unfit)
            return Scalar(line, source, source, quoted, broken=True)

    def _entries(self, pairs: list[tuple[yaml.Node, yaml.Node]], path: KeyPath) -> tuple[Entry, ...]:
        own: dict[str, Entry] = {}
        merged: list[yaml.Node] = []
        merge_line = 0
        for key_node, value_node in pairs:
            line = key_node.start_mark.line + 1
            key = self._key(key_node, path)
            if key is None:
                continue
            is_merge = key_node.tag == MERGE_TAG
            first = own[key].line if key in own else merge_line if is_merge and merge_line else 0
            if first:
                remedy = "remove one of the two"
                got = f"it on line {first} and again here"
                self._report(line, (*path, key), Unfit("each key once", remedy, got))
            elif is_merge:
                merge_line = line
                merged = value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
            else:
                own[key] = Entry(key, line, self.read(value_node, (*path, key)))
        for source in merged:
            for entry in self._merged(source, path):
                own.setdefault(entry.key, entry)
        return tuple(own.values())

    def _merged(self, node: yaml.Node, path: KeyPath) -> tuple[Entry, ...]:
        value = self.read(node, path)
        if isinstance(value, Mapping):
            return value.entries
        if not (isinstance(value, Scalar) and value.broken):
            unfit = Unfit("a mapping, or a list of them", "merge an alias of a mapping: <<: *name", "something else")
            self._report(value.line, (*path, "<<"), unfit)
        return ()

    def _key(self, node: yaml.Node, path: KeyPath) -> str | None:
        """The text of a key; None after a problem was reported."""
        line = node.start_mark.line + 1
        if not isinstance(node, yaml.ScalarNode):
            remedy = "put it into quotes if a text was meant"
            self._report(line, path, Unfit("a text as key", remedy, "a list or a mapping as key"))
            return None
        text: str = node.value
        plain = Scalar(line, text, text, quoted=node.style is not None)
        self._check_tag(node, path)
        if plain.boolean is not None or plain.is_null:
            kind = "null" if plain.is_null else f"the boolean {str(plain.boolean).lower()}"
            remedy = f'put it into quotes: "{text}"'
            self._report(line, path, Unfit("a text as key", remedy, f"{text or 'nothing'}, which YAML reads as {kind}"))
            return None
        if "${" in text:
            remedy = "write the key out: variables are filled into values only"
            self._report(line, path, Unfit("a key without variables", remedy, show(text)))
            return None
        if not is_unicode(text):
            remedy = "take out NUL characters and lone surrogates"
            self._report(line, path, Unfit("a key of Unicode characters", remedy, show(text)))
            return None
        return text

    def _check_tag(self, node: yaml.Node, path: KeyPath) -> None:
        """Refuses a tag that is written out. Nodes hold only the resolved tag, so it is resolved again and compared."""
        plain = getattr(node, "style", None) is None
        implied = self._resolver.resolve(type(node), node.value, (plain, not plain))  # type: ignore[no-untyped-call]
        if node.tag != implied:
            tag = node.tag.replace("tag:yaml.org,2002:", "!!")
            unfit = Unfit("a value without a tag", "remove the tag; quotes make a text of anything", show(tag))
            self._report(node.start_mark.line + 1, path, unfit)

    def _report(self, line: int, path: KeyPath, unfit: Unfit) -> None:
        self.problems.append(unfit.at(self._filename, line, path))

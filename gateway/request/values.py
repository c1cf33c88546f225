"""The values of request parsing: its rules, its result, how it refuses, and its notes on what it changed.

Caveat: names of unknown fields come from the client and end up in a response header, so ``Notes`` lets only
harmless ones through, and not many.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gateway.api.errors import Code, GatewayError, RequestError
from gateway.api.kinds import Kind
from gateway.request.size import is_costly

MAX_DEPTH = 64  # nesting; Python's json, deepcopy and Jinja recurse on the other side
MAX_NOTES = 32
MENDED_AT_ONCE = 1 << 20  # characters; a regular expression is a call that nothing can interrupt, here of about 20 ms


# What an operator can let clients do (``request.allow``): have files loaded, replace the template, set its effort.
ALLOWABLE = ("adapters", "draft_model", "role_mapping", "chat_template", "reasoning_effort")


@dataclass(frozen=True, slots=True)
class Rules:
    """What this gateway lets through beyond the safe default.

    ``vocab_size`` is the width of the model's logits; with None the bounds that hold for every model are used (see
    ``fit_vocab``), or, with ``defer_vocab``, none yet: then the caller owes a ``fit_vocab`` before it sends.
    """

    max_tokens: int = 1_000_000  # more is clamped: no context is longer, and 10**30 would run for ever
    vocab_size: int | None = None
    defer_vocab: bool = False
    allow: frozenset[str] = frozenset()  # of ``ALLOWABLE``


DEFAULT_RULES = Rules()


@dataclass(frozen=True, slots=True)
class ParsedRequest:
    """A request that passed. ``params``: what to send but model, stream and stream_options; not to be changed."""

    kind: Kind
    model: str  # as the client named it; "" = it named none
    stream: bool
    include_usage: bool
    wants_logprobs: bool
    params: dict[str, Any]
    normalized: tuple[str, ...]  # fields that were changed or dropped
    warnings: tuple[str, ...]  # sentences: what the client asked for and will not get
    max_tokens: int | None
    prompt_chars: int
    cache_key: str = ""  # as the client named what its prompts begin with (prompt_cache_key)
    parts: tuple[Mapping[str, Any], ...] = ()  # where it is several requests: what each changes in ``params``
    copies: int = 1  # parts with the same prompt, one after the other
    body_size: int = 0  # bytes, as it came, decompressed
    values: int = 0  # in the body, and in JSON within its strings; or more

    @property
    def costly(self) -> bool:
        """Work whose cost grows with the body is for a thread."""
        return is_costly(self.body_size, self.values)


def show(value: object) -> str:
    """Type and a short form of what was got, for an error message."""
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case dict():
            return f"an object of {len(value)} keys"
        case list():
            return f"a list of {len(value)}"
        case str():
            text = json.dumps(value[:60])
            return f"the string {text}" + ("…" if len(value) > 60 else "")
        case _:
            text = str(value)
            return f"the number {text[:40]}" + ("…" if len(text) > 40 else "")


def refuse(param: str, message: str) -> RequestError:
    return RequestError(GatewayError(code=Code.INVALID_REQUEST, message=message, param=param))


def bad(param: str, expected: str, got: object, remedy: str = "") -> RequestError:
    tail = f"; {remedy}" if remedy else ""
    return refuse(param, f"{param}: expected {expected}, got {show(got)}{tail}")


_SURROGATE = re.compile("[\ud800-\udfff]")
_PRINTABLE_NAME = re.compile(r"[A-Za-z0-9_.\-]{1,48}")


@dataclass(slots=True)
class Notes:
    """Collects, in order and without repeats, what was changed on the way. ``values``: how many were parsed."""

    normalized: dict[str, None] = field(default_factory=dict)
    warnings: dict[str, None] = field(default_factory=dict)
    values: int = 0

    def changed(self, name: str) -> None:
        safe = name if _PRINTABLE_NAME.fullmatch(name) else "unprintable-name"
        if len(self.normalized) < MAX_NOTES:
            self.normalized[safe] = None

    def warn(self, name: str, sentence: str) -> None:
        self.changed(name)
        self.warnings[f"{name}: {sentence}"] = None


def check_tree(param: str, value: object) -> None:
    """Refuse what is nested too deep, numbers that are not finite, and text that is not Unicode. How many values there
    are is bounded before parsing (``request.size``)."""
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise refuse(param, f"{param}: nested deeper than {MAX_DEPTH} levels; flatten it")
        level = [child for node in level for child in _children(param, node)]


def _children(param: str, node: object) -> list[object]:
    match node:
        case str():
            text(param, node)
        case dict():
            for key in node:
                text(param, key)
            return list(node.values())
        case list():
            return node
        case float() if not math.isfinite(node):
            raise bad(param, "finite numbers", node)
        case int() if abs(node) >= 2**64:
            raise bad(param, "numbers of at most 64 bits", node)
    return []


def text(param: str, value: object, expected: str = "a string") -> str:
    """``value`` as text that UTF-8 can carry: a lone surrogate makes the tokenizer of the backend raise."""
    if not isinstance(value, str):
        raise bad(param, expected, value)
    if _cut(value):
        raise refuse(
            param, f"{param}: half of a surrogate pair in the text (an emoji cut in two?); send whole characters"
        )
    return value


def prose(param: str, value: object, notes: Notes, expected: str = "a string") -> str:
    """As ``text``, but half an emoji becomes U+FFFD: JavaScript clients cut text there and cannot mend it later."""
    if not isinstance(value, str):
        return text(param, value, expected)
    if not _cut(value):
        return value
    notes.changed(param.partition("[")[0])
    pieces = (value[at : at + MENDED_AT_ONCE] for at in range(0, len(value), MENDED_AT_ONCE))
    return "".join([_SURROGATE.sub("\ufffd", piece) for piece in pieces])


def _cut(value: str) -> bool:
    """Whether there is half an emoji in it. To encode it takes less than half the time of a regular expression."""
    if value.isascii():
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return True
    return False


def inner(param: str, key: str) -> str:
    """The name of a member, if the client chose one that can be shown."""
    return f"{param}.{key}" if _PRINTABLE_NAME.fullmatch(key) else param

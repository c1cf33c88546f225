"""Parts of the installed mlx-lm, run on their own: without mlx, whose import takes seconds."""

import ast
import copy
import typing
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from backends.instrument.engine_source import installed, source_of
from backends.instrument.instrument import FIXES

CACHE, SERVER = "models/cache.py", "server.py"
NAMES: Mapping[str, Any] = {**vars(typing), "copy": copy, "deque": deque, "dataclass": dataclass}


def module(file: str, wanted: set[str], **names: Any) -> dict[str, Any]:
    """The top-level functions and classes ``wanted`` of ``file``, run with ``names`` in place of its imports."""
    package = installed()
    assert package is not None
    tree = ast.parse((package / file).read_text())
    tree.body = [node for node in tree.body if getattr(node, "name", None) in wanted]
    assert {getattr(node, "name", None) for node in tree.body} == wanted
    scope = {**NAMES, **names}
    exec(compile(tree, file, "exec"), scope)  # noqa: S102 - the installed engine's own source
    return scope


def method(file: str, name: str, scope: dict[str, Any]) -> Callable[..., Any]:
    """``Class.method`` of ``file`` alone, in ``scope``."""
    package = installed()
    assert package is not None
    lines = source_of((package / file).read_text(), name).splitlines(keepends=True)
    margin = len(lines[0]) - len(lines[0].lstrip())
    exec("".join(line[margin:] if line.strip() else line for line in lines), scope)  # noqa: S102 - the same
    found: Callable[..., Any] = scope[name.rpartition(".")[2]]
    return found


def fixed(title: str, original: Callable[..., Any]) -> Callable[..., Any]:
    (fix,) = (fix for fix in FIXES if fix.title == title)
    replacement: Callable[..., Any] = fix.replace(original)
    return replacement


@dataclass
class FakeCache:
    """A layer's cache that holds ``offset`` tokens."""

    offset: int
    trimmable: bool = True
    nbytes: int = 1

    def is_trimmable(self) -> bool:
        return self.trimmable

    def trim(self, count: int) -> int:
        assert 0 <= count <= self.offset
        self.offset -= count
        return count


def cache_module() -> SimpleNamespace:
    wanted = {"PromptTrieResult", "PromptTrie", "LRUPromptCache", "can_trim_prompt_cache", "trim_prompt_cache"}
    return SimpleNamespace(**{name: value for name, value in module(CACHE, wanted).items() if name in wanted})


@dataclass
class FakeTokenizer:
    """A token per message, its number; then the tail of ``tail`` tokens, which opens a thought."""

    tail: int
    has_thinking: bool = True
    has_chat_template: bool = True
    has_tool_calling: bool = True
    response_initial_state: str | None = None
    opening: int = 99
    seen: list[Any] = field(default_factory=list)

    def encode(self, text: str) -> list[int]:
        return [*text.encode()]

    def apply_chat_template(self, messages: list[Any], *, add_generation_prompt: bool, **_: Any) -> list[int]:
        said = [100 + i for i, message in enumerate(messages) for _ in range(1 + len(message["content"]))]
        tail = [self.opening, *range(1, self.tail)] if self.tail else []
        return said + ([7, *tail] if add_generation_prompt else [])

    def rfind_think_start(self, tokens: list[int], start: int = 0) -> int:
        at = [i for i in range(max(0, start), len(tokens)) if tokens[i] == self.opening]
        return at[-1] if at else -1

    def rfind_think_end(self, tokens: list[int]) -> int:
        return -1

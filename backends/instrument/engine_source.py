"""Which engine fixes fit the installed mlx-lm, whose source is read: to import it takes seconds, and a GPU."""

import ast
import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

from backends.instrument.instrument import FIXES, Fix, digest

T = TypeVar("T", ast.ClassDef, ast.FunctionDef)


def installed() -> Path | None:
    """The folder of the package mlx_lm of this interpreter; None = there is none."""
    spec = importlib.util.find_spec("mlx_lm")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def unfit(package: Path, fixes: Iterable[Fix] = FIXES) -> tuple[str, ...]:
    """Titles of the fixes that are not applied there, since the source differs. Raises OSError."""
    return tuple(fix.title for fix in fixes if digest(_source(package, fix)) not in fix.sources)


def _source(package: Path, fix: Fix) -> str:
    file = package.joinpath(*fix.module.split(".")[1:]).with_suffix(".py")
    try:
        return source_of(file.read_text(encoding="utf-8"), fix.name)
    except (SyntaxError, ValueError, LookupError):
        return ""


def source_of(module: str, name: str) -> str:
    """The lines of ``Class.method`` in the text of a module, as ``inspect.getsource`` returns them. Raises LookupError
    where there is none, ValueError and SyntaxError."""
    title, method = name.split(".")
    found = _last(_last(ast.parse(module), ast.ClassDef, title), ast.FunctionDef, method)
    first = min([found.lineno, *(decorator.lineno for decorator in found.decorator_list)])
    return "".join(module.splitlines(keepends=True)[first - 1 : found.end_lineno])


def _last(body: ast.Module | ast.ClassDef, kind: type[T], name: str) -> T:
    """What ``name`` is after ``body`` was run. Raises LookupError."""
    for part in reversed(body.body):
        if isinstance(part, kind) and part.name == name:
            return part
    raise LookupError(name)

"""File or text → ``Config``, or every problem at once. The only module of the package that touches the file system.

Reader, conversion and checks run one after the other; problems of one do not stop the next, unless there is no tree at
all. Relative paths are relative to the folder of the config file.
"""

import os.path
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gateway.config import build, mlx_flags, schema, yaml_nodes
from gateway.config.checks import Checks
from gateway.config.convert import At, Converter
from gateway.config.problems import ConfigError, Problem
from gateway.config.settings import Config

_EXAMPLE = "write at least models: {NAME: {model: …}}"


def load(path: Path, environ: Mapping[str, str]) -> Config:
    """The config in a file. Raises ``ConfigError`` for every problem, a file that cannot be read included."""
    return _Parser(str(path), environ, path).parse(_text(path))


def parse(text: str, filename: str, environ: Mapping[str, str]) -> Config:
    """The config in a text. ``filename`` is for messages, its folder for relative paths; nothing is read."""
    return _Parser(filename, environ, None).parse(text)


def _text(path: Path) -> str:
    def failure(got: str, remedy: str, line: int = 1) -> ConfigError:
        return ConfigError((Problem(str(path), line, "(file)", "a config in YAML, encoded as UTF-8", got, remedy),))

    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise failure("no such file", "create it, or name another one") from None
    except IsADirectoryError:
        raise failure("a directory", f"name the file in it, like {path / 'config.yaml'}") from None
    except PermissionError:
        raise failure("a file that may not be read", "allow this user to read it (chmod u+r)") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise failure(f"an error ({error})", "name a file that can be read") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise failure(f"the byte 0x{data[error.start]:02x}", "save the file as UTF-8", line) from None


class _Parser:
    def __init__(self, filename: str, environ: Mapping[str, str], path: Path | None) -> None:
        self._filename = filename
        self._environ = environ
        self._path = path
        self._base = _folder(filename)
        self._notes: list[str] = []

    def parse(self, text: str) -> Config:
        tree, problems = yaml_nodes.read(text, self._filename, self._environ)
        if tree is None and problems:
            raise ConfigError(problems)
        if tree is None or (isinstance(tree, yaml_nodes.Scalar) and tree.is_null):
            raise ConfigError((Problem(self._filename, 1, "(file)", "a config", "an empty file", _EXAMPLE),))
        seen = Converter(self._filename)
        found = seen.convert(schema.TOP, tree, At((), tree.line))
        if not isinstance(found, dict):
            raise ConfigError((*problems, *seen.problems))
        inherited = found.get("defaults", {})
        models = found.get("models", {})
        values = {
            name: build.model_values(name, build.source(name, seen.lines), inherited, own)
            for name, own in models.items()
        }
        checked = Checks(seen, found, values).run()
        if everything := sorted([*problems, *seen.problems, *checked], key=lambda problem: problem.line):
            raise ConfigError(tuple(everything))
        return self._config(seen, found, values)

    def _config(self, seen: Converter, found: dict[str, Any], values: dict[str, dict[str, Any]]) -> Config:
        canonical = {alias: name for name, each in values.items() for alias in (name, *each["aliases"])}
        models = []
        for name, each in values.items():
            each["fallbacks"] = tuple(dict.fromkeys(canonical[alias] for alias in each["fallbacks"]))
            model = build.model(name, self._with_paths(name, each, seen), seen.lines["models", name])
            models.append(model)
        server, memory = build.server(found.get("server", {})), build.memory(found.get("memory", {}))
        return Config(server, memory, tuple(models), self._path, tuple(self._notes), frozenset(seen.secret_variables))

    def _with_paths(self, name: str, values: dict[str, Any], seen: Converter) -> dict[str, Any]:
        """With absolute paths of files and folders: a backend may run in another folder."""
        args = dict(values["server_args"])
        for flag in mlx_flags.PATHS:
            if args.get(flag) is not None:
                args[flag] = self._absolute(args[flag])
        for flag in mlx_flags.MAYBE_PATHS:
            if args.get(flag) is not None and self._is_local(args[flag]):
                args[flag] = self._absolute(args[flag])
        model = values["model"]
        if not values["command"] and not values["urls"] and self._is_local(model):
            model = self._absolute(model)
            if self._path is not None and not _exists(model):
                line = seen.lines["models", name, "model"]
                self._notes.append(f"{self._filename}:{line}: models.{name}.model: there is no {model} yet")
        return {**values, "model": model, "server_args": args}

    def _is_local(self, text: str) -> bool:
        if text.startswith(("./", "../", "/", "~")) or text in {".", ".."}:
            return True
        return self._path is not None and _exists(self._absolute(text))

    def _absolute(self, text: str) -> str:
        home = self._environ.get("HOME") or os.path.expanduser("~")  # noqa: PTH111 - does not raise
        expanded = home + text[1:] if text == "~" or text.startswith("~/") else text
        return os.path.normpath(os.path.join(self._base, expanded))  # noqa: PTH118 - normpath takes texts


def _folder(filename: str) -> str:
    if "\0" in filename:  # abspath would raise
        return os.path.abspath(".")  # noqa: PTH100
    return os.path.dirname(os.path.abspath(filename))  # noqa: PTH100, PTH120 - pathlib keeps "..", or follows links


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except (OSError, ValueError):  # too long for a file name, or no permission
        return False

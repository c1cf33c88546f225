"""Checks across keys: sources, names, fallbacks, ports, and keys that depend on each other. Pure.

A check reports nothing where one of its own values is already reported as wrong.
"""

from collections.abc import Iterator
from itertools import count, takewhile
from typing import Any

from gateway.config import build, schema
from gateway.config.convert import Converter
from gateway.config.parsers import is_loopback, nearest
from gateway.config.problems import KeyPath, Problem, Unfit, show
from gateway.request import ALLOWABLE, Rules, operator_problems

Given = dict[str, Any]

_SOURCES = ("model", "command", "urls")
_OPERATOR = Rules(allow=frozenset(ALLOWABLE))  # what clients may not send, the operator may
_MODEL_KEYS = frozenset(field.key for field in schema.MODEL.fields)


class Checks:
    """``found`` holds what the file says; ``values`` holds each model with its defaults filled in, by name."""

    def __init__(self, seen: Converter, found: Given, values: dict[str, Given]) -> None:
        self.problems: list[Problem] = []
        self._seen = seen
        self._server = build.fill(schema.SERVER, found.get("server", {}))
        self._own: dict[str, Given] = found.get("models", {})
        self._defaults: Given = found.get("defaults", {})
        self._values = values
        self._names = [str(path[1]) for path in seen.lines if len(path) == 2 and path[0] == "models"]

    def run(self) -> list[Problem]:
        self._check_models()
        self._check_server()
        canonical = self._check_names()
        self._check_fallbacks(("defaults",), self._defaults, canonical)
        for name in self._own:
            self._check_source(name)
            self._check_urls(name)
            self._check_fallbacks(("models", name), self._own[name], canonical)
            self._check_restart(name)
            self._check_request(name)
        self._check_ports()
        return self.problems

    def _report(self, path: KeyPath, unfit: Unfit) -> None:
        line = next((self._seen.lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in self._seen.lines), 1)
        problem = unfit.at(self._seen.filename, line, path)
        if problem not in self.problems:  # a value of defaults: is checked once for each model
            self.problems.append(problem)

    def _has(self, *path: str | int) -> bool:
        return path in self._seen.lines

    def _is_bad(self, *path: str | int) -> bool:
        """Whether the value, or a section or list that holds it, could not be read."""
        return any(path[:length] in self._seen.bad for length in range(1, len(path) + 1))

    def _origin(self, name: str, *keys: str) -> KeyPath:
        """The path at which the value of a model's key is written."""
        return next(
            (path for path in (("models", name, *keys), ("defaults", *keys)) if self._has(*path)), ("models", name)
        )

    def _check_models(self) -> None:
        if not self._names and not self._is_bad("models"):
            remedy = "add one, as in models: {qwen3-4b: {model: mlx-community/Qwen3-4B-4bit}}"
            self._report(("models",), Unfit("at least one model", remedy, "none"))

    def _check_server(self) -> None:
        host, origins = self._server["host"], self._server["cors_origins"]
        unguarded = not is_loopback(host) and not self._server["api_keys"]
        if unguarded and not self._is_bad("server", "host") and not self._is_bad("server", "api_keys"):
            path: KeyPath = ("server", "api_keys") if self._has("server", "api_keys") else ("server", "host")
            remedy = "add keys to server.api_keys, or listen on 127.0.0.1"
            self._report(path, Unfit("api_keys when host is not loopback", remedy, f"host {host} and no keys"))
        if "*" in origins and len(origins) > 1:
            unfit = Unfit('exact origins, or ["*"] alone', 'remove "*", or everything else', "both")
            self._report(("server", "cors_origins"), unfit)

    def _check_names(self) -> dict[str, str]:
        """Every name and alias → the name of its model."""
        owners: dict[str, tuple[str, KeyPath]] = {name: (name, ("models", name)) for name in self._names}
        for name, own in self._own.items():
            for index, alias in self._items(("models", name, "aliases"), own.get("aliases", ())):
                path = ("models", name, "aliases", index)
                if alias in owners:
                    owner, first = owners[alias]
                    what = "the name of a model" if len(first) == 2 else f"an alias of {owner}"
                    got = f"{show(alias)}, which is {what} on line {self._seen.lines[first]}"
                    self._report(path, Unfit("names and aliases that are used once", "choose another alias", got))
                else:
                    owners[alias] = (name, path)
        return {alias: owner for alias, (owner, _) in owners.items()}

    def _items(self, path: KeyPath, items: tuple[Any, ...]) -> Iterator[tuple[int, Any]]:
        """Items with their index in the file; ``items`` lacks the wrong ones."""
        written = takewhile(lambda index: (*path, index) in self._seen.lines, count())
        return zip((index for index in written if (*path, index) not in self._seen.bad), items, strict=True)

    def _check_fallbacks(self, path: KeyPath, own: Given, canonical: dict[str, str]) -> None:
        for index, each in self._items((*path, "fallbacks"), own.get("fallbacks", ())):
            place = (*path, "fallbacks", index)
            if each not in canonical:
                near = nearest(each, list(canonical))
                remedy = f'did you mean "{near}"?' if near else "add that model, or remove it here"
                self._report(place, Unfit("the name of a model of this file", remedy, show(each)))
            elif canonical[each] == path[-1]:
                unfit = Unfit("another model", "remove it: a model cannot stand in for itself", show(each))
                self._report(place, unfit)

    def _check_source(self, name: str) -> None:
        lines = {key: self._seen.lines.get(("models", name, key), 0) for key in _SOURCES}
        if lines["command"] and lines["urls"]:
            later = max(("command", "urls"), key=lines.__getitem__)
            got = f"command on line {lines['command']} and urls on line {lines['urls']}"
            unfit = Unfit("one source: model, command or urls", "remove one of the two", got)
            self._report(("models", name, later), unfit)
        elif not any(lines.values()) and not self._misspelt_source(name):
            remedy = "add model: with a hub name or a folder"
            self._report(("models", name), Unfit("a source: model, command or urls", remedy, "none"))
        source = build.source(name, self._seen.lines)
        for key, remedy in build.FOREIGN[source].items():
            if self._has("models", name, key):
                unfit = Unfit(f"keys that go with {source}", remedy, key)
                self._report(("models", name, key), unfit)
        command = self._own[name].get("command")
        if command and not self._is_bad("models", name, "command") and not any("{port}" in part for part in command):
            remedy = 'add it where the server takes its port, as in [--port, "{port}"]'
            self._report(("models", name, "command"), Unfit("a command that holds {port}", remedy, "none"))
        if command and not command[0]:
            remedy = "name the program that is to be started"
            self._report(("models", name, "command"), Unfit("a program as its first text", remedy, "an empty text"))

    def _misspelt_source(self, name: str) -> bool:
        unknown = [str(p[2]) for p in self._seen.bad if p[:2] == ("models", name) and len(p) == 3]
        return any(key not in _MODEL_KEYS and nearest(key, list(_SOURCES)) for key in unknown)

    def _check_urls(self, name: str) -> None:
        first: dict[str, int] = {}
        for index, url in self._items(("models", name, "urls"), self._own[name].get("urls", ())):
            path = ("models", name, "urls", index)
            if url in first:
                got = f"{url}, which is already on line {first[url]}"
                self._report(path, Unfit("each URL once", "remove one of the two", got))
            first.setdefault(url, self._seen.lines[path])

    def _check_restart(self, name: str) -> None:
        keys, places = ("min_backoff", "max_backoff"), (("models", name), ("defaults",))
        restart = self._values[name]["restart"]
        is_bad = any(self._is_bad(*place, "restart", key) for place in places for key in keys)
        if restart["min_backoff"] > restart["max_backoff"] and not is_bad:
            got = f"min_backoff {restart['min_backoff']:g}s and max_backoff {restart['max_backoff']:g}s"
            remedy = "raise max_backoff, or lower min_backoff"
            paths = [self._origin(name, "restart", key) for key in keys]
            path = max(paths, key=lambda p: (len(p) > 2, p[0] == "models"))
            self._report(path, Unfit("min_backoff of at most max_backoff", remedy, got))

    def _check_request(self, name: str) -> None:
        """What the operator adds to requests is held to the bounds of clients: each request would be refused for it."""
        for section in ("defaults", "force"):
            for key, value in self._values[name]["request"][section].items():
                path = self._origin(name, "request", section, key)
                if value is None or self._is_bad(*path):
                    continue
                for problem in operator_problems({key: value}, _OPERATOR):
                    self._report(path, _of_request(problem))

    def _check_ports(self) -> None:
        taken = {}
        if not self._is_bad("server", "port"):
            taken[self._server["port"]] = "the gateway itself"
        for name, values in self._values.items():
            port = values["server_args"].get("port")
            if port is None:
                continue
            path = self._origin(name, "server_args", "port")
            if values["replicas"] != 1 and not self._is_bad("models", name, "replicas"):
                remedy = "remove the port: each replica gets a free one"
                self._report(path, Unfit("port with one replica only", remedy, f"{values['replicas']} replicas"))
            if port in taken:
                remedy = "remove the port: a free one is taken then"
                self._report(path, Unfit("a port of its own", remedy, f"{port}, which is for {taken[port]}"))
            taken.setdefault(port, name)


def _of_request(problem: str) -> Unfit:
    """``problem``: as a client would be told, "temperature: expected a number, got …; remedy", or a sentence."""
    _, found, rest = problem.partition(": expected ")
    expected, _, rest = rest.partition(", got ")
    got, _, remedy = rest.partition("; ")
    if found:
        return Unfit(expected, remedy or "correct it, or leave it out", got)
    return Unfit("a value that a request may have", "correct it, or leave it out", f"one that is refused ({problem})")

"""What the replicas at one address share: a server that loads models on request has often room for one only, so that a
request for another model makes it unload the first and load for minutes.

So the replicas ask for a token one at a time, and a silence before the first token may be a load.
"""

import asyncio
from dataclasses import dataclass, field
from urllib.parse import urlsplit

# Seconds after an answer. The shortest usual time until a server unloads an idle model is 5 minutes (Ollama).
KEPT_FOR = 240.0


@dataclass(slots=True)
class RemoteHost:
    """``turn``: held while one of the replicas waits for a token that nobody asked for. ``models``: that we ask it
    for."""

    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    models: set[str] = field(default_factory=set)
    _last: str = ""  # the replica that generated last
    _at: float = 0.0

    def generated(self, replica: str, now: float) -> None:
        self._last, self._at = replica, now

    def holds(self, replica: str, now: float) -> bool:
        """The model of this replica is still loaded, as far as can be told."""
        return replica == self._last and now - self._at < KEPT_FOR


class RemoteHosts:
    """By host and port. ``localhost`` is written in two ways."""

    def __init__(self) -> None:
        self._hosts: dict[str, RemoteHost] = {}

    def join(self, url: str, model: str) -> RemoteHost:
        """For a replica that calls its model so there."""
        key = urlsplit(url).netloc.lower().replace("localhost", "127.0.0.1")
        host = self._hosts.setdefault(key, RemoteHost())
        host.models.add(model)
        return host

"""Which of the open connections are kept when there are too many: pure, one table for each server.

limit reached    the connection that has waited longest without a whole head is closed for the new one: idle ones
                 that clients keep alive, and those that send nothing, or their head byte by byte
none waits       the new connection is excess: from this machine it may still ask for a probe, everything else is
                 refused. So a supervisor's probe is answered however many clients there are
excess full      the excess connection that has waited longest is closed for one of this machine; a remote one is
                 refused
"""

from enum import Enum
from typing import Protocol

DESCRIPTORS_KEPT = 64  # for the log, files, listening sockets, the event loop, name look-ups
DESCRIPTORS_PER_REPLICA = 8  # two pipes, one probe, a port that is being looked for, a spawn
SPARE_CONNECTIONS = 256  # beyond the requests at a time: idle ones that clients keep alive
MAX_EXCESS = 64
MIN_CONNECTIONS = 8


class Evictable(Protocol):
    def evict(self) -> None:
        """Close the connection, which waits for a request."""


class Place(Enum):
    ADMITTED = "admitted"
    EXCESS = "excess"  # only for probes
    REFUSED = "refused"


def limit_of(max_requests: int, *, descriptors: int, upstream: int, replicas: int) -> int:
    """Connections to admit. ``descriptors``: RLIMIT_NOFILE; ``upstream``: connections to backends at most."""
    usable = descriptors - DESCRIPTORS_KEPT - MAX_EXCESS // 2 - DESCRIPTORS_PER_REPLICA * replicas
    return max(MIN_CONNECTIONS, min(max_requests + SPARE_CONNECTIONS, usable - min(upstream, usable // 2)))


class ConnectionTable:
    def __init__(self, limit: int, *, max_excess: int = MAX_EXCESS) -> None:
        self.limit = limit
        self._max_excess = max_excess
        self._admitted: set[Evictable] = set()
        self._excess: set[Evictable] = set()
        # Without a whole head, those that have waited longest first; a dict for its order.
        self._waiting: dict[Place, dict[Evictable, None]] = {Place.ADMITTED: {}, Place.EXCESS: {}}

    def __len__(self) -> int:
        return len(self._admitted) + len(self._excess)

    def enter(self, connection: Evictable, *, local: bool) -> Place:
        """A new connection. ``local``: from this machine."""
        if len(self._admitted) < self.limit or self._evict(Place.ADMITTED):
            self._admitted.add(connection)
        elif len(self._excess) < self._max_excess or (local and self._evict(Place.EXCESS)):
            self._excess.add(connection)
        else:
            return Place.REFUSED
        self.waits(connection)
        return self._place(connection)

    def waits(self, connection: Evictable) -> None:
        """It waits for a request from now on, or reads what is left of an old one."""
        if connection in self._admitted or connection in self._excess:
            waiting = self._waiting[self._place(connection)]
            waiting.pop(connection, None)
            waiting[connection] = None

    def works(self, connection: Evictable) -> None:
        """It has a request with a whole head."""
        for waiting in self._waiting.values():
            waiting.pop(connection, None)

    def leave(self, connection: Evictable) -> None:
        self.works(connection)
        self._admitted.discard(connection)
        self._excess.discard(connection)

    def _place(self, connection: Evictable) -> Place:
        return Place.ADMITTED if connection in self._admitted else Place.EXCESS

    def _evict(self, place: Place) -> bool:
        oldest = next(iter(self._waiting[place]), None)
        if oldest is None:
            return False
        self.leave(oldest)
        oldest.evict()
        return True

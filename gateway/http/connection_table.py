"""Which of the open connections are kept when there are too many: pure, one table for each server.

limit reached    one is closed for the new one: that whose last answer was sent first and that only reads what its
                 client still sends; else that which has waited longest without a whole head (idle ones that clients
                 keep alive, and those that send nothing, or their head byte by byte), but not one that has just
                 come: its request may be there, unread
none to close    the new connection is excess: from this machine it may still ask for a probe, everything else is
                 refused. So a supervisor's probe is answered however many clients there are
excess full      the excess connection that has waited longest is refused for one of this machine; a remote one is
                 refused itself
"""

from enum import Enum
from typing import Protocol

DESCRIPTORS_KEPT = 64  # for the log, files, listening sockets, the event loop, name look-ups
DESCRIPTORS_PER_REPLICA = 8  # two pipes, one probe, a port that is being looked for, a spawn
SPARE_CONNECTIONS = 256  # beyond the requests at a time: idle ones that clients keep alive
MAX_EXCESS = 64
MIN_CONNECTIONS = 8
MIN_WAIT = 1.0  # seconds that each connection gets for its request


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
    """``now``: seconds of any one clock."""

    def __init__(self, limit: int, *, max_excess: int = MAX_EXCESS) -> None:
        self.limit = limit
        self._max_excess = max_excess
        self._admitted: set[Evictable] = set()
        self._excess: set[Evictable] = set()
        # Oldest first; a dict for its order. The values: when it began.
        self._waiting: dict[Place, dict[Evictable, float]] = {Place.ADMITTED: {}, Place.EXCESS: {}}
        self._finished: dict[Place, dict[Evictable, float]] = {Place.ADMITTED: {}, Place.EXCESS: {}}

    def __len__(self) -> int:
        return len(self._admitted) + len(self._excess)

    def enter(self, connection: Evictable, *, local: bool, now: float) -> Place:
        """A new connection. ``local``: from this machine."""
        if len(self._admitted) < self.limit or self._make_room(Place.ADMITTED, now, MIN_WAIT):
            self._admitted.add(connection)
        elif len(self._excess) < self._max_excess or (local and self._make_room(Place.EXCESS, now, 0.0)):
            self._excess.add(connection)
        else:
            return Place.REFUSED
        self.waits(connection, now)
        return self._place(connection)

    def waits(self, connection: Evictable, now: float) -> None:
        """It waits for a request from now on."""
        self.works(connection)
        if connection in self._admitted or connection in self._excess:
            self._waiting[self._place(connection)][connection] = now

    def works(self, connection: Evictable) -> None:
        """It has a request with a whole head."""
        for dispensable in (*self._waiting.values(), *self._finished.values()):
            dispensable.pop(connection, None)

    def finishes(self, connection: Evictable, now: float) -> None:
        """Its last answer was sent; what its client still sends is read for a while."""
        self.works(connection)
        if connection in self._admitted or connection in self._excess:
            self._finished[self._place(connection)][connection] = now

    def leave(self, connection: Evictable) -> None:
        self.works(connection)
        self._admitted.discard(connection)
        self._excess.discard(connection)

    def _place(self, connection: Evictable) -> Place:
        return Place.ADMITTED if connection in self._admitted else Place.EXCESS

    def _make_room(self, place: Place, now: float, min_wait: float) -> bool:
        return self._evict(self._finished[place], now) or self._evict(self._waiting[place], now - min_wait)

    def _evict(self, dispensable: dict[Evictable, float], latest: float) -> bool:
        """``latest``: the time at which it must have begun to be so."""
        oldest, since = next(iter(dispensable.items()), (None, 0.0))
        if oldest is None or since > latest:
            return False
        self.leave(oldest)
        oldest.evict()
        return True

"""Concurrency limit of one replica: slots, circuit breaker, slow start, and requests that must be alone.

Supervised and remote replicas have one each. ``changed`` is called when the number of slots rises by time alone.
"""

import asyncio
import logging
from collections.abc import Callable

from backends.admission.circuit_breaker import CircuitBreaker
from backends.admission.inflight import InFlight
from backends.admission.lease import Lease
from backends.admission.slow_start import SlowStart
from backends.domain.inflight_limit import SEQUENTIAL, InflightLimit

log = logging.getLogger(__name__)


class ConcurrencyLimiter:
    """``limit``: of the requests in flight, as it is now; ``clock``: event loop time; ``batches`` as for
    ``InFlight``."""

    def __init__(
        self,
        limit: Callable[[], InflightLimit],
        clock: Callable[[], float],
        changed: Callable[[], None],
        *,
        batches: bool = True,
    ) -> None:
        self.inflight = InFlight(batches=batches)
        self.breaker = CircuitBreaker()
        self._limit = limit
        self._clock = clock
        self._changed = changed
        self._slow = SlowStart()
        self._timer: asyncio.TimerHandle | None = None

    @property
    def closed_to_all(self) -> bool:
        """The breaker is open."""
        return not self.breaker.closed(self._clock())

    @property
    def limit(self) -> InflightLimit:
        """When nothing is wrong."""
        return SEQUENTIAL if self.inflight.sequential else self._limit()

    @property
    def slots(self) -> int:
        """Requests that may be in flight now."""
        return self._slots(self.limit.requests)

    def _slots(self, limit: int) -> int:
        now = self._clock()
        return self._slow.allowance(limit, now) if self.breaker.closed(now) else 0

    @property
    def free(self) -> bool:
        flight, limit = self.inflight, self.limit
        taken = len(flight)  # one that is alone is the only one
        if taken >= self._slots(limit.requests) or (taken == 1 and flight.anybody_alone):
            return False
        return limit.unread is None or taken < limit.unread or flight.unread < limit.unread

    def begin(self, *, slowly: bool) -> None:
        """A new instance has begun: the failures of the last one do not count. ``slowly``: with a slow start."""
        opened = self.breaker.opened
        self.breaker = CircuitBreaker()
        self.breaker.opened = opened
        self._slow = SlowStart()
        self.inflight.sequential = False
        if slowly:
            self._slow.begin(self._clock())
        self._arm()

    def probe_succeeded(self) -> None:
        """A token came: an open breaker closes when its time is over, and a slow start follows."""
        self._note_token()
        self._changed()  # if the time of the breaker was over already, queued requests may be served now

    def _note_token(self) -> None:
        now = self._clock()
        if not self.breaker.closed(now):
            self.breaker.probe_succeeded()
            self._slow.begin(now + self.breaker.left(now))
            self._arm()

    def release(self, lease: Lease) -> bool:
        """True: the outcome of this request has opened the breaker, which is logged."""
        self.inflight.discard(lease)
        if lease.completed:
            self._slow.answered += 1
            self._note_token()
        if not (lease.completed or lease.failed):
            return False
        opened = self.breaker.record(self._clock(), ok=lease.completed)
        if opened:
            log.warning("circuit breaker opened", extra={"backend": lease.spec.id, "reason": self.breaker.reason})
        return opened

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _arm(self) -> None:
        self.close()
        now = self._clock()
        wait = self.breaker.left(now) or self._slow.next_step(self.limit.requests, now)
        if wait is not None:
            self._timer = asyncio.get_running_loop().call_later(wait, self._tick)

    def _tick(self) -> None:
        self._arm()
        self._changed()

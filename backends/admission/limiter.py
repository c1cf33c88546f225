"""Who is let in at one backend, and how many: slots, the breaker, the slow start, and requests that must be alone.

Supervised and remote backends have one each. It tells its owner when time alone has changed the answer.
"""

import asyncio
from collections.abc import Callable

from backends.admission.circuit_breaker import CircuitBreaker
from backends.admission.lease import InFlight, Lease
from backends.admission.slow_start import SlowStart


class ConcurrencyLimiter:
    """``limit``: requests at once; ``clock``: the event loop's time."""

    def __init__(self, limit: int, clock: Callable[[], float], changed: Callable[[], None]) -> None:
        self.inflight = InFlight()
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
    def slots(self) -> int:
        """How many may be in flight now."""
        now = self._clock()
        return self._slow.allowance(self._limit, now) if self.breaker.closed(now) else 0

    @property
    def free(self) -> bool:
        return len(self.inflight) < self.slots and not self.inflight.anybody_alone

    def begin(self, *, slowly: bool) -> None:
        """A new life: what its predecessor did is not held against it."""
        opened = self.breaker.opened
        self.breaker = CircuitBreaker()
        self.breaker.opened = opened
        self._slow = SlowStart()
        if slowly:
            self._slow.begin(self._clock())
        self._arm()

    def probe_succeeded(self) -> None:
        """A token came: once its time is over, an open breaker lets requests in again, slowly."""
        now = self._clock()
        if not self.breaker.closed(now):
            self.breaker.probe_succeeded()
            self._slow.begin(now + self.breaker.left(now))
            self._arm()
            self._changed()  # where its time was over already, requests in line may be served now

    def release(self, lease: Lease) -> bool:
        """True: the way this one ended has opened the breaker."""
        self.inflight.discard(lease)
        if lease.completed:
            self._slow.answered += 1
            self.probe_succeeded()
        if lease.completed or lease.failed:
            return self.breaker.record(self._clock(), ok=lease.completed)
        return False

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _arm(self) -> None:
        self.close()
        now = self._clock()
        wait = self.breaker.left(now) or self._slow.next_step(self._limit, now)
        if wait is not None:
            self._timer = asyncio.get_running_loop().call_later(wait, self._tick)

    def _tick(self) -> None:
        self._arm()
        self._changed()

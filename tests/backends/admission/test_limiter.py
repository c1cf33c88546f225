"""Who is let in at one replica, as far as time alone decides it."""

import asyncio

from backends.admission.lease import Lease
from backends.admission.limiter import ConcurrencyLimiter
from tests.backends.admission.test_pool import Life, Replica


async def test_a_breaker_that_a_probe_closes_after_its_time_tells_its_owner() -> None:
    now, told = 100.0, 0

    def changed() -> None:
        nonlocal told
        told += 1

    limiter = ConcurrencyLimiter(2, lambda: now, changed)
    for _ in range(3):
        lease = Lease(Replica(), Life(), now)
        limiter.inflight.add(lease)
        lease.failed = True
        limiter.release(lease)
    assert not limiter.free
    now += 6.0  # its time is over, and no token has come yet
    await asyncio.sleep(0)
    assert (limiter.free, told) == (False, 0)
    limiter.probe_succeeded()
    assert (limiter.free, told) == (True, 1), "requests in line are served now"
    limiter.close()

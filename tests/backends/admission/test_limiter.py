"""Who is let in at one replica, as far as time alone decides it."""

import asyncio

from backends.admission.lease import Lease
from backends.admission.limiter import ConcurrencyLimiter
from backends.diagnosis.suspects import RequestProgress
from backends.domain.inflight_limit import InflightLimit
from tests.backends.admission.test_pool import Life, Replica


async def test_a_breaker_that_a_probe_closes_after_its_time_tells_its_owner() -> None:
    now, told = 100.0, 0

    def changed() -> None:
        nonlocal told
        told += 1

    limiter = ConcurrencyLimiter(lambda: InflightLimit(2, ""), lambda: now, changed)
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


async def test_so_many_prompts_at_a_time_and_the_next_as_soon_as_one_was_read() -> None:
    """What mlx_lm.server cannot begin with at once would wait in it, and look like silence."""
    limiter = ConcurrencyLimiter(lambda: InflightLimit(3, "", unread=2), lambda: 0.0, lambda: None)
    leases, free = [], list[bool]()
    for _ in range(2):
        leases.append(Lease(Replica(), Life(), 0.0))
        limiter.inflight.add(leases[-1])
        free.append(limiter.free)
    assert free == [True, False], "both are unread"
    leases[0].report(RequestProgress(100, prefilling=True, read=64))
    free.append(limiter.free)
    leases[0].report(RequestProgress(100, prompt_read=True))
    assert [*free[2:], limiter.free] == [False, True]
    leases.append(Lease(Replica(), Life(), 0.0))
    limiter.inflight.add(leases[-1])
    for lease in leases:
        lease.report(RequestProgress(100, decoding=True))
    assert not limiter.free, "three at most"


async def test_what_bounds_the_memory_may_come_to_be_known() -> None:
    limits = [InflightLimit(8, "")]
    limiter = ConcurrencyLimiter(lambda: limits[-1], lambda: 0.0, lambda: None)
    slots = [limiter.slots]
    limits.append(InflightLimit(32, ""))
    slots.append(limiter.slots)
    limiter.inflight.sequential = True
    assert [*slots, limiter.slots] == [8, 32, 1]
    assert limiter.limit.why == "the server answers one request after the other"

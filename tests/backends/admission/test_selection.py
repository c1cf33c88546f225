"""Most requests are plain, and a replica is found for them without a look at all of them."""

import asyncio
from unittest.mock import patch

from hypothesis import given
from hypothesis import strategies as st

from backends.admission.eligibility import Eligibility
from backends.admission.lease import Lease
from backends.admission.slot_request import SlotRequest
from backends.domain.priority import Priority
from backends.domain.snapshot import Seat
from backends.domain.state import State
from backends.domain.work import Work
from tests.backends.admission.test_pool import Replica, pool

REPLICAS = st.lists(
    st.fixed_dictionaries(
        {
            "inflight": st.integers(0, 3),
            "slots": st.integers(1, 4),
            "room": st.sampled_from([10, 1000]),
            "responsive": st.booleans(),
            "state": st.sampled_from([State.READY, State.READY, State.STARTING]),
        }
    ),
    min_size=1,
    max_size=4,
)
REQUESTS = st.lists(
    st.tuples(st.sampled_from([1, 9]), st.sampled_from([None, 0, 3]), st.sampled_from(list(Priority))), max_size=4
)


async def _chosen(replicas: list[dict[str, object]], requests: list[tuple[int, int | None, Priority]]) -> list[str]:
    """Ids, "" = none."""
    fakes = [Replica(index, limit=4) for index in range(len(replicas))]
    for fake, with_ in zip(fakes, replicas, strict=True):
        for _ in range(int(str(with_["inflight"]))):
            fake.admit()
        for name in ("slots", "room", "responsive", "state"):
            setattr(fake, name, with_[name])
    p, chosen = pool(*fakes), []
    for tokens, prefer, priority in requests:
        seat = None if prefer is None else Seat(f"m:{prefer}", 1)
        outcome = await p.acquire(SlotRequest(prefer=seat, work=Work(tokens), priority=priority, within=0.0))
        chosen.append(outcome.spec.id if isinstance(outcome, Lease) else "")
    return chosen


@given(REPLICAS, REQUESTS)
def test_it_is_the_one_that_a_look_at_all_of_them_finds(
    replicas: list[dict[str, object]], requests: list[tuple[int, int | None, Priority]]
) -> None:
    found = asyncio.run(_chosen(replicas, requests))
    with patch.object(Eligibility, "is_plain", lambda *_: False):
        assert asyncio.run(_chosen(replicas, requests)) == found

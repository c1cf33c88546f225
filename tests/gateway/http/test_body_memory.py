"""The budget for the bodies of all requests."""

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.http.body_memory import RESERVED, SMALL, BodyMemory, OutOfBodyMemory

TOTAL = 80 * SMALL


def test_beyond_it_nothing_is_taken() -> None:
    memory = BodyMemory(100)
    one, two = memory.share(), memory.share()
    one.resize(60)
    with pytest.raises(OutOfBodyMemory) as full:
        two.resize(41)
    assert (full.value.asked, full.value.held, full.value.total) == (41, 60, 100)
    assert (memory.held, two.size) == (60, 0)
    two.resize(40)
    one.resize(10)
    one.release()
    assert memory.held == 40


def test_what_is_only_announced_takes_nothing() -> None:
    memory = BodyMemory(100)
    one, two = memory.share(), memory.share()
    one.expect(100)
    two.resize(100)
    with pytest.raises(OutOfBodyMemory):
        one.expect(1)
    assert (memory.held, one.size) == (100, 0)


def test_large_bodies_leave_room_for_small_ones() -> None:
    memory = BodyMemory(TOTAL)
    large, more, small = memory.share(), memory.share(), memory.share()
    large.resize(TOTAL - TOTAL // RESERVED)
    with pytest.raises(OutOfBodyMemory):
        more.resize(SMALL + 1)
    small.resize(SMALL)


def test_whether_it_would_ever_fit_is_told() -> None:
    memory = BodyMemory(TOTAL)
    one, other = memory.share(), memory.share()
    other.resize(SMALL * 20)
    for size, keep, fits in ((TOTAL, False, False), (SMALL * 60, False, True), (2 * TOTAL, True, True)):
        with pytest.raises(OutOfBodyMemory) as full:
            one.resize(size, keep=keep)
        assert full.value.fits_alone == fits


def test_the_only_large_request_is_kept_whatever_it_takes() -> None:
    memory = BodyMemory(TOTAL)
    one, two, small = memory.share(), memory.share(), memory.share()
    small.resize(SMALL)
    one.resize(SMALL * 10)
    with pytest.raises(OutOfBodyMemory):
        one.resize(2 * TOTAL)
    one.resize(2 * TOTAL, keep=True)
    with pytest.raises(OutOfBodyMemory):
        two.resize(SMALL + 1, keep=True)
    one.release()
    two.resize(2 * TOTAL, keep=True)
    two.release()
    assert memory.held == SMALL


def test_a_thread_that_goes_on_after_the_end_of_its_request_takes_nothing() -> None:
    memory = BodyMemory(100)
    share = memory.share()
    share.resize(50)
    share.release()
    share.resize(70, keep=True)
    share.release()
    assert (memory.held, share.size) == (0, 0)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2 * TOTAL), st.booleans()), max_size=60))
def test_what_is_held_is_the_sum_of_the_shares(steps: list[tuple[int, int, bool]]) -> None:
    memory = BodyMemory(TOTAL)
    shares = [memory.share() for _ in range(4)]
    for which, size, keep in steps:
        try:
            shares[which].resize(size, keep=keep)
        except OutOfBodyMemory:
            assert size > shares[which].size
        assert memory.held == sum(share.size for share in shares)
        others = sorted(share.size for share in shares)[:-1]
        assert sum(others) <= TOTAL, "beyond the budget there is one request at most"
    for share in shares:
        share.release()
    assert memory.held == 0


def test_threads_lose_nothing() -> None:
    memory = BodyMemory(TOTAL)

    def work() -> None:
        share = memory.share()
        for size in range(2000):
            share.resize(size % 7)
        share.release()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert memory.held == 0

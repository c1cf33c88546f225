"""Who holds a memory, how long that is waited for, and what the lives of a replica have shown about it."""

import pytest

from backends.domain.failure import Aftermath, Cause, Failure
from backends.memory.occupancy import (
    LONGEST_WAIT,
    Holder,
    Occupancy,
    Place,
    held_by_others,
    longest_wait,
    waiting,
)
from backends.memory.past_lives import PastLives, place_of
from backends.memory.reclaim import PATIENCE

GIB = 2**30
SAFARI = Holder(7, "Safari", 9 * GIB)
DIED = Failure(Cause.KILLED, Aftermath.EXITED, "it died")
METAL = Failure(Cause.OOM, Aftermath.EXITED, "it died", evidence=("[METAL] Insufficient Memory",))
CUDA = Failure(Cause.OOM, Aftermath.WEDGED, "it died", evidence=("cudaMallocAsync(&data, size, stream) failed",))


def seen(others: int, *, available: int = 2, total: int = 32) -> Occupancy:
    return Occupancy(Place.MACHINE, total, available, others)


@pytest.mark.parametrize(
    ("others", "need", "held", "seconds"),
    [
        (4, 6, True, LONGEST_WAIT),
        (3, 6, False, PATIENCE),  # without them it would still be too little
        (30, 2, False, 0.0),  # it has what it needs
        (30, 32, True, LONGEST_WAIT),
        (40, 33, False, PATIENCE),  # it needs more than there is
        (0, 6, False, PATIENCE),
    ],
)
def test_waiting_is_worth_while_only_where_others_hold_what_is_missing(
    others: int, need: int, held: bool, seconds: float
) -> None:
    assert held_by_others(seen(others), need, room=2) is held
    assert longest_wait(seen(others), need, room=2) == seconds


def test_what_our_other_processes_hold_is_not_waited_for() -> None:
    """They keep it."""
    ours = Occupancy(Place.MACHINE, 32, 2, 1, own={5: 3, 6: 2})
    assert longest_wait(ours, 7, room=2) == 0.0
    assert longest_wait(ours, 8, room=2) == PATIENCE, "somebody else has some of it"
    assert longest_wait(ours, 33, room=30) == PATIENCE


@pytest.mark.parametrize(
    ("occupied", "told"),
    [
        (
            Occupancy(Place.MACHINE, 32 * GIB, GIB, 25 * GIB, Holder(7, "Safari", 9 * GIB)),
            "; PID 7 (Safari) holds 9.0 GiB",
        ),
        (Occupancy(Place.MACHINE, 32 * GIB, GIB, 25 * GIB), "; other processes hold 25.0 GiB"),
        (Occupancy(Place.MACHINE, 32 * GIB, GIB, GIB, SAFARI), ""),
    ],
)
def test_what_a_user_is_told(occupied: Occupancy, told: str) -> None:
    assert waiting(occupied, 6 * GIB, GIB) == f"waits for memory: 1.0 GiB available, needs 6.0 GiB{told}"


def test_a_gpu_is_named() -> None:
    gpu = Occupancy(Place.DEVICE, 80 * GIB, GIB, 78 * GIB, Holder(7, "python3", 78 * GIB))
    told = "waits for memory: 1.0 GiB available on the GPU, needs 6.0 GiB; PID 7 (python3) holds 78.0 GiB"
    assert waiting(gpu, 6 * GIB, GIB) == told


# -- past lives --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "place"),
    [
        ("[METAL] Command buffer execution failed: Insufficient Memory", Place.MACHINE),
        ("[malloc] Unable to allocate 17179869184 bytes.", Place.MACHINE),
        ("", Place.MACHINE),
        ("cudaMallocAsync(&data, size, stream) failed: out of memory", Place.DEVICE),
        ("cudaGraphInstantiate(&graph) failed: out of memory", Place.DEVICE),
        ("[malloc_async] Unable to allocate 5 bytes.", Place.DEVICE),
        ("CUBLAS_STATUS_ALLOC_FAILED", Place.DEVICE),
    ],
)
def test_the_evidence_tells_which_memory_ran_out(line: str, place: Place) -> None:
    assert place_of(Failure(Cause.OOM, Aftermath.EXITED, "it died", evidence=(line,))) is place
    assert place_of(Failure(Cause.OOM, Aftermath.EXITED, f"it died: {line}")) is place


def test_the_memory_that_ran_out_is_asked_until_a_life_has_answered() -> None:
    past, asked = PastLives(), []
    for failure, answered in ((DIED, False), (METAL, True), (DIED, False), (DIED, True)):
        past.ended(failure, answered=answered)
        asked.append(past.asked)
    assert asked == [None, Place.MACHINE, Place.MACHINE, None], "the third may have been killed while it loaded"


def test_a_gpu_is_asked_for_good_once_it_was_used() -> None:
    past = PastLives()
    past.ended(CUDA, answered=False)
    past.ended(DIED, answered=True)
    assert past.asked is Place.DEVICE


def test_what_was_enough_for_a_life_that_answered_is_enough() -> None:
    past = PastLives()
    assert past.least(Place.MACHINE, 60) == 60
    for available, answered in ((80, True), (50, True), (10, False), (70, True)):
        past.begins(available)
        past.ended(METAL, answered=answered)
    assert past.least(Place.MACHINE, 60) == 45, "a tenth less: others' use changes by itself"
    assert past.least(Place.MACHINE, 40) == 40
    assert past.least(Place.DEVICE, 60) == 60

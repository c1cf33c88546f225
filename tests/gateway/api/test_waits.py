"""What a client is told that a queued request waits for."""

from dataclasses import replace

import pytest

from backends.domain.failure import Aftermath, Cause, Failure
from backends.domain.place import Place, WaitsFor
from backends.domain.snapshot import Loading, Snapshot
from backends.domain.state import State
from gateway.api import waits

KILLED = Failure(Cause.KILLED, Aftermath.EXITED, "m:0 was killed")


def replica(state: State, eta: float | None = None, *, failed: bool = False, phase: str = "") -> Snapshot:
    shown = Snapshot("m:0", "m", state, None, None, 0, 0, 1, 0.0, eta)
    loading = Loading(phase, 1.0, None) if phase else None
    return replace(
        shown, eta_known=eta is not None, recovers=True, last_failure=KILLED if failed else None, loading=loading
    )


@pytest.mark.parametrize(
    ("shown", "line"),
    [
        (replica(State.READY, 0.0), "model m busy, 3 s so far"),
        (replica(State.STARTING, 4.4), "model m loading, 3 s so far, about 4 s to go"),
        (replica(State.STARTING), "model m loading, 3 s so far"),
        (replica(State.STARTING, 4.0, failed=True), "model m restarting after killed, 3 s so far, about 4 s to go"),
        (replica(State.BACKOFF, 0.2, failed=True), "model m restarting after killed, 3 s so far, about 1 s to go"),
        (replica(State.STOPPING), "model m restarting, 3 s so far"),
        (
            replica(State.WAITING_FOR_MEMORY, phase="waits for memory: 1 GiB\navailable"),
            "model m waiting for memory, 3 s so far (waits for memory: 1 GiB available)",
        ),
    ],
)
def test_one_line(shown: Snapshot, line: str) -> None:
    assert waits.told([shown], model="m", waited=3.2) == line


@pytest.mark.parametrize(
    ("place", "line"),
    [
        (Place(3, 4.2), "model m busy, 3 before it, 3 s so far, about 4 s to go"),
        (Place(0, 0.0), "model m busy, 3 s so far, about 1 s to go"),
        (Place(7), "model m busy, 7 before it, 3 s so far"),
        (
            Place(1, 4.2, WaitsFor.MORE_URGENT),
            "model m keeping slots for more urgent requests, 1 before it, 3 s so far, about 4 s to go",
        ),
    ],
)
def test_where_it_stands(place: Place, line: str) -> None:
    assert waits.told([replica(State.READY, 0.0)], place, model="m", waited=3.2) == line


def test_a_place_in_the_queue_says_nothing_about_a_restart() -> None:
    loading = [replica(State.STARTING, 2.0)]
    line = "model m loading, 3 s so far, about 2 s to go"
    assert waits.told(loading, Place(3, 9.0), model="m", waited=3.2) == line
    assert waits.phase(loading, Place(3)) == "loading"


def test_one_of_a_crowd_is_told_that_it_will_run_alone() -> None:
    line = waits.told([replica(State.STARTING)], model="m", waited=3.2, crowd=12)
    assert line.endswith("; memory ran out with 12 requests in flight, this one is tried again alone")


def test_the_replica_that_is_back_first_counts() -> None:
    slow, quick = replica(State.BACKOFF, 9.0, failed=True), replica(State.STARTING, 2.0)
    assert waits.told([slow, quick], model="m", waited=0.0) == "model m loading, 0 s so far, about 2 s to go"
    lost = replace(replica(State.FAILED, 0.0), recovers=False)
    assert waits.phase([lost, slow]) == "restarting"
    assert waits.phase([]) == "busy"

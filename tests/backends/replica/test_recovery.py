"""What happens between a failure and the next instance: one incident for several, and the memory of the last one."""

from dataclasses import replace

import pytest

from backends.diagnosis.incidents import SAME_INCIDENT_SECONDS, Incidents
from backends.domain.failure import Aftermath, Blame, Cause, Failure
from backends.domain.spec import RestartPolicy
from backends.domain.state import State
from backends.memory.reclaim import SMALL, ReclaimWait
from backends.replica.events import Exited, WakeAfter
from backends.replica.lifecycle import LifecycleState, step
from backends.replica.restart_policy import GiveUp, History, Retry, decide

GIB = 2**30
POLICY = RestartPolicy(min_backoff=0.5, max_failures=2)
VICTIM = Failure(Cause.GPU_VICTIM, Aftermath.EXITED, "it died", blame=Blame.MACHINE)


def of(backend: str, cause: Cause = Cause.GPU_VICTIM) -> Failure:
    return replace(VICTIM, backend=backend, cause=cause)


def test_a_reset_of_the_gpu_is_one_incident() -> None:
    incidents = Incidents()
    assert not incidents.is_part_of_another(of("a", Cause.GPU_TIMEOUT), 100.0)
    assert incidents.is_part_of_another(of("b"), 100.5)
    assert incidents.is_part_of_another(of("c"), 109.0)
    assert not incidents.is_part_of_another(of("a"), 103.0), "twice is twice"
    assert not incidents.is_part_of_another(of("b"), 100.0 + SAME_INCIDENT_SECONDS + 1)


@pytest.mark.parametrize("cause", [Cause.OOM, Cause.KILLED, Cause.NATIVE_CRASH, Cause.WEDGE])
def test_other_failures_are_each_their_own(cause: Cause) -> None:
    incidents = Incidents()
    assert not incidents.is_part_of_another(of("a"), 1.0)
    assert not incidents.is_part_of_another(of("b", cause), 1.5)


def test_who_fails_of_a_siblings_failure_does_not_loop_for_it() -> None:
    machine = LifecycleState(state=State.READY, generation=1, proven=True, history=History((1.0, 2.0), 2))
    shared = replace(VICTIM, shared=True)
    after, effects = step(machine, Exited(1, shared), policy=POLICY, now=3.0, chance=0.5)
    assert (after.state, after.history.failures, after.last_failure) == (State.BACKOFF, (1.0, 2.0), shared)
    assert not after.crash_looping
    (wake,) = [effect for effect in effects if isinstance(effect, WakeAfter)]
    assert wake.delay == POLICY.min_backoff * 4, "but nor is it started again and again at once"
    alone, _ = step(machine, Exited(1, VICTIM), policy=POLICY, now=3.0, chance=0.5)
    assert (alone.state, alone.crash_looping) == (State.BACKOFF, True)


def test_what_may_pass_is_tried_again_at_the_first_start() -> None:
    passing = Failure(Cause.DEPENDENCY, Aftermath.EXITED, "no descriptors left", blame=Blame.MACHINE)
    often = History((1.0, 2.0), 2, cause=Cause.DEPENDENCY, alike=2)
    assert isinstance(decide(often, POLICY, passing, proven=False, chance=0.5), Retry)
    lasting = replace(passing, blame=Blame.OPERATOR)
    assert isinstance(decide(often, POLICY, lasting, proven=False, chance=0.5), GiveUp)


# -- memory ------------------------------------------------------------------------------------------------------------


def test_the_first_life_waits_for_nothing() -> None:
    assert ReclaimWait().needed == 0


def test_it_waits_for_what_the_last_life_used() -> None:
    headroom = ReclaimWait()
    headroom.begin(32 * GIB)
    for footprint in (None, 10 * GIB, 4 * GIB):
        headroom.note(footprint)
    assert headroom.needed == int(11 * GIB)


def test_never_for_more_than_there_was() -> None:
    headroom = ReclaimWait()
    headroom.begin(9 * GIB)
    headroom.note(10 * GIB)  # it swapped
    assert headroom.needed == 8 * GIB


def test_a_small_one_is_not_worth_a_wait() -> None:
    headroom = ReclaimWait()
    headroom.begin(GIB)
    headroom.note(SMALL - 1)
    assert headroom.needed == 0

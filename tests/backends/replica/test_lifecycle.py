"""The machine of one supervised backend: every state against every event, and whole conversations.

The world of the stateful test keeps real rules: a process ends only once it was told to or dies by itself, its end is
reported once, a wake-up comes some time after it was asked for, and old news may come again at any moment.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from backends.domain.failure import Aftermath, Blame, Cause, Failure, Reason
from backends.domain.spec import RestartPolicy
from backends.domain.state import StartReason, State
from backends.replica import lifecycle
from backends.replica.events import (
    AbortCalls,
    Answered,
    Declined,
    Drain,
    Emptied,
    Event,
    Evict,
    Exited,
    Failed,
    Granted,
    Keep,
    Launched,
    Load,
    Mended,
    Proven,
    Recycle,
    Refuse,
    Restart,
    Spawn,
    Start,
    Stop,
    Terminate,
    Unload,
    Waiting,
    WakeAfter,
    Watch,
    Woke,
)
from backends.replica.lifecycle import LifecycleState, Step, eta, eta_known, retry_in, step
from backends.replica.restart_policy import History

POLICY = RestartPolicy(min_backoff=1.0, max_backoff=60.0, max_failures=3, window=300.0)
CRASH = Failure(Cause.NATIVE_CRASH, Aftermath.EXITED, "a:0 died", exit=-6)
WEDGE = Failure(Cause.WEDGE, Aftermath.WEDGED, "a:0 is being replaced")
NO_MODEL = Failure(Cause.MODEL_NOT_FOUND, Aftermath.EXITED, "no such model", blame=Blame.OPERATOR)
NO_ROOM = Failure(Cause.LOAD_FAILURE, Aftermath.NOT_LAUNCHED, "a:0 needs 9 GiB", reason=Reason.NO_MEMORY)
ASKED = Failure(Cause.NONE, Aftermath.EXITED, "a:0 was stopped by the gateway", blame=Blame.GATEWAY)

RUNNING = (State.STARTING, State.WAITING_FOR_MEMORY, State.READY, State.DRAINING)
WITHOUT_PROCESS = (State.STOPPED, State.UNLOADED, State.BACKOFF, State.FAILED)
TARGETS = (State.STOPPED, State.UNLOADED, State.STARTING, State.BACKOFF, State.FAILED)


def go(m: LifecycleState, event: Event, now: float = 100.0, chance: float = 0.5) -> Step:
    return step(m, event, policy=POLICY, now=now, chance=chance)


def machines(generation: int = 7) -> Iterator[LifecycleState]:
    """One of each kind that reacts in a way of its own."""
    base = LifecycleState(generation=generation, since=50.0, started_at=40.0, launched_at=41.0, retry_at=99.0)
    for state in (State.STOPPED, State.UNLOADED, State.STARTING, State.READY, State.BACKOFF, State.FAILED):
        yield replace(base, state=state)
    yield replace(base, state=State.WAITING_FOR_MEMORY, waiting_for="waits for its turn to load")
    yield replace(base, state=State.WAITING_FOR_MEMORY)
    for then in (State.STOPPED, State.UNLOADED, State.STARTING):
        yield replace(base, state=State.DRAINING, then=then)
    yield replace(base, state=State.DRAINING, then=State.UNLOADED, evicting=True)
    for then in TARGETS:
        yield replace(base, state=State.STOPPING, then=then)


def shown(m: LifecycleState) -> str:
    match m.state:
        case State.WAITING_FOR_MEMORY:
            return "WAITING" if m.waiting_for else "DENIED"
        case State.DRAINING:
            return f"{'EVICTING' if m.evicting else 'DRAINING'}>{m.then.name}"
        case State.STOPPING:
            return f"STOPPING>{m.then.name}"
        case _:
            return m.state.name


COMMANDS = (
    Start(),
    Stop(),
    Restart(),
    Drain(),
    Load(StartReason.DEMAND),
    Unload(demand=False),
    Evict(),
    Recycle(),
    Keep(),
)


def events(generation: int) -> list[Event]:
    of_instance: list[Event] = [
        Waiting(generation, "waits for memory"),
        Granted(generation),
        Launched(generation),
        Proven(generation),
        Answered(generation),
        Failed(generation, WEDGE),
        Exited(generation, CRASH),
        Declined(generation, NO_ROOM, None),
        Mended(generation, wanted=True),
        Emptied(generation, demand=False),
        Woke(generation, wanted=True),
    ]
    return [*COMMANDS, *of_instance]


# What is not in the table changes nothing.
BEFORE_AND_AFTER = """
STOPPED            Start     STARTING           Spawn
STOPPED            Stop      STOPPED            -
STOPPED            Restart   STARTING           Spawn
STOPPED            Drain     STOPPED            Refuse
UNLOADED           Start     STARTING           Spawn
UNLOADED           Stop      STOPPED            -
UNLOADED           Restart   STARTING           Spawn
UNLOADED           Drain     UNLOADED           Refuse
UNLOADED           Load      STARTING           Spawn
UNLOADED           Unload    UNLOADED           -
WAITING            Start     WAITING            Refuse
WAITING            Stop      STOPPING>STOPPED   Terminate
WAITING            Restart   STOPPING>STARTING  Terminate
WAITING            Drain     WAITING            Refuse
WAITING            Unload    STOPPING>UNLOADED  Terminate
WAITING            Evict     STOPPING>UNLOADED  Terminate
WAITING            Waiting   WAITING            -
WAITING            Granted   STARTING           -
WAITING            Launched  STARTING           -
WAITING            Failed    STOPPING>BACKOFF   AbortCalls Terminate
WAITING            Exited    BACKOFF            AbortCalls WakeAfter
WAITING            Declined  UNLOADED           -
DENIED             Start     STARTING           Spawn
DENIED             Stop      STOPPED            -
DENIED             Restart   STARTING           Spawn
DENIED             Drain     DENIED             Refuse
DENIED             Unload    UNLOADED           -
DENIED             Woke      STARTING           Spawn
STARTING           Start     STARTING           Refuse
STARTING           Stop      STOPPING>STOPPED   Terminate
STARTING           Restart   STOPPING>STARTING  Terminate
STARTING           Drain     STARTING           Refuse
STARTING           Unload    STOPPING>UNLOADED  Terminate
STARTING           Evict     STOPPING>UNLOADED  Terminate
STARTING           Waiting   WAITING            -
STARTING           Launched  STARTING           -
STARTING           Proven    READY              -
STARTING           Failed    STOPPING>BACKOFF   AbortCalls Terminate
STARTING           Exited    BACKOFF            AbortCalls WakeAfter
STARTING           Declined  UNLOADED           -
READY              Start     READY              Refuse
READY              Stop      STOPPING>STOPPED   Terminate
READY              Restart   STOPPING>STARTING  Terminate
READY              Drain     DRAINING>STOPPED   -
READY              Unload    DRAINING>UNLOADED  -
READY              Evict     EVICTING>UNLOADED  -
READY              Recycle   DRAINING>STARTING  -
READY              Answered  READY              -
READY              Failed    STOPPING>BACKOFF   AbortCalls Terminate
READY              Exited    BACKOFF            AbortCalls WakeAfter
DRAINING>STOPPED   Start     READY              -
DRAINING>STOPPED   Stop      STOPPING>STOPPED   Terminate
DRAINING>STOPPED   Restart   STOPPING>STARTING  Terminate
DRAINING>STOPPED   Drain     DRAINING>STOPPED   Refuse
DRAINING>STOPPED   Answered  DRAINING>STOPPED   -
DRAINING>STOPPED   Failed    STOPPING>STOPPED   AbortCalls Terminate
DRAINING>STOPPED   Exited    STOPPED            AbortCalls
DRAINING>STOPPED   Emptied   STOPPING>STOPPED   Terminate
DRAINING>UNLOADED  Start     READY              -
DRAINING>UNLOADED  Stop      STOPPING>STOPPED   Terminate
DRAINING>UNLOADED  Restart   STOPPING>STARTING  Terminate
DRAINING>UNLOADED  Drain     DRAINING>STOPPED   -
DRAINING>UNLOADED  Load      READY              -
DRAINING>UNLOADED  Answered  DRAINING>UNLOADED  -
DRAINING>UNLOADED  Failed    STOPPING>UNLOADED  AbortCalls Terminate
DRAINING>UNLOADED  Exited    UNLOADED           AbortCalls
DRAINING>UNLOADED  Emptied   STOPPING>UNLOADED  Terminate
EVICTING>UNLOADED  Start     READY              -
EVICTING>UNLOADED  Stop      STOPPING>STOPPED   Terminate
EVICTING>UNLOADED  Restart   STOPPING>STARTING  Terminate
EVICTING>UNLOADED  Drain     DRAINING>STOPPED   -
EVICTING>UNLOADED  Keep      READY              -
EVICTING>UNLOADED  Answered  EVICTING>UNLOADED  -
EVICTING>UNLOADED  Failed    STOPPING>BACKOFF   AbortCalls Terminate
EVICTING>UNLOADED  Exited    BACKOFF            AbortCalls WakeAfter
EVICTING>UNLOADED  Emptied   STOPPING>UNLOADED  Terminate
DRAINING>STARTING  Start     READY              -
DRAINING>STARTING  Stop      STOPPING>STOPPED   Terminate
DRAINING>STARTING  Restart   STOPPING>STARTING  Terminate
DRAINING>STARTING  Drain     DRAINING>STOPPED   -
DRAINING>STARTING  Unload    DRAINING>UNLOADED  -
DRAINING>STARTING  Keep      READY              -
DRAINING>STARTING  Answered  DRAINING>STARTING  -
DRAINING>STARTING  Failed    STOPPING>BACKOFF   AbortCalls Terminate
DRAINING>STARTING  Exited    BACKOFF            AbortCalls WakeAfter
DRAINING>STARTING  Emptied   STOPPING>STARTING  Terminate
STOPPING>STOPPED   Start     STOPPING>STARTING  -
STOPPING>STOPPED   Restart   STOPPING>STARTING  -
STOPPING>STOPPED   Drain     STOPPING>STOPPED   Refuse
STOPPING>STOPPED   Launched  STOPPING>STOPPED   -
STOPPING>STOPPED   Exited    STOPPED            AbortCalls
STOPPING>STOPPED   Declined  STOPPED            AbortCalls
STOPPING>UNLOADED  Start     STOPPING>STARTING  -
STOPPING>UNLOADED  Stop      STOPPING>STOPPED   -
STOPPING>UNLOADED  Restart   STOPPING>STARTING  -
STOPPING>UNLOADED  Drain     STOPPING>UNLOADED  Refuse
STOPPING>UNLOADED  Load      STOPPING>STARTING  -
STOPPING>UNLOADED  Launched  STOPPING>UNLOADED  -
STOPPING>UNLOADED  Exited    UNLOADED           AbortCalls
STOPPING>UNLOADED  Declined  UNLOADED           AbortCalls
STOPPING>STARTING  Start     STOPPING>STARTING  -
STOPPING>STARTING  Stop      STOPPING>STOPPED   -
STOPPING>STARTING  Restart   STOPPING>STARTING  -
STOPPING>STARTING  Drain     STOPPING>STARTING  Refuse
STOPPING>STARTING  Unload    STOPPING>UNLOADED  -
STOPPING>STARTING  Launched  STOPPING>STARTING  -
STOPPING>STARTING  Exited    STARTING           AbortCalls Spawn
STOPPING>STARTING  Declined  STARTING           AbortCalls Spawn
STOPPING>BACKOFF   Start     STOPPING>STARTING  -
STOPPING>BACKOFF   Stop      STOPPING>STOPPED   -
STOPPING>BACKOFF   Restart   STOPPING>STARTING  -
STOPPING>BACKOFF   Drain     STOPPING>BACKOFF   Refuse
STOPPING>BACKOFF   Unload    STOPPING>UNLOADED  -
STOPPING>BACKOFF   Launched  STOPPING>BACKOFF   -
STOPPING>BACKOFF   Exited    BACKOFF            AbortCalls WakeAfter
STOPPING>BACKOFF   Declined  BACKOFF            AbortCalls WakeAfter
STOPPING>FAILED    Start     STOPPING>STARTING  -
STOPPING>FAILED    Stop      STOPPING>STOPPED   -
STOPPING>FAILED    Restart   STOPPING>STARTING  -
STOPPING>FAILED    Drain     STOPPING>FAILED    Refuse
STOPPING>FAILED    Launched  STOPPING>FAILED    -
STOPPING>FAILED    Exited    FAILED             AbortCalls Watch
STOPPING>FAILED    Declined  FAILED             AbortCalls Watch
BACKOFF            Start     STARTING           Spawn
BACKOFF            Stop      STOPPED            -
BACKOFF            Restart   STARTING           Spawn
BACKOFF            Drain     BACKOFF            Refuse
BACKOFF            Unload    UNLOADED           -
BACKOFF            Woke      STARTING           Spawn
BACKOFF            Mended    STARTING           Spawn
FAILED             Start     STARTING           Spawn
FAILED             Stop      STOPPED            -
FAILED             Restart   STARTING           Spawn
FAILED             Drain     FAILED             Refuse
FAILED             Mended    STARTING           Spawn
"""
ROWS = [line.split(maxsplit=3) for line in BEFORE_AND_AFTER.strip().splitlines()]
TABLE = {(before, event): (after, effects) for before, event, after, effects in ROWS}
PAIRS = [(m, event) for m in machines() for event in events(7)]


def named(value: object) -> str:
    return shown(value) if isinstance(value, LifecycleState) else type(value).__name__


def test_the_table_knows_only_pairs_that_exist() -> None:
    assert set(TABLE) <= {(named(m), named(event)) for m, event in PAIRS}
    assert len(TABLE) == len(ROWS)


@pytest.mark.parametrize(("before", "event"), PAIRS, ids=named)
def test_each_state_and_event(before: LifecycleState, event: Event) -> None:
    after, effects = go(before, event)
    if (row := TABLE.get((named(before), named(event)))) is None:
        assert (after, effects) == (before, ())
    else:
        assert shown(after) == row[0]
        assert [named(effect) for effect in effects] == ([] if row[1] == "-" else row[1].split())


@pytest.mark.parametrize("event", [Failed(7, WEDGE), Exited(7, CRASH)], ids=["Failed", "Exited"])
def test_one_that_dies_while_draining_stays_down_and_is_on_record(event: Failed | Exited) -> None:
    after, effects = go(LifecycleState(state=State.DRAINING, generation=7), event)
    assert effects[0] == AbortCalls(7, event.failure)
    assert after.next is State.STOPPED
    assert after.gave_up == ""
    assert after.last_failure is event.failure


@pytest.mark.parametrize(
    ("before", "event", "missing"),
    [
        (LifecycleState(state=State.STARTING, generation=7), Declined(7, NO_ROOM, None), True),
        (LifecycleState(state=State.BACKOFF, generation=7), Woke(7, wanted=False), True),
        (LifecycleState(state=State.READY, generation=7), Evict(), True),
        (LifecycleState(state=State.STARTING, generation=7), Evict(), True),
        (LifecycleState(state=State.READY, generation=7, owed=True), Unload(demand=False), False),
        (LifecycleState(state=State.STARTING, generation=7, owed=True), Unload(demand=False), False),
        (LifecycleState(state=State.BACKOFF, generation=7, owed=True), Unload(demand=False), False),
    ],
    ids=named,
)
def test_only_what_was_unloaded_on_purpose_is_not_missing(before: LifecycleState, event: Event, missing: bool) -> None:
    after, _ = go(before, event)
    assert (after.unloaded, after.missing) == (True, missing)


def test_invariants_of_the_whole_product() -> None:
    for m, event in PAIRS:
        after, effects = go(m, event)
        check_invariants(after)
        spawns = [effect for effect in effects if isinstance(effect, Spawn)]
        assert len(spawns) <= 1
        for spawn in spawns:
            assert spawn.generation == after.generation == m.generation + 1
            assert after.state is State.STARTING
            assert m.idle or isinstance(event, Exited | Declined)
        if not spawns:
            assert after.generation == m.generation
        for effect in effects:
            if isinstance(effect, Terminate):
                assert m.state in RUNNING
                assert after.state is State.STOPPING
            if isinstance(effect, Terminate | AbortCalls | WakeAfter):
                assert effect.generation == m.generation
            if isinstance(effect, Refuse):
                assert after is m
                assert m.state.value in effect.reason
        if m.state is State.STOPPING and isinstance(event, Exited | Declined):
            assert after.state is m.then
        if after.state is State.STOPPING and m.state is not State.STOPPING:
            assert any(isinstance(effect, Terminate) for effect in effects)
        if not isinstance(event, Start | Restart):
            assert after.history == m.history or isinstance(event, Failed | Exited | Answered), "only a person pardons"


def check_invariants(m: LifecycleState) -> None:
    assert not m.evicting or m.state is State.DRAINING
    assert not m.waiting_for or m.state is State.WAITING_FOR_MEMORY
    assert m.then in TARGETS
    assert m.state is not State.DRAINING or m.then in (State.STOPPED, State.UNLOADED, State.STARTING)


# -- memory and demand -------------------------------------------------------------------------------------------------


def test_a_replica_for_which_there_is_no_memory_has_not_failed() -> None:
    starting = LifecycleState(state=State.STARTING, generation=7)
    after, effects = go(starting, Declined(7, NO_ROOM, None))
    assert (after.state, effects, after.denied_at) == (State.UNLOADED, (), 100.0)
    assert (after.last_failure, after.history) == (NO_ROOM, History())
    after, effects = go(starting, Declined(7, NO_ROOM, 30.0))
    assert (shown(after), after.retry_at, effects) == ("DENIED", 130.0, (WakeAfter(7, 30.0),))
    assert (after.is_up_or_starting, eta(after, 100.0)) == (False, 35.0)
    needless = replace(NO_ROOM, cause=Cause.NONE)
    after, _ = go(starting, Declined(7, needless, None))
    assert (after.last_failure, after.denied_at) == (None, None)


def test_a_stop_while_it_waits_for_memory_needs_no_process() -> None:
    waiting, _ = go(LifecycleState(state=State.STARTING, generation=7), Waiting(7, "waits for memory"))
    stopping, _ = go(waiting, Stop())
    stopped, effects = go(stopping, Declined(7, replace(NO_ROOM, cause=Cause.NONE), None))
    assert stopped.state is State.STOPPED
    assert not any(isinstance(effect, Spawn) for effect in effects)
    assert (stopped.restarts, stopped.launched_at) == (0, None)


def test_requests_in_line_have_an_evicted_model_loaded_again() -> None:
    evicting, _ = go(LifecycleState(state=State.READY, generation=7), Evict())
    assert (evicting.is_up_or_starting, evicting.loading_on_demand) == (True, True)
    stopping, _ = go(evicting, Emptied(7, demand=True))
    assert (shown(stopping), stopping.reason) == ("STOPPING>STARTING", StartReason.DEMAND)
    idle, _ = go(evicting, Emptied(7, demand=False))
    assert (shown(idle), idle.unloaded, idle.is_up_or_starting) == ("STOPPING>UNLOADED", True, False)


def test_a_person_unloads_whatever_is_under_way() -> None:
    for m in machines():
        after, _ = go(m, Unload(demand=True))
        if m.next not in (State.STOPPED, State.FAILED):
            assert after.next is State.UNLOADED, shown(m)


def test_a_denial_of_memory_that_a_person_ends_delays_no_request() -> None:
    denied, _ = go(LifecycleState(state=State.STARTING, generation=7), Declined(7, NO_ROOM, 30.0))
    unloaded, _ = go(denied, Unload(demand=False))
    assert go(unloaded, Load(StartReason.DEMAND))[0].state is State.STARTING
    backing_off = LifecycleState(state=State.BACKOFF, generation=7, retry_at=130.0)
    unloaded, _ = go(backing_off, Unload(demand=False))
    assert go(unloaded, Load(StartReason.DEMAND))[0].state is State.BACKOFF, "a failure does"


def test_a_load_does_not_shorten_the_back_off_of_a_process_on_its_way_out() -> None:
    failing, _ = go(LifecycleState(state=State.STARTING, generation=7, history=History((99.0,), 3)), Failed(7, WEDGE))
    unloading, _ = go(failing, Unload(demand=False))
    loading, _ = go(unloading, Load(StartReason.DEMAND))
    after, effects = go(loading, Exited(7, CRASH))
    assert (after.state, effects[1]) == (State.BACKOFF, WakeAfter(7, 8.0))


def test_a_replica_that_is_needed_no_more_is_unloaded_when_its_back_off_is_over() -> None:
    backing_off = LifecycleState(state=State.BACKOFF, generation=7)
    assert go(backing_off, Woke(7, wanted=True))[0].state is State.STARTING
    assert go(backing_off, Woke(7, wanted=False)) == (
        replace(backing_off, state=State.UNLOADED, since=100.0, owed=True),
        (),
    )


def test_a_replica_that_failed_in_use_comes_back_without_a_request() -> None:
    ready = LifecycleState(state=State.READY, generation=7, reason=StartReason.DEMAND)
    assert go(ready, Exited(7, CRASH))[0].reason is StartReason.RECOVERY
    starting = replace(ready, state=State.STARTING)
    assert go(starting, Exited(7, CRASH))[0].reason is StartReason.DEMAND
    recycling, _ = go(ready, Recycle())
    assert go(recycling, Exited(7, CRASH))[0].reason is StartReason.RECOVERY
    evicting, _ = go(ready, Evict())
    after, _ = go(evicting, Exited(7, CRASH))
    assert (after.state, after.reason) == (State.BACKOFF, StartReason.RECOVERY), "requests may wait for it"


def test_a_request_keeps_the_history_and_the_back_off() -> None:
    failed_once = History((90.0,), streak=1)
    unloaded = LifecycleState(state=State.UNLOADED, generation=7, history=failed_once, retry_at=130.0)
    waiting, effects = go(unloaded, Load(StartReason.DEMAND))
    assert (waiting.state, effects) == (State.BACKOFF, (WakeAfter(7, 30.0),))
    loading, _ = go(unloaded, Load(StartReason.DEMAND), now=130.0)
    assert (loading.state, loading.history) == (State.STARTING, failed_once)
    failed = replace(unloaded, state=State.FAILED, gave_up="3 failures")
    assert go(failed, Load(StartReason.DEMAND)) == (failed, ()), "only a person starts it again"


def test_restarts_are_processes_launched_after_a_failure_or_by_command() -> None:
    def launched(m: LifecycleState, now: float) -> LifecycleState:
        return go(go(m, Launched(m.generation), now)[0], Proven(m.generation), now + 1)[0]

    def stopped(m: LifecycleState, now: float) -> LifecycleState:
        return go(m, Exited(m.generation, ASKED), now)[0]

    m = launched(go(LifecycleState(state=State.UNLOADED), Load(StartReason.DEMAND), 1.0)[0], 2.0)
    assert m.restarts == 0
    m = stopped(go(go(m, Unload(demand=False), 10.0)[0], Emptied(1, demand=False), 10.0)[0], 11.0)
    m = launched(go(m, Load(StartReason.DEMAND), 12.0)[0], 13.0)
    assert (m.generation, m.restarts) == (2, 0), "it was only needed again"
    m = launched(go(go(m, Exited(2, CRASH), 20.0)[0], Woke(2, wanted=True), 21.0)[0], 22.0)
    assert m.restarts == 1
    m = launched(stopped(go(m, Restart(), 30.0)[0], 31.0), 32.0)
    assert m.restarts == 2
    m = stopped(go(go(m, Recycle(), 40.0)[0], Emptied(4, demand=False), 40.0)[0], 41.0)
    m = launched(m, 42.0)
    assert m.restarts == 2
    m = stopped(go(go(m, Unload(demand=False), 50.0)[0], Emptied(5, demand=False), 50.0)[0], 51.0)
    m, _ = go(go(m, Load(StartReason.DEMAND), 52.0)[0], Declined(6, NO_ROOM, None), 53.0)
    assert launched(go(m, Load(StartReason.DEMAND), 54.0)[0], 55.0).restarts == 2, "a denial is no failure"


def test_what_was_never_launched_has_no_restarts() -> None:
    m = LifecycleState()
    for n in range(1, 121):
        m, _ = go(m, Restart(), float(n))
        m, _ = go(m, Exited(n, NO_MODEL), float(n))
    assert (m.generation, m.restarts) == (120, 0)


@pytest.mark.parametrize("generation", [0, 6, 8])
def test_news_of_another_life_changes_nothing(generation: int) -> None:
    for m, event in product(machines(), events(generation)):
        if event not in COMMANDS:
            assert go(m, event) == (m, ())


def test_a_life_from_start_to_stop() -> None:
    m, effects = go(LifecycleState(), Start(), now=10.0)
    assert (m.state, effects) == (State.STARTING, (Spawn(1),))
    m, _ = go(m, Launched(1), now=10.0)
    m, _ = go(m, Proven(1), now=18.0)
    assert (m.state, m.proven, m.start_seconds, m.since) == (State.READY, True, 8.0, 18.0)
    m, _ = go(m, Drain(), now=20.0)
    m, effects = go(m, Emptied(1, demand=False), now=21.0)
    assert effects == (Terminate(1),)
    m, effects = go(m, Exited(1, ASKED), now=22.0)
    assert (m.state, effects) == (State.STOPPED, (AbortCalls(1, ASKED),))
    assert m.last_failure is None
    assert m.history == History()


def test_our_own_stop_is_no_crash_whatever_the_exit_status() -> None:
    for then in TARGETS:
        m = LifecycleState(state=State.STOPPING, then=then, generation=1, retry_at=105.0)
        after, _ = go(m, Exited(1, CRASH))
        assert after.last_failure is None
        assert after.history == History()


def test_a_condemned_process_counts_once() -> None:
    m = LifecycleState(state=State.READY, generation=3, proven=True, since=90.0)
    m, effects = go(m, Failed(3, WEDGE), now=100.0)
    assert effects == (AbortCalls(3, WEDGE), Terminate(3))
    assert m.retry_at == 101.0
    m, effects = go(m, Exited(3, CRASH), now=100.4)
    assert m.state is State.BACKOFF
    assert m.last_failure is WEDGE
    assert len(m.history.failures) == 1
    (abort, wake) = effects
    assert abort == AbortCalls(3, CRASH)
    assert isinstance(wake, WakeAfter)
    assert wake.delay == pytest.approx(0.6)


def test_a_process_slower_to_stop_than_its_back_off_starts_at_once() -> None:
    m = LifecycleState(state=State.STOPPING, then=State.BACKOFF, generation=3, retry_at=101.0)
    _, effects = go(m, Exited(3, CRASH), now=115.0)
    assert effects[1] == WakeAfter(3, 0.0)


def test_one_that_crashes_again_and_again_goes_on_and_start_forgives() -> None:
    m, _ = go(LifecycleState(), Start(), now=0.0)
    for n in range(1, POLICY.max_failures):
        m, effects = go(m, Exited(n, CRASH), now=float(n))
        assert (m.state, m.crash_looping) == (State.BACKOFF, False)
        assert effects[1] == WakeAfter(n, 2.0 ** (n - 1))
        m, _ = go(m, Woke(n, wanted=True), now=float(n) + 0.5)
    m, effects = go(m, Exited(3, CRASH), now=5.0)
    assert (m.state, m.crash_looping, m.gave_up) == (State.BACKOFF, True, "")
    assert effects == (AbortCalls(3, CRASH), WakeAfter(3, 60.0))
    assert not go(m, Start(), now=6.0)[0].crash_looping
    m, _ = go(m, Woke(3, wanted=True), now=65.0)
    assert m.crash_looping, "while it starts, too"
    m, _ = go(m, Proven(4), now=70.0)
    assert not m.crash_looping, "it is back"
    m, effects = go(m, Exited(4, CRASH), now=400.0 - 275.0)
    assert m.crash_looping, "it has not answered a request"
    assert effects[1] == WakeAfter(4, 60.0)
    m, _ = go(go(m, Woke(4, wanted=True), now=190.0)[0], Proven(5), now=195.0)
    m, _ = go(m, Answered(5), now=196.0)
    assert m.history == History(failed_at=125.0)
    m, effects = go(m, Exited(5, CRASH), now=196.5)
    assert not m.crash_looping
    assert effects[1] == WakeAfter(5, 1.0)


def live(m: LifecycleState, failure: Failure, *, until: str, now: float) -> Step:
    """One life of a replica that is to be started; it fails one second after ``until``."""
    m, _ = go(m, Woke(m.generation, wanted=True) if m.state is State.BACKOFF else Start(), now=now)
    m, _ = go(m, Launched(m.generation), now=now)
    if until != "launch":
        m, _ = go(m, Proven(m.generation), now=now + 5)
    if until == "answer":
        m, _ = go(m, Answered(m.generation), now=now + 6)
    m, _ = go(m, Failed(m.generation, failure), now=now + 7)
    return go(m, Exited(m.generation, failure), now=now + 7.1)


@pytest.mark.parametrize("blame", [Blame.BACKEND, Blame.MACHINE])
@pytest.mark.parametrize("until", ["launch", "readiness", "answer"])
@pytest.mark.parametrize("cause", Cause)
def test_who_is_given_up_who_loops_and_who_comes_back_soon(cause: Cause, until: str, blame: Blame) -> None:
    """Each life fails with that cause, at that point."""
    failure = Failure(cause, Aftermath.EXITED, "it died", blame=blame)
    m = LifecycleState()
    delays = []
    for n in range(POLICY.max_failures):
        assert m.state is not State.FAILED
        m, effects = live(m, failure, until=until, now=30.0 * n)
        delays += [effect.delay for effect in effects if isinstance(effect, WakeAfter)]
    lasting = {Cause.LOAD_FAILURE, Cause.DEPENDENCY, Cause.MODEL_NOT_FOUND, Cause.DISTRIBUTED}
    given_up = until == "launch" and cause in lasting and blame is not Blame.MACHINE
    assert m.state is (State.FAILED if given_up else State.BACKOFF)
    assert m.crash_looping == (until != "answer" and not given_up)
    assert m.recovers == (not given_up or cause is Cause.DISTRIBUTED), "other hosts may be back unseen"
    wait = pytest.approx(POLICY.min_backoff - 0.1)  # it is counted from the failure on
    if until == "answer":
        assert delays == [wait] * POLICY.max_failures
        assert m.history.streak == 0
    else:
        assert delays == sorted(delays)
        assert given_up or delays[-1] == pytest.approx(POLICY.max_backoff - 0.1)
        assert m.history.streak == POLICY.max_failures


def test_twenty_kills_of_one_that_answers_in_between() -> None:
    m, killed = LifecycleState(), Failure(Cause.KILLED, Aftermath.EXITED, "a:0 was killed", exit=-9)
    for n in range(20):
        m, effects = live(m, killed, until="answer", now=15.0 * n)
        assert (m.state, m.crash_looping, m.history.streak) == (State.BACKOFF, False, 0)
        (delay,) = [effect.delay for effect in effects if isinstance(effect, WakeAfter)]
        assert delay == pytest.approx(POLICY.min_backoff - 0.1)


def test_an_answer_of_an_earlier_life_counts_for_that_one() -> None:
    m, _ = live(LifecycleState(), CRASH, until="answer", now=0.0)
    m, _ = live(m, CRASH, until="readiness", now=10.0)
    assert (m.answered, m.history.streak) == (False, 1)
    m, _ = go(m, Woke(m.generation, wanted=True), now=20.0)
    m, _ = go(m, Proven(m.generation), now=25.0)
    assert go(m, Answered(m.generation - 1), now=26.0) == (m, ())


@pytest.mark.parametrize("proven", [False, True])
def test_what_never_was_ready_is_given_up_for_the_same_hopeless_failure(*, proven: bool) -> None:
    m, _ = go(LifecycleState(proven=proven), Start(), now=0.0)
    for n in range(1, POLICY.max_failures):
        m, effects = go(m, Exited(n, NO_MODEL), now=1000.0 * n)
        assert m.state is State.BACKOFF
        assert effects[1:] == (WakeAfter(n, 2.0 ** (n - 1)), Watch(n)), "it may be put there at any moment"
        m, _ = go(m, Woke(n, wanted=True), now=1000.0 * n + 9)
    m, effects = go(m, Exited(3, NO_MODEL), now=5000.0)
    if proven:
        assert m.state is State.BACKOFF
        return
    assert (m.state, effects, eta(m, 5000.0)) == (State.FAILED, (AbortCalls(3, NO_MODEL), Watch(3)), None)
    assert m.gave_up == "it has never been ready, and has failed 3 times in a row in the same way"
    m, effects = go(m, Start(), now=6.0)
    assert (m.gave_up, m.history, effects) == ("", History(), (Spawn(4),))


def test_a_distributed_model_that_was_given_up_is_tried_now_and_then() -> None:
    """Another host may be back, which no file shows."""
    apart = Failure(Cause.DISTRIBUTED, Aftermath.EXITED, "no peer")
    m = LifecycleState(state=State.STARTING, generation=1, history=History((), 2, cause=Cause.DISTRIBUTED, alike=2))
    m, _ = go(m, Exited(1, apart), now=100.0)
    assert (m.state, m.retry_at, eta(m, 100.0)) == (State.FAILED, 160.0, 65.0)
    m, effects = go(m, Mended(1, wanted=True, unseen=True), now=160.0)
    assert (m.state, effects) == (State.STARTING, (Spawn(2),))
    assert go(m, Exited(2, apart), now=165.0)[0].state is State.FAILED, "one try is enough"


def test_what_mends_itself_in_back_off_is_started_at_once() -> None:
    m = LifecycleState(state=State.BACKOFF, generation=3, history=History((1.0,), 1), retry_at=160.0)
    m, effects = go(m, Mended(3, wanted=True))
    assert (m.state, m.history, effects) == (State.STARTING, History(), (Spawn(4),))
    assert go(m, Woke(3, wanted=True)) == (m, ()), "the alarm of the back-off rings in vain"


def test_a_lack_of_memory_does_not_hide_why_it_cannot_load() -> None:
    m = LifecycleState(state=State.STARTING, generation=2, last_failure=NO_MODEL, history=History((1.0,), 1, alike=1))
    after, _ = go(m, Declined(2, NO_ROOM, None))
    assert (after.state, after.last_failure, after.denied_at) == (State.UNLOADED, NO_MODEL, 100.0)
    assert go(replace(m, came_up=True), Declined(2, NO_ROOM, None))[0].last_failure is NO_ROOM


def test_one_that_was_given_up_and_mended_is_loaded_where_it_is_wanted() -> None:
    failed = LifecycleState(
        state=State.FAILED, generation=3, history=History((1.0,), 1), gave_up="5 failures", retry_at=9.0
    )
    m, effects = go(failed, Mended(3, wanted=True))
    assert (m.state, m.history, m.gave_up, effects) == (State.STARTING, History(), "", (Spawn(4),))
    assert go(failed, Mended(3, wanted=True, unseen=True))[0].history == failed.history, "it may be given up at once"
    m, effects = go(failed, Mended(3, wanted=False))
    assert (m.state, m.history, m.gave_up, effects) == (State.UNLOADED, History(), "", ())
    m, effects = go(m, Load(StartReason.DEMAND))
    assert (m.state, effects) == (State.STARTING, (Spawn(4),))
    assert go(failed, Mended(2, wanted=True)) == (failed, ())


def test_one_that_has_served_has_served_whoever_starts_it() -> None:
    failed = LifecycleState(state=State.BACKOFF, generation=1, proven=True, retry_at=160.0, start_seconds=5.0)
    for event in (Start(), Restart()):
        assert go(failed, event)[0].proven
        stopping, _ = go(replace(failed, state=State.STOPPING, then=State.BACKOFF), event)
        assert stopping.proven
        assert eta(stopping, 100.0) == 5.0, "the back-off is forgotten"


def test_a_restart_while_it_gives_up_is_a_fresh_chance() -> None:
    full = History((1.0, 2.0, 3.0), streak=3)
    m = LifecycleState(
        state=State.STOPPING, then=State.FAILED, gave_up="3 failures", generation=1, history=full, proven=True
    )
    m, _ = go(m, Restart())
    m, _ = go(m, Exited(1, CRASH))
    assert (m.state, m.generation, m.gave_up) == (State.STARTING, 2, "")
    m, _ = go(m, Exited(2, CRASH))
    assert m.state is State.BACKOFF


@pytest.mark.parametrize("state", [State.FAILED, State.STOPPING])
def test_who_was_told_to_stop_has_not_given_up(state: State) -> None:
    after, _ = go(LifecycleState(state=state, then=State.FAILED, gave_up="5 failures within 300 s"), Stop())
    assert after.gave_up == ""


def test_good_service_is_rewarded_with_a_short_back_off() -> None:
    old = History((1.0, 2.0), streak=2)
    ready = LifecycleState(state=State.READY, generation=1, proven=True, since=1000.0, history=old)
    short, _ = go(ready, Exited(1, CRASH), now=1000.0 + POLICY.max_backoff - 1)
    long, _ = go(ready, Exited(1, CRASH), now=1000.0 + POLICY.max_backoff)
    assert (short.history.streak, long.history.streak) == (3, 0)
    starting, _ = go(replace(ready, state=State.STARTING), Exited(1, CRASH), now=5000.0)
    assert starting.history.streak == 3


def test_how_long_a_start_takes_is_learned() -> None:
    m = LifecycleState(state=State.STARTING, generation=1, launched_at=0.0)
    assert (m.start_seconds, eta(m, 1.0)) == (None, lifecycle.FIRST_START - 1.0)
    m, _ = go(m, Proven(1), now=30.0)
    assert m.start_seconds == 30.0
    m, _ = go(replace(m, state=State.STARTING, started_at=50.0, launched_at=100.0), Proven(1), now=110.0)
    assert m.start_seconds == 10.0, "the wait for memory before the launch is not counted"
    m, _ = go(replace(m, state=State.STARTING), Proven(1), now=130.0)
    assert m.start_seconds == 20.0, "a longer one counts by half"
    m, _ = go(replace(m, state=State.STARTING), Proven(1, downloaded=True), now=700.0)
    assert m.start_seconds == 20.0, "a restart has nothing to fetch"


def test_what_an_earlier_gateway_has_measured_is_the_first_estimate() -> None:
    m = LifecycleState(state=State.UNLOADED, start_seconds=30.0)
    assert eta(m, 100.0) == 30.0
    m = replace(m, state=State.STARTING, generation=1, launched_at=0.0)
    assert go(m, Proven(1), now=20.0)[0].start_seconds == 20.0


@pytest.mark.parametrize(
    ("machine", "expected"),
    [
        (LifecycleState(state=State.READY), 0.0),
        (LifecycleState(state=State.STARTING, started_at=90.0, launched_at=98.0, start_seconds=10.0), 8.0),
        (LifecycleState(state=State.STARTING, launched_at=90.0, start_seconds=10.0), 0.5),
        (LifecycleState(state=State.STARTING, launched_at=70.0, start_seconds=10.0), 20.0),
        (LifecycleState(state=State.STARTING, started_at=90.0, launched_at=80.0, start_seconds=10.0), 10.0),
        (LifecycleState(state=State.WAITING_FOR_MEMORY, waiting_for="others", start_seconds=10.0), 10.0),
        (LifecycleState(state=State.BACKOFF, retry_at=103.0, start_seconds=10.0), 13.0),
        (LifecycleState(state=State.BACKOFF, retry_at=3.0, start_seconds=10.0), 10.0),
        (LifecycleState(state=State.STOPPING, then=State.BACKOFF, retry_at=103.0, start_seconds=10.0), 13.0),
        (LifecycleState(state=State.STOPPING, then=State.STARTING, start_seconds=10.0), 10.0),
        (LifecycleState(state=State.STOPPING, then=State.STOPPED), None),
        (LifecycleState(state=State.STOPPING, then=State.FAILED), None),
        (LifecycleState(state=State.DRAINING), None),
        (LifecycleState(state=State.DRAINING, then=State.UNLOADED, start_seconds=10.0), 10.0),
        (LifecycleState(state=State.UNLOADED, start_seconds=10.0), 10.0),
        (LifecycleState(state=State.UNLOADED, retry_at=103.0, start_seconds=10.0), 13.0),
        (LifecycleState(state=State.STOPPED), None),
        (LifecycleState(state=State.FAILED), None),
        (LifecycleState(state=State.FAILED, retry_at=103.0, start_seconds=10.0), 13.0),
    ],
    ids=lambda value: shown(value) if isinstance(value, LifecycleState) else "eta",
)
def test_when_it_can_answer_again(machine: LifecycleState, expected: float | None) -> None:
    assert eta(machine, 100.0) == expected


@pytest.mark.parametrize(
    ("state", "start_seconds", "launched_at", "known"),
    [
        (State.STARTING, None, 95.0, False),
        (State.STARTING, 10.0, 95.0, True),
        (State.STARTING, 10.0, 89.0, False),
        (State.BACKOFF, 10.0, 50.0, True),
        (State.BACKOFF, None, 50.0, False),
        (State.READY, 10.0, 50.0, True),
    ],
)
def test_an_eta_is_a_guess_before_the_first_load_and_where_one_is_late(
    state: State, start_seconds: float | None, launched_at: float, known: bool
) -> None:
    m = LifecycleState(state=state, start_seconds=start_seconds, launched_at=launched_at)
    assert eta_known(m, 100.0) == known


@pytest.mark.parametrize(
    ("what", "known"),
    [
        ("waits for memory: 1.0 GiB available, needs 6.0 GiB; PID 7 (hog) holds 9.0 GiB", False),
        ("waits for other models to be unloaded", True),
    ],
)
def test_nobody_knows_when_others_give_memory_back(what: str, known: bool) -> None:
    m = LifecycleState(state=State.WAITING_FOR_MEMORY, waiting_for=what, start_seconds=10.0)
    assert (eta(m, 100.0), eta_known(m, 100.0)) == (10.0, known)


@pytest.mark.parametrize("machine", [*machines()], ids=shown)
def test_when_it_is_tried_again(machine: LifecycleState) -> None:
    by_the_clock = {"BACKOFF", "STOPPING>BACKOFF", "DENIED", "FAILED", "STOPPING>FAILED"}
    assert retry_in(replace(machine, retry_at=103.0), 100.0) == (3.0 if shown(machine) in by_the_clock else None)
    assert retry_in(replace(machine, retry_at=99.0), 100.0) == (0.0 if shown(machine) in by_the_clock else None)
    assert not machine.given_up or retry_in(replace(machine, retry_at=0.0), 100.0) is None


@pytest.mark.parametrize("machine", [*machines()], ids=shown)
def test_who_comes_back_without_being_asked(machine: LifecycleState) -> None:
    at_once = {"READY", "STARTING", "WAITING", "BACKOFF", "STOPPING>STARTING", "STOPPING>BACKOFF"}
    expected = {*at_once, "EVICTING>UNLOADED", "DRAINING>STARTING"}
    assert machine.recovers == (shown(machine) in expected or machine.given_up)
    assert not replace(machine, retry_at=0.0).recovers or not machine.given_up, "given up, with no next try"
    assert machine.given_up == (shown(machine) in {"FAILED", "STOPPING>FAILED"})


@pytest.mark.parametrize("reason", StartReason)
@pytest.mark.parametrize("machine", [*machines()], ids=shown)
def test_what_loads_for_requests_comes_back(machine: LifecycleState, reason: StartReason) -> None:
    """Else a request would be sent to a replica that refuses it, again and again."""
    machine = replace(machine, reason=reason)
    assert machine.recovers or not machine.loading_on_demand


# -- any conversation at all -----------------------------------------------------------------------------------------


class World(RuleBasedStateMachine):
    """The actor and the operating system in small: processes, and who was told what."""

    def __init__(self) -> None:
        super().__init__()
        self.m = LifecycleState()
        self.now = 0.0
        self.alive: set[int] = set()
        self.told_to_end: set[int] = set()
        self.born: set[int] = set()
        self.alarms: list[tuple[float, int]] = []
        self.wanted = False  # what the last of start and stop said

    def post(self, event: Event, chance: float = 0.5) -> None:
        before = self.m
        self.m, effects = step(before, event, policy=POLICY, now=self.now, chance=chance)
        if before.state is State.FAILED and not isinstance(event, Start | Restart | Stop | Mended):
            assert self.m.state is State.FAILED
        check_invariants(self.m)
        for effect in effects:
            match effect:
                case Spawn(generation=generation):
                    assert generation not in self.born
                    self.born.add(generation)
                    self.alive.add(generation)
                case Terminate(generation=generation):
                    assert generation in self.alive
                    self.told_to_end.add(generation)
                case AbortCalls(generation=generation):
                    assert generation == before.generation
                case WakeAfter(generation=generation, delay=delay):
                    assert delay >= 0
                    self.alarms.append((self.now + delay, generation))
                case Refuse():
                    assert self.m is before

    @rule(command=st.sampled_from([Start(), Restart()]))
    def wish_for_it(self, command: Start | Restart) -> None:
        self.wanted = True
        self.post(command)

    @rule()
    def stop(self) -> None:
        self.wanted = False
        self.post(Stop())

    @rule()
    def drain(self) -> None:
        self.post(Drain())

    @rule(command=st.sampled_from([Load(StartReason.DEMAND), Unload(demand=False), Evict(), Recycle(), Keep()]))
    def memory_and_demand(self, command: Load | Unload | Evict | Recycle | Keep) -> None:
        self.post(command)

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def a_launch_goes_on(self, data: st.DataObject) -> None:
        generation = min(self.alive)
        news: list[Event] = [Waiting(generation, "others"), Granted(generation), Launched(generation)]
        self.post(data.draw(st.sampled_from(news)))

    @precondition(lambda self: self.alive)
    @rule(failure=st.sampled_from([CRASH, NO_MODEL]), chance=st.floats(0, 1, exclude_max=True))
    def a_process_ends(self, failure: Failure, chance: float) -> None:
        generation = self.alive.pop()
        self.post(Exited(generation, failure), chance)

    @precondition(lambda self: self.alive)
    @rule()
    def a_process_is_proven(self) -> None:
        self.post(Proven(min(self.alive)))

    @precondition(lambda self: self.alive)
    @rule()
    def a_request_is_answered(self) -> None:
        self.post(Answered(min(self.alive)))

    @precondition(lambda self: self.alive)
    @rule(chance=st.floats(0, 1, exclude_max=True))
    def a_process_is_condemned(self, chance: float) -> None:
        self.post(Failed(min(self.alive), WEDGE), chance)

    @precondition(lambda self: self.alive)
    @rule()
    def it_has_emptied(self) -> None:
        self.post(Emptied(min(self.alive), demand=bool(len(self.born) % 2)))

    @precondition(lambda self: self.alarms)
    @rule()
    def an_alarm_rings(self) -> None:
        at, generation = min(self.alarms)
        self.alarms.remove((at, generation))
        self.now = max(self.now, at)
        self.post(Woke(generation, wanted=bool(len(self.born) % 2)))

    @precondition(lambda self: self.born - self.alive)
    @rule(data=st.data())
    def old_news_comes_again(self, data: st.DataObject) -> None:
        generation = data.draw(st.sampled_from(sorted(self.born - self.alive)))
        news: list[Event] = [Proven(generation), Exited(generation, CRASH), Failed(generation, WEDGE)]
        self.post(data.draw(st.sampled_from(news)))

    @rule(seconds=st.floats(0, 400))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def one_process_at_most(self) -> None:
        assert len(self.alive) <= 1

    @invariant()
    def the_machine_knows_whether_there_is_one(self) -> None:
        assert bool(self.alive) == (not self.m.idle)
        assert self.alive <= {self.m.generation}

    @invariant()
    def what_was_stopped_stays_stopped(self) -> None:
        if not self.wanted:
            assert self.m.next is State.STOPPED

    @invariant()
    def whoever_is_stopping_was_told_to_end(self) -> None:
        if self.m.state is State.STOPPING:
            assert self.m.generation in self.told_to_end

    @invariant()
    def whoever_backs_off_will_wake(self) -> None:
        if self.m.state is State.BACKOFF:
            assert self.m.generation in {generation for _, generation in self.alarms}

    @invariant()
    def whoever_has_answered_is_back_soon(self) -> None:
        if self.m.answered and self.m.next is State.BACKOFF:
            assert self.m.retry_at == self.m.last_failure_at + POLICY.min_backoff
            assert not self.m.crash_looping

    @invariant()
    def what_has_been_ready_is_not_given_up(self) -> None:
        assert not (self.m.proven and self.m.given_up)

    @invariant()
    def it_gives_up_with_a_reason(self) -> None:
        if self.m.state is State.FAILED:
            assert self.m.gave_up
            assert lifecycle.eta(self.m, self.now) is None


TestWorld = World.TestCase
TestWorld.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)

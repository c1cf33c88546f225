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

from backends.domain.failure import Aftermath, Blame, Cause, Failure
from backends.domain.spec import RestartPolicy
from backends.domain.state import State
from backends.replica import lifecycle
from backends.replica.lifecycle import (
    AbortCalls,
    Declined,
    Drain,
    Emptied,
    Event,
    Exited,
    Failed,
    LifecycleState,
    Proven,
    Refuse,
    Restart,
    Spawn,
    Start,
    Step,
    Stop,
    Terminate,
    WakeAfter,
    Woke,
    eta,
    step,
)
from backends.replica.restart_policy import History

POLICY = RestartPolicy(min_backoff=1.0, max_backoff=60.0, max_failures=3, window=300.0)
CRASH = Failure(Cause.NATIVE_CRASH, Aftermath.EXITED, "a:0 died", exit=-6)
WEDGE = Failure(Cause.WEDGE, Aftermath.WEDGED, "a:0 is being replaced")
NO_MODEL = Failure(Cause.MODEL_NOT_FOUND, Aftermath.EXITED, "no such model", blame=Blame.OPERATOR)
NO_ROOM = Failure(Cause.LOAD_FAILURE, Aftermath.NOT_LAUNCHED, "a:0 needs 9 GiB", code="insufficient_memory")
ASKED = Failure(Cause.NONE, Aftermath.EXITED, "a:0 was stopped by the gateway", blame=Blame.GATEWAY)

LOCAL = [state for state in State if state is not State.UNREACHABLE]
RUNNING = (State.STARTING, State.READY, State.DRAINING)
WITHOUT_PROCESS = (State.STOPPED, State.BACKOFF, State.FAILED)
TARGETS = (State.STOPPED, State.STARTING, State.BACKOFF, State.FAILED)


def go(m: LifecycleState, event: Event, now: float = 100.0, chance: float = 0.5) -> Step:
    return step(m, event, policy=POLICY, now=now, chance=chance)


def machines(generation: int = 7) -> Iterator[LifecycleState]:
    for state in LOCAL:
        for then in TARGETS if state is State.STOPPING else (State.STOPPED,):
            yield LifecycleState(
                state=state, then=then, generation=generation, since=50.0, started_at=40.0, retry_at=130.0
            )


def events(generation: int) -> list[Event]:
    of_life: list[Event] = [
        Proven(generation),
        Failed(generation, WEDGE),
        Exited(generation, CRASH),
        Declined(generation, NO_ROOM, None),
        Emptied(generation),
        Woke(generation),
    ]
    return [Start(), Stop(), Restart(), Drain(), *of_life]


BEFORE_AND_AFTER = """
STOPPED   Start    STARTING   Spawn
STOPPED   Stop     STOPPED    -
STOPPED   Restart  STARTING   Spawn
STOPPED   Drain    STOPPED    Refuse
STOPPED   Proven   STOPPED    -
STOPPED   Failed   STOPPED    -
STOPPED   Exited   STOPPED    -
STOPPED   Declined STOPPED    -
STOPPED   Emptied  STOPPED    -
STOPPED   Woke     STOPPED    -
STARTING  Start    STARTING   Refuse
STARTING  Stop     STOPPING>STOPPED   Terminate
STARTING  Restart  STOPPING>STARTING  Terminate
STARTING  Drain    STARTING   Refuse
STARTING  Proven   READY      -
STARTING  Failed   STOPPING>BACKOFF   AbortCalls Terminate
STARTING  Exited   BACKOFF    AbortCalls WakeAfter
STARTING  Declined STOPPED    -
STARTING  Emptied  STARTING   -
STARTING  Woke     STARTING   -
READY     Start    READY      Refuse
READY     Stop     STOPPING>STOPPED   Terminate
READY     Restart  STOPPING>STARTING  Terminate
READY     Drain    DRAINING   -
READY     Proven   READY      -
READY     Failed   STOPPING>BACKOFF   AbortCalls Terminate
READY     Exited   BACKOFF    AbortCalls WakeAfter
READY     Declined READY      -
READY     Emptied  READY      -
READY     Woke     READY      -
DRAINING  Start    READY      -
DRAINING  Stop     STOPPING>STOPPED   Terminate
DRAINING  Restart  STOPPING>STARTING  Terminate
DRAINING  Drain    DRAINING   Refuse
DRAINING  Proven   DRAINING   -
DRAINING  Failed   STOPPING>STOPPED   AbortCalls Terminate
DRAINING  Exited   STOPPED    AbortCalls
DRAINING  Declined DRAINING   -
DRAINING  Emptied  STOPPING>STOPPED   Terminate
DRAINING  Woke     DRAINING   -
STOPPING>STOPPED   Start    STOPPING>STARTING  -
STOPPING>STOPPED   Stop     STOPPING>STOPPED   -
STOPPING>STOPPED   Restart  STOPPING>STARTING  -
STOPPING>STOPPED   Drain    STOPPING>STOPPED   Refuse
STOPPING>STOPPED   Proven   STOPPING>STOPPED   -
STOPPING>STOPPED   Failed   STOPPING>STOPPED   -
STOPPING>STOPPED   Exited   STOPPED            AbortCalls
STOPPING>STOPPED   Declined STOPPED            AbortCalls
STOPPING>STOPPED   Emptied  STOPPING>STOPPED   -
STOPPING>STOPPED   Woke     STOPPING>STOPPED   -
STOPPING>STARTING  Start    STOPPING>STARTING  -
STOPPING>STARTING  Stop     STOPPING>STOPPED   -
STOPPING>STARTING  Restart  STOPPING>STARTING  -
STOPPING>STARTING  Drain    STOPPING>STARTING  Refuse
STOPPING>STARTING  Proven   STOPPING>STARTING  -
STOPPING>STARTING  Failed   STOPPING>STARTING  -
STOPPING>STARTING  Exited   STARTING           AbortCalls Spawn
STOPPING>STARTING  Declined STARTING           AbortCalls Spawn
STOPPING>STARTING  Emptied  STOPPING>STARTING  -
STOPPING>STARTING  Woke     STOPPING>STARTING  -
STOPPING>BACKOFF   Start    STOPPING>STARTING  -
STOPPING>BACKOFF   Stop     STOPPING>STOPPED   -
STOPPING>BACKOFF   Restart  STOPPING>STARTING  -
STOPPING>BACKOFF   Drain    STOPPING>BACKOFF   Refuse
STOPPING>BACKOFF   Proven   STOPPING>BACKOFF   -
STOPPING>BACKOFF   Failed   STOPPING>BACKOFF   -
STOPPING>BACKOFF   Exited   BACKOFF            AbortCalls WakeAfter
STOPPING>BACKOFF   Declined BACKOFF            AbortCalls WakeAfter
STOPPING>BACKOFF   Emptied  STOPPING>BACKOFF   -
STOPPING>BACKOFF   Woke     STOPPING>BACKOFF   -
STOPPING>FAILED    Start    STOPPING>STARTING  -
STOPPING>FAILED    Stop     STOPPING>STOPPED   -
STOPPING>FAILED    Restart  STOPPING>STARTING  -
STOPPING>FAILED    Drain    STOPPING>FAILED    Refuse
STOPPING>FAILED    Proven   STOPPING>FAILED    -
STOPPING>FAILED    Failed   STOPPING>FAILED    -
STOPPING>FAILED    Exited   FAILED             AbortCalls
STOPPING>FAILED    Declined FAILED             AbortCalls
STOPPING>FAILED    Emptied  STOPPING>FAILED    -
STOPPING>FAILED    Woke     STOPPING>FAILED    -
BACKOFF   Start    STARTING   Spawn
BACKOFF   Stop     STOPPED    -
BACKOFF   Restart  STARTING   Spawn
BACKOFF   Drain    BACKOFF    Refuse
BACKOFF   Proven   BACKOFF    -
BACKOFF   Failed   BACKOFF    -
BACKOFF   Exited   BACKOFF    -
BACKOFF   Declined BACKOFF    -
BACKOFF   Emptied  BACKOFF    -
BACKOFF   Woke     STARTING   Spawn
FAILED    Start    STARTING   Spawn
FAILED    Stop     STOPPED    -
FAILED    Restart  STARTING   Spawn
FAILED    Drain    FAILED     Refuse
FAILED    Proven   FAILED     -
FAILED    Failed   FAILED     -
FAILED    Exited   FAILED     -
FAILED    Declined FAILED     -
FAILED    Emptied  FAILED     -
FAILED    Woke     FAILED     -
"""
ROWS = [tuple(line.split(maxsplit=3)) for line in BEFORE_AND_AFTER.strip().splitlines()]


def shown(m: LifecycleState) -> str:
    return f"STOPPING>{m.then.name}" if m.state is State.STOPPING else m.state.name


def test_the_table_is_complete() -> None:
    pairs = {(shown(m), type(event).__name__) for m in machines() for event in events(7)}
    assert pairs == {(row[0], row[1]) for row in ROWS}
    assert len(ROWS) == len({row[:2] for row in ROWS})


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0]}-{row[1]}")
def test_each_state_and_event(row: tuple[str, str, str, str]) -> None:
    before = next(m for m in machines() if shown(m) == row[0])
    event = next(e for e in events(7) if type(e).__name__ == row[1])
    after, effects = go(before, event)
    assert shown(after) == row[2]
    assert [type(effect).__name__ for effect in effects] == ([] if row[3] == "-" else row[3].split())


@pytest.mark.parametrize("event", [Failed(7, WEDGE), Exited(7, CRASH)], ids=["Failed", "Exited"])
def test_one_that_dies_while_draining_stays_down_and_is_on_record(event: Failed | Exited) -> None:
    after, effects = go(LifecycleState(state=State.DRAINING, generation=7), event)
    assert effects[0] == AbortCalls(7, event.failure)
    assert State.STOPPED in (after.state, after.then)
    assert after.last_failure is event.failure


def test_invariants_of_the_whole_product() -> None:
    for m, event in product(machines(), events(7)):
        after, effects = go(m, event)
        spawns = [effect for effect in effects if isinstance(effect, Spawn)]
        assert len(spawns) <= 1
        for spawn in spawns:
            assert spawn.generation == after.generation == m.generation + 1
            assert after.state is State.STARTING
            assert m.state in WITHOUT_PROCESS or isinstance(event, Exited | Declined)
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
        if after.state is State.FAILED and m.state is State.FAILED:
            assert after is m


def test_one_for_which_there_is_no_room_waits_or_is_given_up_and_that_is_no_failure_of_its() -> None:
    starting = LifecycleState(state=State.STARTING, generation=7)
    after, effects = go(starting, Declined(7, NO_ROOM, None))
    assert (after.state, effects) == (State.STOPPED, ())
    assert (after.last_failure, after.history) == (NO_ROOM, History())
    after, effects = go(starting, Declined(7, NO_ROOM, 30.0))
    assert (after.state, after.retry_at, effects) == (State.BACKOFF, 130.0, (WakeAfter(7, 30.0),))
    nobody = replace(NO_ROOM, cause=Cause.NONE)
    assert go(starting, Declined(7, nobody, None))[0].last_failure is None
    stopped, _ = go(replace(starting, state=State.STOPPING, then=State.STOPPED), Declined(7, nobody, None))
    assert stopped.state is State.STOPPED


@pytest.mark.parametrize("generation", [0, 6, 8])
def test_news_of_another_life_changes_nothing(generation: int) -> None:
    for m, event in product(machines(), events(generation)):
        if not isinstance(event, Start | Stop | Restart | Drain):
            assert go(m, event) == (m, ())


def test_a_life_from_start_to_stop() -> None:
    m, effects = go(LifecycleState(), Start(), now=10.0)
    assert (m.state, effects, m.starts) == (State.STARTING, (Spawn(1),), 1)
    m, _ = go(m, Proven(1), now=18.0)
    assert (m.state, m.proven, m.start_seconds, m.since) == (State.READY, True, 8.0, 18.0)
    m, _ = go(m, Drain(), now=20.0)
    m, effects = go(m, Emptied(1), now=21.0)
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


def test_failures_in_a_row_end_in_failed_and_start_forgives() -> None:
    m, _ = go(LifecycleState(), Start(), now=0.0)
    for n in range(1, POLICY.max_failures):
        m, effects = go(m, Exited(n, CRASH), now=float(n))
        assert m.state is State.BACKOFF
        assert effects[1] == WakeAfter(n, 2.0 ** (n - 1))
        m, _ = go(m, Woke(n), now=float(n) + 0.5)
    m, effects = go(m, Exited(3, CRASH), now=5.0)
    assert (m.state, effects) == (State.FAILED, (AbortCalls(3, CRASH),))
    assert "3 failures within 300 s" in m.gave_up
    m, effects = go(m, Start(), now=6.0)
    assert (m.gave_up, m.history, effects) == ("", History(), (Spawn(4),))


def test_what_only_a_person_mends_is_given_up_at_once_unless_it_had_worked() -> None:
    fresh = LifecycleState(state=State.STARTING, generation=1)
    assert go(fresh, Exited(1, NO_MODEL))[0].state is State.FAILED
    assert go(fresh, Failed(1, NO_MODEL))[0].then is State.FAILED
    proven = replace(fresh, proven=True)
    assert go(proven, Exited(1, NO_MODEL))[0].state is State.BACKOFF
    assert go(proven, Failed(1, NO_MODEL))[0].then is State.BACKOFF


def test_start_asks_for_proof_anew_and_restart_does_not() -> None:
    failed = LifecycleState(state=State.FAILED, generation=1, proven=True)
    assert not go(failed, Start())[0].proven
    assert go(failed, Restart())[0].proven


def test_start_asks_for_proof_anew_also_of_one_that_is_just_stopping() -> None:
    stopping = LifecycleState(state=State.STOPPING, then=State.BACKOFF, proven=True, retry_at=160.0, start_seconds=5.0)
    after, _ = go(stopping, Start())
    assert not after.proven
    assert eta(after, 100.0) == 5.0, "the back-off is forgotten"
    assert go(stopping, Restart())[0].proven


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
    assert (short.history.streak, long.history.streak) == (3, 1)
    starting, _ = go(replace(ready, state=State.STARTING), Exited(1, CRASH), now=5000.0)
    assert starting.history.streak == 3


def test_how_long_a_start_takes_is_learned() -> None:
    m = LifecycleState(state=State.STARTING, generation=1, started_at=0.0)
    m, _ = go(m, Proven(1), now=30.0)
    assert m.start_seconds == 30.0
    m, _ = go(replace(m, state=State.STARTING, started_at=100.0), Proven(1), now=110.0)
    assert m.start_seconds == 20.0


@pytest.mark.parametrize(
    ("machine", "expected"),
    [
        (LifecycleState(state=State.READY), 0.0),
        (LifecycleState(state=State.STARTING, started_at=98.0, start_seconds=10.0), 8.0),
        (LifecycleState(state=State.STARTING, started_at=0.0, start_seconds=10.0), 0.5),
        (LifecycleState(state=State.BACKOFF, retry_at=103.0, start_seconds=10.0), 13.0),
        (LifecycleState(state=State.BACKOFF, retry_at=3.0, start_seconds=10.0), 10.0),
        (LifecycleState(state=State.STOPPING, then=State.BACKOFF, retry_at=103.0, start_seconds=10.0), 13.0),
        (LifecycleState(state=State.STOPPING, then=State.STARTING, start_seconds=10.0), 10.0),
        (LifecycleState(state=State.STOPPING, then=State.STOPPED), None),
        (LifecycleState(state=State.STOPPING, then=State.FAILED), None),
        (LifecycleState(state=State.DRAINING), None),
        (LifecycleState(state=State.STOPPED), None),
        (LifecycleState(state=State.FAILED), None),
    ],
    ids=lambda value: shown(value) if isinstance(value, LifecycleState) else "eta",
)
def test_when_it_can_answer_again(machine: LifecycleState, expected: float | None) -> None:
    assert eta(machine, 100.0) == expected


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
        if before.state is State.FAILED and not isinstance(event, Start | Restart | Stop):
            assert self.m.state is State.FAILED
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
    @rule(chance=st.floats(0, 1, exclude_max=True))
    def a_process_is_condemned(self, chance: float) -> None:
        self.post(Failed(min(self.alive), WEDGE), chance)

    @precondition(lambda self: self.alive)
    @rule()
    def it_has_emptied(self) -> None:
        self.post(Emptied(min(self.alive)))

    @precondition(lambda self: self.alarms)
    @rule()
    def an_alarm_rings(self) -> None:
        at, generation = min(self.alarms)
        self.alarms.remove((at, generation))
        self.now = max(self.now, at)
        self.post(Woke(generation))

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
        assert bool(self.alive) == (self.m.state not in WITHOUT_PROCESS)
        assert self.alive <= {self.m.generation}

    @invariant()
    def what_was_stopped_stays_stopped(self) -> None:
        if not self.wanted:
            assert self.m.state in (State.STOPPED, State.STOPPING)
            if self.m.state is State.STOPPING:
                assert self.m.then is State.STOPPED

    @invariant()
    def whoever_is_stopping_was_told_to_end(self) -> None:
        if self.m.state is State.STOPPING:
            assert self.m.generation in self.told_to_end

    @invariant()
    def whoever_backs_off_will_wake(self) -> None:
        if self.m.state is State.BACKOFF:
            assert self.m.generation in {generation for _, generation in self.alarms}

    @invariant()
    def it_gives_up_with_a_reason(self) -> None:
        if self.m.state is State.FAILED:
            assert self.m.gave_up
            assert lifecycle.eta(self.m, self.now) is None


TestWorld = World.TestCase
TestWorld.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)

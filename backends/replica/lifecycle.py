"""The life of one supervised backend: (machine, event, now) -> (machine, effects).

                Start             Proven
    STOPPED ------------> STARTING ------> READY <---> DRAINING
       ^                     |  ^            |            |
       |  Exited             |  | Woke       | Failed     | Emptied
       |                     v  |            v            v
    STOPPING <---------------+--|---------- STOPPING  (kill what is left, then go where ``then`` says)
       |                        |
       +----> BACKOFF ----------+
       +----> FAILED   (gave up; only Start leads out)

Every process is a *life* with a generation number. Events that belong to a life carry it, and news of an old life is
dropped at one door, in ``step``.

The awkward bit: a failure is told apart from the exit it leads to. A wedged process is condemned while it lives
(Failed), is then terminated by us, and its exit (Exited) must not count as a second failure. So STOPPING carries what
comes after it.

Pure: no clock, no I/O; the actor in ``supervised`` carries the effects out.
"""

from dataclasses import dataclass, replace

from backends.domain.failure import Cause, Failure
from backends.domain.spec import RestartPolicy
from backends.domain.state import State
from backends.replica import restart_policy


@dataclass(frozen=True, slots=True)
class LifecycleState:
    """``then`` has a meaning in STOPPING alone: where to go once the process is gone."""

    state: State = State.STOPPED
    then: State = State.STOPPED
    generation: int = 0
    history: restart_policy.History = restart_policy.History()
    proven: bool = False
    starts: int = 0  # lives begun since the gateway started
    since: float = 0.0  # when this state was entered
    started_at: float = 0.0
    start_seconds: float = 5.0  # learned: how long a start takes
    retry_at: float = 0.0  # in BACKOFF, and in STOPPING on the way there
    last_failure: Failure | None = None
    last_failure_at: float = 0.0
    gave_up: str = ""


# -- events: past tense, or a command --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Start:
    pass


@dataclass(frozen=True, slots=True)
class Stop:
    pass


@dataclass(frozen=True, slots=True)
class Restart:
    pass


@dataclass(frozen=True, slots=True)
class Drain:
    pass


@dataclass(frozen=True, slots=True)
class Proven:
    generation: int


@dataclass(frozen=True, slots=True)
class Failed:
    """The life is condemned, or could not begin. The process, if there is one, still has to be ended."""

    generation: int
    failure: Failure


@dataclass(frozen=True, slots=True)
class Exited:
    """The process is gone and reaped. ``failure`` is what its end means if nobody had asked for it."""

    generation: int
    failure: Failure


@dataclass(frozen=True, slots=True)
class Declined:
    """It was not even launched: there is no room, or nobody needs it any more. No failure of the backend. ``retry``:
    seconds; None = not before somebody asks."""

    generation: int
    failure: Failure
    retry: float | None


@dataclass(frozen=True, slots=True)
class Emptied:
    generation: int


@dataclass(frozen=True, slots=True)
class Woke:
    generation: int


Command = Start | Stop | Restart | Drain
Event = Command | Proven | Failed | Exited | Declined | Emptied | Woke


# -- effects: orders -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Spawn:
    generation: int


@dataclass(frozen=True, slots=True)
class Terminate:
    generation: int


@dataclass(frozen=True, slots=True)
class AbortCalls:
    """Every request in flight on this life ends now, with this failure."""

    generation: int
    failure: Failure


@dataclass(frozen=True, slots=True)
class WakeAfter:
    generation: int
    delay: float


@dataclass(frozen=True, slots=True)
class Refuse:
    """The command cannot be carried out in this state."""

    reason: str


Effect = Spawn | Terminate | AbortCalls | WakeAfter | Refuse
Step = tuple[LifecycleState, tuple[Effect, ...]]


def step(m: LifecycleState, event: Event, *, policy: RestartPolicy, now: float, chance: float) -> Step:
    if isinstance(event, Start | Stop | Restart | Drain):
        return _command(m, event, now)
    if event.generation != m.generation:
        return m, ()
    match event:
        case Proven():
            if m.state is not State.STARTING:
                return m, ()
            took = now - m.started_at
            learned = took if not m.proven else 0.5 * (m.start_seconds + took)
            return replace(m, state=State.READY, since=now, proven=True, start_seconds=learned), ()
        case Emptied():
            return _terminate(m, State.STOPPED, now) if m.state is State.DRAINING else (m, ())
        case Woke():
            return _spawn(m, now) if m.state is State.BACKOFF else (m, ())
        case Failed(failure=failure):
            return _failed(m, failure, policy=policy, now=now, chance=chance)
        case Declined(failure=failure) if m.state is State.STARTING:
            return _declined(m, event, now)
        case Declined() if m.state is not State.STOPPING:
            return m, ()
        case Exited(failure=failure) | Declined(failure=failure):
            return _exited(m, failure, policy=policy, now=now, chance=chance)


def _command(m: LifecycleState, event: Command, now: float) -> Step:
    idle = m.state in (State.STOPPED, State.FAILED, State.BACKOFF)
    match event:
        case Start() | Restart() if idle:
            return _spawn(_pardoned(m, event), now)
        case Start() | Restart() if m.state is State.STOPPING:
            return replace(_pardoned(m, event), then=State.STARTING), ()
        case Start() if m.state is State.DRAINING:
            return replace(m, state=State.READY, since=now), ()
        case Start():
            return m, (Refuse(f"it is {m.state.value} already"),)
        case Stop() if idle:
            return replace(m, state=State.STOPPED, since=now, gave_up=""), ()
        case Stop() if m.state is State.STOPPING:
            return replace(m, then=State.STOPPED, gave_up=""), ()
        case Stop():
            return _terminate(m, State.STOPPED, now)
        case Restart():
            return _terminate(_pardoned(m, event), State.STARTING, now)
        case Drain() if m.state is State.READY:
            return replace(m, state=State.DRAINING, since=now), ()
        case Drain():
            return m, (Refuse(f"it is {m.state.value}; only a ready backend can be drained"),)


def _pardoned(m: LifecycleState, event: Command) -> LifecycleState:
    """Somebody asked for it, so the count of failures begins anew; with Start, for a config that may be another."""
    proven = m.proven and isinstance(event, Restart)
    return replace(m, history=restart_policy.History(), gave_up="", retry_at=0.0, proven=proven)


def _spawn(m: LifecycleState, now: float) -> Step:
    generation = m.generation + 1
    machine = replace(
        m, state=State.STARTING, generation=generation, starts=m.starts + 1, since=now, started_at=now, gave_up=""
    )
    return machine, (Spawn(generation),)


def _terminate(m: LifecycleState, then: State, now: float) -> Step:
    return replace(m, state=State.STOPPING, then=then, since=now), (Terminate(m.generation),)


def _failed(m: LifecycleState, failure: Failure, *, policy: RestartPolicy, now: float, chance: float) -> Step:
    """Condemned while it lives: end the process, then back off or give up."""
    if m.state not in (State.STARTING, State.READY, State.DRAINING):
        return m, ()
    drained = m.state is State.DRAINING  # it was to end anyway
    m, delay = _blame(m, failure, policy=policy, now=now, chance=chance)
    then = State.STOPPED if drained else State.FAILED if delay is None else State.BACKOFF
    m, effects = _terminate(m, then, now)
    return m, (AbortCalls(m.generation, failure), *effects)


def _exited(m: LifecycleState, failure: Failure, *, policy: RestartPolicy, now: float, chance: float) -> Step:
    match m.state:
        case State.STOPPING:
            return _after_stop(m, failure, now)
        case State.STARTING | State.READY | State.DRAINING:
            drained = m.state is State.DRAINING
            m, delay = _blame(m, failure, policy=policy, now=now, chance=chance)
            abort = AbortCalls(m.generation, failure)
            if drained:
                return replace(m, state=State.STOPPED, since=now), (abort,)
            if delay is None:
                return replace(m, state=State.FAILED, since=now), (abort,)
            return replace(m, state=State.BACKOFF, since=now), (abort, WakeAfter(m.generation, delay))
        case _:
            return m, ()


def _declined(m: LifecycleState, event: Declined, now: float) -> Step:
    if event.failure.cause is not Cause.NONE:
        m = replace(m, last_failure=event.failure, last_failure_at=now)
    if event.retry is None:
        return replace(m, state=State.STOPPED, since=now), ()
    m = replace(m, state=State.BACKOFF, since=now, retry_at=now + event.retry)
    return m, (WakeAfter(m.generation, event.retry),)


def _after_stop(m: LifecycleState, failure: Failure, now: float) -> Step:
    """A process that we ended is gone: whatever its exit status says, that was no crash."""
    abort = AbortCalls(m.generation, failure)
    match m.then:
        case State.STARTING:
            machine, effects = _spawn(m, now)
            return machine, (abort, *effects)
        case State.BACKOFF:
            wake = WakeAfter(m.generation, max(0.0, m.retry_at - now))
            return replace(m, state=State.BACKOFF, since=now), (abort, wake)
        case _:
            return replace(m, state=m.then, since=now), (abort,)


def _blame(
    m: LifecycleState, failure: Failure, *, policy: RestartPolicy, now: float, chance: float
) -> tuple[LifecycleState, float | None]:
    """Put the failure on record; the seconds until the next try, or None to give up."""
    served = now - m.since if m.state is State.READY else 0.0
    history = m.history if failure.shared else restart_policy.record(m.history, policy, now=now, served=served)
    decision = restart_policy.decide(history, policy, failure, proven=m.proven, chance=chance)
    m = replace(m, history=history, last_failure=failure, last_failure_at=now)
    if isinstance(decision, restart_policy.GiveUp):
        return replace(m, gave_up=decision.reason), None
    return replace(m, retry_at=now + decision.delay), decision.delay


def eta(m: LifecycleState, now: float) -> float | None:
    """Seconds until the backend can probably answer; 0 when it can now; None when nobody knows (stopped, gave up)."""
    match m.state:
        case State.READY:
            return 0.0
        case State.STARTING:
            return max(0.5, m.started_at + m.start_seconds - now)
        case State.BACKOFF:
            return max(0.0, m.retry_at - now) + m.start_seconds
        case State.STOPPING if m.then in (State.BACKOFF, State.STARTING):
            return max(0.0, m.retry_at - now) + m.start_seconds
        case _:
            return None

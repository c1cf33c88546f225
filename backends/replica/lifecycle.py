"""The state machine of one supervised replica: (state, event, now) -> (state, effects).

                         Load                       Proven
    STOPPED, UNLOADED ----------> STARTING ----------------------> READY <------+
       ^                 Start     ^  |  ^                          |  |  Load,  | Keep, Start
       |                           |  |  | Waiting / Granted        |  +------> DRAINING
       |                           |  |  v                          |            |
       |                           |  | WAITING_FOR_MEMORY          | Failed     | Emptied
       |  Exited, Declined         |  v                             v            v
       +------------------------ STOPPING (ends the process, then goes where ``then`` says) ------+
                                   |
                                   +----> BACKOFF (``Woke`` starts it again)
                                   +----> FAILED  (given up: only ``Start`` and ``Restart`` lead out)

Commands. ``Start``, ``Stop``, ``Restart``, ``Drain`` come from a person: a start pardons, so the history of failures
begins anew. ``Load``, ``Unload``, ``Evict``, ``Recycle``, ``Keep`` come from demand and memory: they keep the history,
or a model that cannot load would be tried for ever, each time at the cost of a healthy one.

Each process is an instance with a generation number. Events of an instance carry the number, and events of an earlier
instance are dropped at one door, in ``step``.

Caveat: a failure is told apart from the exit that follows from it. A wedged process is condemned while it lives
(``Failed``), is then terminated by us, and its exit (``Exited``) must not count as a second failure. So STOPPING, and
DRAINING likewise, carry in ``then`` the state that comes next.

Pure: no clock, no I/O; the actor in ``supervised`` carries the effects out.
"""

from dataclasses import dataclass, replace

from backends.domain.failure import Cause, Failure
from backends.domain.spec import RestartPolicy
from backends.domain.state import StartReason, State
from backends.replica import restart_policy
from backends.replica.restart_policy import History

_NO_PROCESS = frozenset({State.STOPPED, State.UNLOADED, State.BACKOFF, State.FAILED})
_LOADING = frozenset({State.STARTING, State.WAITING_FOR_MEMORY})


@dataclass(frozen=True, slots=True)
class LifecycleState:
    """Times are the event loop's, durations seconds. What else is known of a replica's state is derived from this."""

    state: State = State.STOPPED
    then: State = State.STOPPED  # in DRAINING and STOPPING: the state that follows the end of the process
    evicting: bool = False  # in DRAINING: other models wait for its memory, so that a request does not call it off
    reason: StartReason = StartReason.OPERATOR  # why it is, or was last, loaded
    waiting_for: str = ""  # in WAITING_FOR_MEMORY: what; "" = it was refused, and asks again at ``retry_at``
    generation: int = 0
    history: History = History()
    proven: bool = False  # it was ready once since a person last started it
    restarts: int = 0  # processes launched after a failure, or by command, since the gateway started
    failed_since_launch: bool = False  # the latest process, or the launch of the next
    since: float = 0.0  # when this state was entered
    started_at: float = 0.0  # when the present load began
    launched_at: float | None = None  # the latest process
    start_seconds: float = 5.0  # learned: from a launch to the proof
    retry_at: float = 0.0  # in BACKOFF, in WAITING_FOR_MEMORY, and in STOPPING on the way there
    denied_at: float | None = None  # when there was last no memory for it
    last_failure: Failure | None = None
    last_failure_at: float = 0.0
    gave_up: str = ""

    @property
    def idle(self) -> bool:
        """There is no process, and no launch under way."""
        refused = self.state is State.WAITING_FOR_MEMORY and not self.waiting_for
        return self.state in _NO_PROCESS or refused

    @property
    def next(self) -> State:
        """The state that it is in, or on its way to."""
        return self.then if self.state in (State.DRAINING, State.STOPPING) else self.state

    @property
    def coming_back(self) -> bool:
        """Requests may wait for it in line, although its process is on its way out."""
        if self.state is State.DRAINING:
            return self.evicting or self.then is State.STARTING
        return self.state is State.STOPPING and self.then is State.STARTING

    @property
    def is_up_or_starting(self) -> bool:
        if self.state is State.WAITING_FOR_MEMORY:
            return bool(self.waiting_for)
        return self.state in (State.READY, State.STARTING) or self.coming_back

    @property
    def unloaded(self) -> bool:
        """Or being unloaded: the next request loads it."""
        return self.next is State.UNLOADED

    @property
    def loading_on_demand(self) -> bool:
        """Requests that wait for it made it load, which is no failure of the model."""
        if self.state is State.DRAINING:
            return self.coming_back
        loading = self.state in _LOADING or self.coming_back
        return loading and self.reason in (StartReason.DEMAND, StartReason.RECYCLE)


# -- commands of a person ----------------------------------------------------------------------------------------------


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


# -- commands of demand and memory -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Load:
    reason: StartReason


@dataclass(frozen=True, slots=True)
class Unload:
    """Finish what is in flight, then leave the memory; a request calls it off. ``demand``: requests wait in line: they
    do not call it off, and the model is loaded again for them. A load under way is ended whatever waits for it."""

    demand: bool


@dataclass(frozen=True, slots=True)
class Evict:
    """As ``Unload``, for other models that wait: requests do not call it off, they wait until it is loaded again."""


@dataclass(frozen=True, slots=True)
class Recycle:
    """Finish what is in flight, then begin with a new process."""


@dataclass(frozen=True, slots=True)
class Keep:
    """An eviction or a recycling that has not begun to end the process is called off."""


# -- events: past tense ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Waiting:
    """The launch waits for memory. ``what``: for people, e.g. "waits for other models to leave"."""

    generation: int
    what: str


@dataclass(frozen=True, slots=True)
class Granted:
    generation: int


@dataclass(frozen=True, slots=True)
class Launched:
    """The process exists."""

    generation: int


@dataclass(frozen=True, slots=True)
class Proven:
    generation: int


@dataclass(frozen=True, slots=True)
class Failed:
    """The instance is condemned, or could not begin. The process, if there is one, still has to be ended."""

    generation: int
    failure: Failure


@dataclass(frozen=True, slots=True)
class Exited:
    """The process is gone and reaped. ``failure`` is what its end means if no part of the gateway had asked for it."""

    generation: int
    failure: Failure


@dataclass(frozen=True, slots=True)
class Declined:
    """No process was launched: no memory, or no need any more. No failure of the replica. ``retry``: seconds; None =
    not before the next request."""

    generation: int
    failure: Failure
    retry: float | None


@dataclass(frozen=True, slots=True)
class Emptied:
    """``demand``: requests wait in line for the model."""

    generation: int
    demand: bool


@dataclass(frozen=True, slots=True)
class Woke:
    """``wanted``: the model is still to be loaded, for requests in line, or as the configuration or a person says."""

    generation: int
    wanted: bool


PersonsCommand = Start | Stop | Restart | Drain
Command = PersonsCommand | Load | Unload | Evict | Recycle | Keep
Event = Command | Waiting | Granted | Launched | Proven | Failed | Exited | Declined | Emptied | Woke


# -- effects: orders ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Spawn:
    generation: int


@dataclass(frozen=True, slots=True)
class Terminate:
    """End the process, or the launch where there is no process yet."""

    generation: int


@dataclass(frozen=True, slots=True)
class AbortCalls:
    """Every request in flight on this instance ends now, with this failure."""

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
    match event:
        case Start() | Stop() | Restart() | Drain():
            return _of_person(m, event, now)
        case Load() | Unload() | Evict() | Recycle() | Keep():
            return _of_demand(m, event, now)
        case _ if event.generation != m.generation:
            return m, ()
        case Waiting() | Granted() | Launched() if m.idle:
            return m, ()
        case Failed(failure=failure):
            return _failed(m, failure, policy=policy, now=now, chance=chance)
        case Exited(failure=failure):
            return _exited(m, failure, policy=policy, now=now, chance=chance)
        case Declined():
            return _declined(m, event, now)
        case _:
            return _progressed(m, event, now)


def _progressed(m: LifecycleState, event: Waiting | Granted | Launched | Proven | Emptied | Woke, now: float) -> Step:
    match event, m.state:
        case Waiting(what=what), State.STARTING | State.WAITING_FOR_MEMORY:
            since = now if m.state is State.STARTING else m.since
            return replace(m, state=State.WAITING_FOR_MEMORY, since=since, waiting_for=what), ()
        case Granted(), State.WAITING_FOR_MEMORY:
            return replace(m, state=State.STARTING, since=now, waiting_for=""), ()
        case Launched(), State.STARTING | State.WAITING_FOR_MEMORY | State.STOPPING:
            return _launched(m, now), ()
        case Proven(), State.STARTING:
            took = _loading_for(m, now)
            learned = took if not m.proven else 0.5 * (m.start_seconds + took)
            return replace(m, state=State.READY, since=now, proven=True, start_seconds=learned), ()
        case Emptied(demand=demand), State.DRAINING:
            return _terminate(_reloading(m, now) if demand and m.unloaded else m, now)
        case Woke(wanted=True), State.BACKOFF:
            return _begin(m, m.reason, now)
        case Woke(), State.BACKOFF:
            return _enter(m, State.UNLOADED, now), ()
        case Woke(), State.WAITING_FOR_MEMORY if not m.waiting_for:
            return _begin(m, m.reason, now)
        case _:
            return m, ()


def _launched(m: LifecycleState, now: float) -> LifecycleState:
    """A process of a model that was only needed again is no restart."""
    again = m.failed_since_launch or m.reason is StartReason.OPERATOR
    state = m.state if m.state is State.STOPPING else State.STARTING
    return replace(
        m,
        state=state,
        since=m.since if m.state is state else now,
        waiting_for="",
        launched_at=now,
        restarts=m.restarts + (again and m.launched_at is not None),
        failed_since_launch=False,
    )


# -- commands ----------------------------------------------------------------------------------------------------------


def _of_person(m: LifecycleState, event: PersonsCommand, now: float) -> Step:
    match event:
        case Start() | Restart() if m.idle:
            return _begin(_pardoned(m, event), StartReason.OPERATOR, now)
        case Start() | Restart() if m.state is State.STOPPING:
            return _then(_pardoned(m, event), State.STARTING, StartReason.OPERATOR), ()
        case Start() if m.state is State.DRAINING:
            return _enter(m, State.READY, now), ()
        case Start():
            return m, (Refuse(f"it is {m.state.value} already"),)
        case Stop() if m.idle:
            return replace(_enter(m, State.STOPPED, now), gave_up=""), ()
        case Stop() if m.state is State.STOPPING:
            return replace(_then(m, State.STOPPED), gave_up=""), ()
        case Stop():
            return _terminate(_then(m, State.STOPPED), now)
        case Restart():
            return _terminate(_then(_pardoned(m, event), State.STARTING, StartReason.OPERATOR), now)
        case Drain() if m.state is State.READY:
            return replace(_enter(m, State.DRAINING, now), then=State.STOPPED), ()
        case Drain() if m.state is State.DRAINING and m.then is not State.STOPPED:
            return _then(m, State.STOPPED), ()
        case Drain():
            return m, (Refuse(f"it is {m.state.value}; only a ready backend can be drained"),)


def _of_demand(m: LifecycleState, event: Load | Unload | Evict | Recycle | Keep, now: float) -> Step:
    """A command that does not fit the state changes nothing: the state has moved on meanwhile."""
    match event:
        case Load(reason=reason):
            return _load(m, reason, now)
        case Unload() if m.idle and m.state not in (State.STOPPED, State.FAILED):
            retry_at = m.retry_at if m.state is State.BACKOFF else 0.0  # a denial of memory is no failure
            return replace(_enter(m, State.UNLOADED, now), retry_at=retry_at), ()
        case Unload() if m.state in _LOADING:
            return _terminate(_then(m, State.UNLOADED), now)
        case Unload() if m.state is State.STOPPING and m.then in (State.STARTING, State.BACKOFF):
            return _then(m, State.UNLOADED), ()
        case Unload(demand=demand) if m.state is State.DRAINING and m.then is State.STARTING:
            return replace(_then(m, State.UNLOADED), evicting=demand), ()
        case Unload(demand=demand) if m.state is State.READY:
            return replace(_enter(m, State.DRAINING, now), then=State.UNLOADED, evicting=demand), ()
        case Evict() if m.state is State.READY:
            return replace(_enter(m, State.DRAINING, now), then=State.UNLOADED, evicting=True), ()
        case Recycle() if m.state is State.READY:
            return replace(_enter(m, State.DRAINING, now), then=State.STARTING, reason=StartReason.RECYCLE), ()
        case Keep() if m.state is State.DRAINING and m.coming_back:
            return _enter(m, State.READY, now), ()
        case _:
            return m, ()


def _load(m: LifecycleState, reason: StartReason, now: float) -> Step:
    if m.state is State.UNLOADED and m.retry_at > now:  # its back-off is not over
        m = replace(_enter(m, State.BACKOFF, now), reason=reason)
        return m, (WakeAfter(m.generation, m.retry_at - now),)
    if m.state is State.UNLOADED or (m.state is State.STOPPED and reason is StartReason.EAGER):
        return _begin(m, reason, now)
    if m.state is State.STOPPING and m.then is State.UNLOADED:
        return _then(m, State.STARTING, reason), ()
    if m.state is State.DRAINING and m.then is State.UNLOADED and not m.evicting:
        return _enter(m, State.READY, now), ()
    return m, ()


def _pardoned(m: LifecycleState, event: PersonsCommand) -> LifecycleState:
    """The count of failures begins anew; with Start the proof too, for a config that may be another."""
    proven = m.proven and isinstance(event, Restart)
    return replace(m, history=History(), gave_up="", retry_at=0.0, proven=proven)


def _enter(m: LifecycleState, state: State, now: float) -> LifecycleState:
    return replace(m, state=state, since=now, evicting=False, waiting_for="")


def _then(m: LifecycleState, then: State, reason: StartReason | None = None) -> LifecycleState:
    """The state that follows the end of the process is another one now."""
    return replace(m, then=then, evicting=False, reason=reason or m.reason)


def _reloading(m: LifecycleState, now: float) -> LifecycleState:
    """It leaves the memory, and asks for it again: behind those that wait for it already."""
    return replace(m, then=State.STARTING, reason=StartReason.DEMAND, retry_at=now)


def _begin(m: LifecycleState, reason: StartReason, now: float) -> Step:
    generation = m.generation + 1
    m = replace(_enter(m, State.STARTING, now), generation=generation, reason=reason, started_at=now, gave_up="")
    return m, (Spawn(generation),)


def _terminate(m: LifecycleState, now: float) -> Step:
    """``m.then`` says what follows."""
    return _enter(m, State.STOPPING, now), (Terminate(m.generation),)


# -- the end of an instance --------------------------------------------------------------------------------------------


def _failed(m: LifecycleState, failure: Failure, *, policy: RestartPolicy, now: float, chance: float) -> Step:
    """Condemned while it lives: end the process, then back off or give up."""
    if m.idle or m.state is State.STOPPING:
        return m, ()
    after = _after_failure(m, failure, policy=policy, now=now, chance=chance)
    after, effects = _terminate(after, now)
    return after, (AbortCalls(m.generation, failure), *effects)


def _exited(m: LifecycleState, failure: Failure, *, policy: RestartPolicy, now: float, chance: float) -> Step:
    if m.state is State.STOPPING:
        return _after_stop(m, failure, now)
    if m.idle:
        return m, ()
    return _after_stop(_after_failure(m, failure, policy=policy, now=now, chance=chance), failure, now)


def _declined(m: LifecycleState, event: Declined, now: float) -> Step:
    if m.state is State.STOPPING:
        return _after_stop(m, event.failure, now)
    if m.state not in _LOADING or m.idle:
        return m, ()
    if event.failure.cause is not Cause.NONE:
        m = replace(m, last_failure=event.failure, last_failure_at=now, denied_at=now)
    if event.retry is None:
        return _enter(m, State.UNLOADED, now), ()
    m = replace(_enter(m, State.WAITING_FOR_MEMORY, now), retry_at=now + event.retry)
    return m, (WakeAfter(m.generation, event.retry),)


def _after_stop(m: LifecycleState, failure: Failure, now: float) -> Step:
    """The process is gone, and what follows was decided before: its exit status changes nothing."""
    abort = AbortCalls(m.generation, failure)
    match m.then:
        case State.STARTING if m.retry_at <= now:
            machine, effects = _begin(m, m.reason, now)
            return machine, (abort, *effects)
        case State.STARTING | State.BACKOFF:
            wake = WakeAfter(m.generation, max(0.0, m.retry_at - now))
            return _enter(m, State.BACKOFF, now), (abort, wake)
        case _:
            return _enter(m, m.then, now), (abort,)


def _after_failure(
    m: LifecycleState, failure: Failure, *, policy: RestartPolicy, now: float, chance: float
) -> LifecycleState:
    """The failure is put on record, and ``then`` says what follows."""
    served = now - m.since if m.state is State.READY else 0.0
    history = m.history if failure.shared else restart_policy.record(m.history, policy, now=now, served=served)
    decision = restart_policy.decide(history, policy, failure, proven=m.proven, chance=chance)
    in_use = m.state is State.READY or (m.state is State.DRAINING and m.coming_back)
    leaving = m.state is State.DRAINING and not m.coming_back  # it was to end anyway
    m = replace(
        m,
        history=history,
        last_failure=failure,
        last_failure_at=now,
        failed_since_launch=True,
        reason=StartReason.RECOVERY if in_use else m.reason,
        evicting=False,
    )
    match decision:
        case _ if leaving:
            return m
        case restart_policy.GiveUp(reason=why):
            return replace(m, gave_up=why, then=State.FAILED)
        case restart_policy.Retry(delay=delay):
            return replace(m, retry_at=now + delay, then=State.BACKOFF)


def _loading_for(m: LifecycleState, now: float) -> float:
    """Seconds since the process of this load was launched; 0 before."""
    launched = m.launched_at is not None and m.launched_at >= m.started_at
    return now - m.launched_at if launched and m.launched_at is not None else 0.0


def eta(m: LifecycleState, now: float) -> float | None:
    """Seconds until the backend can probably answer; 0 when it can now; None when that depends on a person."""
    match m.state:
        case State.READY:
            return 0.0
        case State.STARTING:
            return max(0.5, m.start_seconds - _loading_for(m, now))
        case State.WAITING_FOR_MEMORY if m.waiting_for:
            return m.start_seconds
        case State.BACKOFF | State.WAITING_FOR_MEMORY | State.UNLOADED:
            return max(0.0, m.retry_at - now) + m.start_seconds
        case State.DRAINING | State.STOPPING if m.coming_back or m.next in (State.BACKOFF, State.UNLOADED):
            return max(0.0, m.retry_at - now) + m.start_seconds
        case _:
            return None

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
                                   +----> BACKOFF (``Woke`` or ``Mended`` starts it again)
                                   +----> FAILED  (given up: ``Start``, ``Restart`` and ``Mended`` lead out)

Commands. ``Start``, ``Stop``, ``Restart``, ``Drain`` come from the operator: a start clears the history of failures.
``Load``, ``Unload``, ``Evict``, ``Recycle``, ``Keep`` come from demand and memory: they keep the history, because a
model that cannot load would otherwise be tried for ever, and a healthy model evicted each time.

Each process is an instance with a generation number. Events of an instance carry the number; ``step`` drops events
of earlier instances, at one place.

Caveat: a failure is distinct from the exit that follows from it. A wedged process is condemned while it runs
(``Failed``), is then terminated by the gateway, and its exit (``Exited``) must not count as a second failure. So
STOPPING and DRAINING carry the next state in ``then``.

Pure: no clock, no I/O; the actor in ``supervised`` executes the effects.
"""

from dataclasses import dataclass, replace

from backends.domain.failure import Cause, Failure
from backends.domain.snapshot import WAITS_FOR_MEMORY
from backends.domain.spec import RestartPolicy
from backends.domain.state import StartReason, State
from backends.replica import restart_policy
from backends.replica.events import (
    AbortCalls,
    Answered,
    Declined,
    Drain,
    Effect,
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
    OperatorCommand,
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
from backends.replica.restart_policy import History

_NO_PROCESS = frozenset({State.STOPPED, State.UNLOADED, State.BACKOFF, State.FAILED})
_LOADING = frozenset({State.STARTING, State.WAITING_FOR_MEMORY})
FIRST_START = 5.0  # seconds from launch to ready, for an estimate as long as none was seen


@dataclass(frozen=True, slots=True)
class LifecycleState:
    """Times are the event loop's, durations are seconds. All else about a replica's state is derived from this."""

    state: State = State.STOPPED
    then: State = State.STOPPED  # in DRAINING and STOPPING: the state that follows the end of the process
    evicting: bool = False  # in DRAINING: other models wait for its memory, so a request does not cancel it
    owed: bool = False  # its load was cut off, or it was evicted: to be loaded again while its model is in use
    reason: StartReason = StartReason.OPERATOR  # of the present load, or of the last one
    waiting_for: str = ""  # in WAITING_FOR_MEMORY: what for; "" = refused, next try at ``retry_at``
    generation: int = 0
    history: History = History()
    proven: bool = False  # it has been ready
    came_up: bool = False  # it has been ready since its last failure
    answered: bool = False  # this instance has answered a client's request in full
    restarts: int = 0  # processes launched after a failure or by command since the gateway started
    failed_since_launch: bool = False  # the latest process failed, or the launch of the next
    since: float = 0.0  # when this state was entered
    started_at: float = 0.0  # when the present load began
    launched_at: float | None = None  # when the latest process was launched
    start_seconds: float | None = None  # learned, if by an earlier gateway: from the launch to ``Proven``; None = never
    retry_at: float = 0.0  # in BACKOFF, in WAITING_FOR_MEMORY, and in STOPPING on the way there; in FAILED 0 = unknown
    denied_at: float | None = None  # when it was last denied memory
    last_failure: Failure | None = None
    last_failure_at: float = 0.0
    gave_up: str = ""

    @property
    def idle(self) -> bool:
        """There is no process and no launch in progress."""
        refused = self.state is State.WAITING_FOR_MEMORY and not self.waiting_for
        return self.state in _NO_PROCESS or refused

    @property
    def next(self) -> State:
        """The present state, or in DRAINING and STOPPING the state that follows."""
        return self.then if self.state in (State.DRAINING, State.STOPPING) else self.state

    @property
    def coming_back(self) -> bool:
        """Requests may queue for it although its process is ending: it will be loaded again."""
        if self.state is State.DRAINING:
            return self.evicting or self.then is State.STARTING
        return self.state is State.STOPPING and self.then is State.STARTING

    @property
    def is_up_or_starting(self) -> bool:
        if self.state is State.WAITING_FOR_MEMORY:
            return bool(self.waiting_for)
        return self.state in (State.READY, State.STARTING) or self.coming_back

    @property
    def recovers(self) -> bool:
        """It can answer, or will be able to without a person or a new request. One that has never been ready, and has
        failed for what a person has to mend, is tried again, but nobody is to wait for that."""
        match self.next:
            case State.BACKOFF:
                failure = self.last_failure
                return self.proven or failure is None or not restart_policy.hopeless(failure)
            case State.FAILED:
                return self.retry_at > 0.0
            case State.UNLOADED:
                return self.state is State.DRAINING and self.evicting
            case State.WAITING_FOR_MEMORY:
                return bool(self.waiting_for)
            case State.READY | State.STARTING:
                return True
            case _:
                return False

    @property
    def given_up(self) -> bool:
        """Failed, or failed as soon as its process has ended."""
        return self.next is State.FAILED

    @property
    def crash_looping(self) -> bool:
        """Too many of its lives failed before they answered a request, and the present one is not ready. It goes on
        trying."""
        trying = self.next in (State.BACKOFF, State.STARTING, State.WAITING_FOR_MEMORY)
        return self.history.looping and not self.came_up and trying

    @property
    def unloaded(self) -> bool:
        """Unloaded or being unloaded: the next request loads it."""
        return self.next is State.UNLOADED

    @property
    def missing(self) -> bool:
        """Unloaded, but not because its model was idle or an operator unloaded it."""
        return self.unloaded and self.owed

    @property
    def loading_on_demand(self) -> bool:
        """It loads because of waiting requests, not because of a failure."""
        if self.state is State.DRAINING:
            return self.coming_back
        loading = (self.state in _LOADING and not self.idle) or self.coming_back
        return loading and self.reason in (StartReason.DEMAND, StartReason.RECYCLE)


Step = tuple[LifecycleState, tuple[Effect, ...]]


def step(m: LifecycleState, event: Event, *, policy: RestartPolicy, now: float, chance: float) -> Step:
    match event:
        case Start() | Stop() | Restart() | Drain():
            return _of_operator(m, event, now)
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


def _progressed(
    m: LifecycleState, event: Waiting | Granted | Launched | Proven | Answered | Emptied | Woke | Mended, now: float
) -> Step:
    match event, m.state:
        case Waiting(what=what), State.STARTING | State.WAITING_FOR_MEMORY:
            since = now if m.state is State.STARTING else m.since
            return replace(m, state=State.WAITING_FOR_MEMORY, since=since, waiting_for=what), ()
        case Granted(), State.WAITING_FOR_MEMORY:
            return replace(m, state=State.STARTING, since=now, waiting_for=""), ()
        case Launched(), State.STARTING | State.WAITING_FOR_MEMORY | State.STOPPING:
            return _launched(m, now), ()
        case Proven(downloaded=downloaded), State.STARTING:
            learned = m.start_seconds if downloaded else _learned(m, _loading_for(m, now))
            return replace(m, state=State.READY, since=now, proven=True, came_up=True, start_seconds=learned), ()
        case Answered(), State.READY | State.DRAINING:
            return replace(m, answered=True, history=m.history.forgiven), ()
        case Emptied(demand=demand), State.DRAINING:
            return _terminate(_reloading(m, now) if demand and m.unloaded else m, now)
        case Mended(wanted=wanted, unseen=unseen), State.FAILED | State.BACKOFF:
            m = replace(m, history=m.history if unseen else History(), gave_up="", retry_at=0.0)
            return _begin(m, m.reason, now) if wanted else (replace(_enter(m, State.UNLOADED, now), owed=True), ())
        case Woke(wanted=True), State.BACKOFF:
            return _begin(m, m.reason, now)
        case Woke(), State.BACKOFF:
            return replace(_enter(m, State.UNLOADED, now), owed=True), ()
        case Woke(), State.WAITING_FOR_MEMORY if not m.waiting_for:
            return _begin(m, m.reason, now)
        case _:
            return m, ()


def _launched(m: LifecycleState, now: float) -> LifecycleState:
    """A launch only because of new demand does not count as a restart."""
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


def _of_operator(m: LifecycleState, event: OperatorCommand, now: float) -> Step:
    match event:
        case Start() | Restart() if m.idle:
            return _begin(_history_cleared(m), StartReason.OPERATOR, now)
        case Start() | Restart() if m.state is State.STOPPING:
            return _then(_history_cleared(m), State.STARTING, StartReason.OPERATOR), ()
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
            return _terminate(_then(_history_cleared(m), State.STARTING, StartReason.OPERATOR), now)
        case Drain() if m.state is State.READY:
            return replace(_enter(m, State.DRAINING, now), then=State.STOPPED), ()
        case Drain() if m.state is State.DRAINING and m.then is not State.STOPPED:
            return _then(m, State.STOPPED), ()
        case Drain():
            return m, (Refuse(f"it is {m.state.value}; only a ready backend can be drained"),)


def _of_demand(m: LifecycleState, event: Load | Unload | Evict | Recycle | Keep, now: float) -> Step:
    """A command that does not fit the state is ignored: the state has changed in the meantime."""
    match event:
        case Load(reason=reason):
            return _load(m, reason, now)
        case Unload() if m.idle and m.state not in (State.STOPPED, State.FAILED):
            retry_at = m.retry_at if m.state is State.BACKOFF else 0.0  # a denial of memory is no failure
            return replace(_enter(m, State.UNLOADED, now), retry_at=retry_at, owed=False), ()
        case Unload() | Evict() if m.state in _LOADING and not m.idle:
            return _terminate(replace(_then(m, State.UNLOADED), owed=isinstance(event, Evict)), now)
        case Unload() if m.state is State.STOPPING and m.then in (State.STARTING, State.BACKOFF):
            return replace(_then(m, State.UNLOADED), owed=False), ()
        case Unload(demand=demand) if m.state is State.DRAINING and m.then is State.STARTING:
            return replace(_then(m, State.UNLOADED), evicting=demand, owed=False), ()
        case Unload(demand=demand) if m.state is State.READY:
            return replace(_enter(m, State.DRAINING, now), then=State.UNLOADED, evicting=demand, owed=False), ()
        case Evict() if m.state is State.READY:
            return replace(_enter(m, State.DRAINING, now), then=State.UNLOADED, evicting=True, owed=True), ()
        case Recycle() if m.state is State.READY:
            return replace(_enter(m, State.DRAINING, now), then=State.STARTING, reason=StartReason.RECYCLE), ()
        case Keep() if m.state is State.DRAINING and m.coming_back:
            return _enter(m, State.READY, now), ()
        case _:
            return m, ()


def _load(m: LifecycleState, reason: StartReason, now: float) -> Step:
    if m.state is State.UNLOADED and m.retry_at > now:  # still in back-off
        m = replace(_enter(m, State.BACKOFF, now), reason=reason)
        return m, (WakeAfter(m.generation, m.retry_at - now),)
    if m.state is State.UNLOADED or (m.state is State.STOPPED and reason is StartReason.EAGER):
        return _begin(m, reason, now)
    if m.state is State.STOPPING and m.then is State.UNLOADED:
        return _then(m, State.STARTING, reason), ()
    if m.state is State.DRAINING and m.then is State.UNLOADED and not m.evicting:
        return _enter(m, State.READY, now), ()
    return m, ()


def _history_cleared(m: LifecycleState) -> LifecycleState:
    return replace(m, history=History(), gave_up="", retry_at=0.0)


def _enter(m: LifecycleState, state: State, now: float) -> LifecycleState:
    return replace(m, state=state, since=now, evicting=False, waiting_for="")


def _then(m: LifecycleState, then: State, reason: StartReason | None = None) -> LifecycleState:
    """Changes the state that follows the end of the process."""
    return replace(m, then=then, evicting=False, reason=reason or m.reason)


def _reloading(m: LifecycleState, now: float) -> LifecycleState:
    """The model is unloaded and queues for memory again, behind the models that already wait."""
    return replace(m, then=State.STARTING, reason=StartReason.DEMAND, retry_at=now)


def _begin(m: LifecycleState, reason: StartReason, now: float) -> Step:
    generation = m.generation + 1
    m = replace(_enter(m, State.STARTING, now), generation=generation, reason=reason, started_at=now)
    return replace(m, gave_up="", answered=False), (Spawn(generation),)


def _terminate(m: LifecycleState, now: float) -> Step:
    """``m.then`` is the state that follows."""
    return _enter(m, State.STOPPING, now), (Terminate(m.generation),)


# -- the end of an instance --------------------------------------------------------------------------------------------


def _failed(m: LifecycleState, failure: Failure, *, policy: RestartPolicy, now: float, chance: float) -> Step:
    """Condemned while the process runs: terminate it, then back off or give up."""
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
        m = replace(m, denied_at=now)
        if m.came_up or not m.history.alike:  # with memory it would fail as before: that is what to tell
            m = replace(m, last_failure=event.failure, last_failure_at=now)
    if event.retry is None:
        return replace(_enter(m, State.UNLOADED, now), owed=True), ()
    m = replace(_enter(m, State.WAITING_FOR_MEMORY, now), retry_at=now + event.retry)
    return m, (WakeAfter(m.generation, event.retry),)


def _after_stop(m: LifecycleState, failure: Failure, now: float) -> Step:
    """The process has ended. The next state was decided before, whatever the exit status."""
    abort = AbortCalls(m.generation, failure)
    match m.then:
        case State.STARTING if m.retry_at <= now:
            machine, effects = _begin(m, m.reason, now)
            return machine, (abort, *effects)
        case State.STARTING | State.BACKOFF:
            wake = WakeAfter(m.generation, max(0.0, m.retry_at - now))
            watch = m.last_failure is not None and restart_policy.hopeless(m.last_failure)
            return _enter(m, State.BACKOFF, now), (abort, wake, *((Watch(m.generation),) if watch else ()))
        case State.FAILED:
            return _enter(m, State.FAILED, now), (abort, Watch(m.generation))
        case _:
            return _enter(m, m.then, now), (abort,)


def _after_failure(
    m: LifecycleState, failure: Failure, *, policy: RestartPolicy, now: float, chance: float
) -> LifecycleState:
    """Records the failure and sets the next state in ``then``."""
    ready_for = now - m.since if m.state is State.READY else 0.0
    good = restart_policy.was_good(policy, answered=m.answered, ready_for=ready_for)
    history = restart_policy.record(m.history, policy, failure, now=now, good=good)
    decision = restart_policy.decide(history, policy, failure, proven=m.proven, chance=chance)
    in_use = m.state is State.READY or (m.state is State.DRAINING and m.coming_back)
    leaving = m.state is State.DRAINING and not m.coming_back  # it was to be terminated anyway
    m = replace(
        m,
        history=history,
        last_failure=failure,
        last_failure_at=now,
        failed_since_launch=True,
        came_up=False,
        reason=StartReason.RECOVERY if in_use else m.reason,
        evicting=False,
    )
    match decision:
        case _ if leaving:
            return m
        case restart_policy.GiveUp(reason=why, again=again):
            retry_at = 0.0 if again is None else now + again
            return replace(m, gave_up=why, retry_at=retry_at, then=State.FAILED)
        case restart_policy.Retry(delay=delay):
            return replace(m, retry_at=now + delay, then=State.BACKOFF)


def _loading_for(m: LifecycleState, now: float) -> float:
    """Seconds since the process of this load was launched; 0 before the launch."""
    launched = m.launched_at is not None and m.launched_at >= m.started_at
    return now - m.launched_at if launched and m.launched_at is not None else 0.0


def retry_in(m: LifecycleState, now: float) -> float | None:
    """Seconds until it is started again by itself; None = not by the clock."""
    refused = m.state is State.WAITING_FOR_MEMORY and not m.waiting_for
    if m.next is State.BACKOFF or refused or (m.given_up and m.retry_at):
        return max(0.0, m.retry_at - now)
    return None


def _learned(m: LifecycleState, took: float) -> float:
    """Falls at once and rises by half: requests are refused for an estimate that is too long (the first load is from a
    cold disk), and only wait for one that is too short."""
    return took if m.start_seconds is None or took < m.start_seconds else 0.5 * (m.start_seconds + took)


def eta_known(m: LifecycleState, now: float) -> bool:
    """``eta`` is no mere guess: how long a load takes was seen, and the present one has not taken longer yet, nor waits
    for memory that others hold."""
    if m.start_seconds is None or m.waiting_for.startswith(WAITS_FOR_MEMORY):
        return False
    return m.state is not State.STARTING or _loading_for(m, now) <= m.start_seconds


def eta(m: LifecycleState, now: float) -> float | None:
    """Estimated seconds until the backend can answer; 0 if it can now; None if that depends on others. For a load that
    takes longer than it should: as long again as it is late."""
    start = FIRST_START if m.start_seconds is None else m.start_seconds
    match m.state:
        case State.READY:
            return 0.0
        case State.STARTING:
            return max(0.5, abs(start - _loading_for(m, now)))
        case State.WAITING_FOR_MEMORY if m.waiting_for:
            return start
        case State.BACKOFF | State.WAITING_FOR_MEMORY | State.UNLOADED:
            return max(0.0, m.retry_at - now) + start
        case State.DRAINING | State.STOPPING if m.coming_back or m.next in (State.BACKOFF, State.UNLOADED):
            return max(0.0, m.retry_at - now) + start
        case State.FAILED if m.retry_at:
            return max(0.0, m.retry_at - now) + start
        case _:
            return None

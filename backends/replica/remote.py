"""One remote replica: a server that already runs, on this or another machine. Probed and failed over like a supervised
replica, but neither started nor stopped by the gateway.

    UNREACHABLE --- lists the model, or a token ---> READY --- refused, 503, silence ---> UNREACHABLE

A server that lists the model at ``/v1/models`` is reached: servers of many models load one on request, and a question
for a token at each start would make them load all their models in turn. The first client gets the first token. A token
is asked for where there is no such list, where the model was lost because it generated nothing, and of mlx_lm.server,
which has its model loaded from the start.

There is no process whose exit could explain a failure, so the verdict on a broken call is the result of a probe right
after it. Error codes of another mlx-gateway are trusted (``error_answers``).
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

from backends.admission.inflight import InFlight
from backends.admission.lease import Lease
from backends.admission.limiter import ConcurrencyLimiter
from backends.admission.slot_request import SlotRequest
from backends.diagnosis import model_list
from backends.diagnosis.engine import EngineIdentity
from backends.diagnosis.error_answers import AnswerVerdict
from backends.domain.engine import Engine
from backends.domain.failure import Aftermath, Cause, Failure
from backends.domain.inflight_limit import InflightLimit, inflight_limits
from backends.domain.snapshot import Loading, Snapshot
from backends.domain.spec import BackendSpec, Remote
from backends.domain.state import Health, StartReason, State
from backends.process.output import Ring
from backends.replica import events, probe
from backends.replica.call_judge import CallJudge
from backends.replica.monitor import LivenessMonitor, Watched
from backends.replica.runtime import Runtime
from backends.tasks import Tasks
from backends.upstream.connect import dialer_to
from backends.upstream.exchange import ExchangeError, Fault

log = logging.getLogger(__name__)

CANARY_TIMEOUT = 60.0  # seconds; ``timeouts.start`` where the server may have to load the model first
FIRST_RETRY_PAUSE = 1.0  # seconds after a failed try; doubled each time


@dataclass(frozen=True, slots=True)
class Period:
    """A period in which the server is reachable: the counterpart of a supervised replica's instance."""

    generation: int
    identity: EngineIdentity
    monitor: LivenessMonitor
    calls: CallJudge


class RemoteReplica:
    """The command Start starts the probing, ``close`` ends it."""

    def __init__(self, spec: BackendSpec, remote: Remote, runtime: Runtime) -> None:
        self.spec = spec  # its target is ``remote``
        self.on_change: Callable[[], None] = lambda: None
        self.output = Ring()  # stays empty: a remote server's output cannot be read
        self.state = State.STOPPED
        self._runtime = runtime
        self._remote = remote
        self._dialer = dialer_to(remote, runtime.chance)
        self._host = runtime.remote_hosts.join(remote.url, spec.upstream_model)
        self._needs_proof = False  # it answered HTTP when last it was lost
        limits = inflight_limits(spec)
        self._limiter = ConcurrencyLimiter(lambda: limits.usual, runtime.clock, self._changed, batches=spec.batches)
        self._inflight = self._limiter.inflight
        self._period = self._new_period(0, EngineIdentity(spec))
        self._tasks = Tasks(spec.id)
        self._since = runtime.wall()
        self._last_failure: Failure | None = None
        self._last_failure_at: float | None = None
        self._losses = 0

    @property
    def id(self) -> str:
        return self.spec.id

    @property
    def generation(self) -> int:
        return self._period.generation

    @property
    def inflight(self) -> int:
        return len(self._inflight)

    @property
    def responsive(self) -> bool:
        reached = self.state is State.READY
        return reached and self._period.monitor.responsive and not self._limiter.closed_to_all

    @property
    def engine(self) -> Engine:
        return self._period.identity.engine

    @property
    def report(self) -> None:
        """Its process is not ours."""

    @property
    def abandoned(self) -> int:
        return self._inflight.abandoned_count

    @property
    def flight(self) -> InFlight:
        return self._inflight

    unloaded = loading_on_demand = recently_denied = False  # the remote server decides when its model is loaded

    def set_demand(self, queued: int, *, accompanied: bool) -> None:
        """Ignored: a remote server is told of no queue."""

    def look_again(self) -> None:
        """No-op: it is always probed."""

    def load(self, _reason: StartReason = StartReason.DEMAND) -> None:
        """Starts the probing; the remote server decides when its model is loaded."""
        if self.state is State.STOPPED:
            self._enter(State.STARTING)
            self._tasks.start(self._follow(), "follow")

    @property
    def is_up_or_starting(self) -> bool:
        return self.state in (State.READY, State.STARTING)

    @property
    def recovers(self) -> bool:
        return self.is_up_or_starting

    @property
    def limit(self) -> InflightLimit:
        return self._limiter.limit

    def has_slot(self) -> bool:
        return self.state is State.READY and self._limiter.free and not self._period.monitor.occupied

    def fits(self, _request: SlotRequest, _share: float = 1.0) -> bool:
        """Its memory is its own affair."""
        return True

    def shortage(self, _request: SlotRequest) -> None:
        return None

    prompt_bound = None

    def admit(self) -> Lease:
        lease = Lease(self, self._period.calls, self._runtime.clock())
        self._inflight.add(lease)
        return lease

    def released(self, lease: Lease) -> None:
        if lease.completed:
            self._host.generated(self.id, self._runtime.clock())
        opened = self._limiter.release(lease)
        if lease.generation == self._period.generation:
            self._period.monitor.request_ended(lease, breaker_opened=opened)
        self.on_change()

    def over(self, lease: Lease) -> None:
        self._inflight.over(lease)
        self.on_change()

    def _changed(self) -> None:
        self.on_change()

    def snapshot(self) -> Snapshot:
        return Snapshot(
            id=self.id,
            model=self.spec.model,
            state=self.state,
            pid=None,
            url=self._remote.url,
            inflight=self._inflight.clients,
            restarts=self._losses,
            generation=self._period.generation,
            since=self._since,
            eta=self._eta(),
            eta_known=self.state is State.READY and not self._loads_there,
            recovers=self.recovers,
            responsive=self.responsive,
            slots=self._limiter.slots if self.state is State.READY else 0,
            limit=self.limit,
            note=self._limiter.breaker.reason if self._limiter.closed_to_all else "",
            last_failure=self._last_failure,
            last_failure_at=self._last_failure_at,
            engine=self.engine,
            abandoned=self._inflight.abandoned_count,
            loading=self._loading(),
        )

    def _loading(self) -> Loading | None:
        if not self._loads_there:
            return None
        return Loading("loads there", self._runtime.clock() - self._period.monitor.health_since, None)

    @property
    def _loads_there(self) -> bool:
        """Another gateway, which has requests wait for it."""
        return self.state is State.READY and self._period.monitor.health is Health.LOADING

    def _eta(self) -> float | None:
        match self.state:
            case State.READY if not self._loads_there:
                return 0.0
            case State.STOPPED:
                return None
            case _:
                return self._runtime.cadence.remote_retry_max

    def command(self, event: events.OperatorCommand) -> str | None:
        match event:
            case events.Start() if self.state is State.STOPPED:
                self.load()
                return None
            case events.Start():
                return f"it is {self.state.value} already"
            case _:
                return "the gateway cannot stop it: it is a remote server, configured by its url"

    async def close(self) -> None:
        await self._tasks.close()
        self._limiter.close()
        self._enter(State.STOPPED)
        await self._dialer.aclose()

    def kill(self) -> None:
        """There is no child process."""

    # -- probing ------------------------------------------------------------------------------------------------------

    def _new_period(self, generation: int, identity: EngineIdentity) -> Period:
        spec, runtime = self.spec, self._runtime
        monitor = LivenessMonitor(
            Watched(
                generation,
                self._dialer,
                identity,
                health_model=spec.upstream_model,
                may_load=partial(self._may_load, identity, generation),
                canary=partial(self._recheck, identity, generation),
            ),
            spec,
            self._inflight,
            clock=runtime.clock,
            cadence=runtime.cadence,
            proved=self._limiter.probe_succeeded,
        )
        calls = CallJudge(
            self.id,
            generation,
            self._dialer,
            identity,
            has_process=False,
            cadence=runtime.cadence,
            recheck=monitor.recheck,
            secrets=spec.secrets,
        )
        return Period(generation, identity, monitor, calls)

    async def _follow(self) -> None:
        while True:
            try:
                await self._until_reached()
                await self._until_lost()
            except Exception:  # a bug must not end the probing of the server
                log.exception("probing failed, restarted", extra={"backend": self.id})
                await asyncio.sleep(self._runtime.cadence.probe_interval)

    async def _until_reached(self) -> None:
        longest = self._runtime.cadence.remote_retry_max
        pause = min(FIRST_RETRY_PAUSE, longest)
        while True:
            identity = EngineIdentity(self.spec)
            failure = await self._try_once(identity)
            if failure is None:
                self._period = self._new_period(self._period.generation + 1, identity)
                self._limiter.begin(slowly=self._losses > 0)
                self._enter(State.READY)
                return
            self._lose(failure)
            await asyncio.sleep(pause)
            pause = min(longest, 2 * pause)

    async def _until_lost(self) -> None:
        finding = await self._period.monitor.until_condemned()
        cause = finding.cause if finding.cause is Cause.STALLED else Cause.UNREACHABLE
        self._needs_proof = self._period.monitor.health in (Health.OK, Health.LOADING, Health.UNAVAILABLE)
        self._lose(self._failure(cause, f"is marked unreachable: {finding.reason}"))

    async def _try_once(self, identity: EngineIdentity) -> Failure | None:
        """None: reached."""
        within, name = self._runtime.cadence.health_timeout, self.spec.upstream_model
        try:
            names = await probe.models(self._dialer, identity, within=within)
            health = await probe.health(self._dialer, model=name, within=within, identity=identity)
            if health is Health.UNAVAILABLE and identity.is_mlx:
                return self._failure(Cause.WEDGE, "answers /health with 503: its generation thread is dead")
            is_listed = names is not None and model_list.knows(names, identity.model)
            if is_listed and health is not Health.UNAVAILABLE and not self._needs_proof:
                return None
            answer = await self._canary(identity, self.spec.timeouts.start)
        except ExchangeError as error:
            return self._failure(Cause.UNREACHABLE, f"cannot be reached: {error.detail}")
        if answer is None:
            self._needs_proof = False
            return None
        return self._refused(answer, names if not is_listed else None)

    def _recheck(self, identity: EngineIdentity, generation: int) -> Awaitable[AnswerVerdict | None] | None:
        """None: another model of that server has its turn."""
        if self._host.turn.locked():
            return None
        return self._canary(identity, max(CANARY_TIMEOUT, self._may_load(identity, generation)))

    async def _canary(self, identity: EngineIdentity, within: float) -> AnswerVerdict | None:
        """In turn with the other models of that server; then for ``within`` seconds. Raises ExchangeError."""
        async with self._host.turn:
            answer = await probe.patient_canary(self._dialer, identity, within=within, codes=self.spec.codes)
            if answer is None:
                self._host.generated(self.id, self._runtime.clock())
            return answer

    def _may_load(self, identity: EngineIdentity, generation: int) -> float:
        """Seconds that a load of the model may take; 0.0: it is loaded, as far as can be told."""
        is_loaded = (
            (identity.is_mlx and len(self._host.models) == 1)  # it keeps what it was started with
            or self._host.holds(self.id, self._runtime.clock())
            or self._inflight.any_decoding(generation)
        )
        return 0.0 if is_loaded else self.spec.timeouts.start

    def _refused(self, answer: AnswerVerdict, names: frozenset[str] | None = None) -> Failure:
        """``names``: those that it lists, if the model's is not among them."""
        cause = Cause.UNREACHABLE if answer.cause in (Cause.NONE, Cause.BAD_REQUEST) else answer.cause
        what = f"answers a first request with an error: {answer.message}"
        if names and answer.cause in (Cause.MODEL_NOT_FOUND, Cause.BAD_REQUEST):
            what += f" (it lists: {model_list.shown(names)}; set model: to one of them)"
        return self._failure(cause, what)

    def _failure(self, cause: Cause, what: str) -> Failure:
        return Failure(
            cause,
            Aftermath.UNKNOWN,
            f"{self.id} {self.spec.secrets.hide(what)}",
            backend=self.id,
            generation=self._period.generation,
        )

    def _lose(self, failure: Failure) -> None:
        period = self._period
        if self.state is State.READY:
            self._losses += 1
            period.calls.set_verdict(failure, self._inflight.progress_of(period.generation))
        self._last_failure, self._last_failure_at = failure, self._runtime.wall()
        if self.state is not State.UNREACHABLE:
            self._enter(State.UNREACHABLE)
        self._inflight.abort(period.generation, ExchangeError(Fault.DIED, failure.message))
        self._inflight.forget(period.generation)

    def _enter(self, state: State) -> None:
        was, self.state = self.state, state
        self._since = self._runtime.wall()
        fields: dict[str, object] = {"backend": self.id, "state": state.value, "was": was.value}
        if state is State.UNREACHABLE and self._last_failure is not None:
            fields |= {"cause": self._last_failure.cause.value, "reason": self._last_failure.message}
        log.log(logging.WARNING if state is State.UNREACHABLE else logging.INFO, "backend", extra=fields)
        self.on_change()

"""A server that already runs, here or on another machine: probed, routed and failed over like ours, not supervised.

    UNREACHABLE --- a token came ---> READY --- refused, 503, silence ---> UNREACHABLE

There is no process to ask what happened, so the verdict on a broken call is what a probe says straight after it. What
another mlx-gateway says in its structured errors is taken at its word (``verdict.judge_answer``).
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

from backends.admission.lease import Lease
from backends.admission.limiter import ConcurrencyLimiter
from backends.diagnosis import suspects
from backends.diagnosis.error_answers import AnswerVerdict
from backends.domain.failure import Aftermath, Cause, Failure, Sent
from backends.domain.snapshot import Snapshot
from backends.domain.spec import BackendSpec, Remote
from backends.domain.state import Health, StartReason, State
from backends.process.output import Ring
from backends.replica import lifecycle, liveness, probe
from backends.replica.runtime import Runtime
from backends.replica.suspend import SuspendDetector
from backends.tasks import Tasks
from backends.upstream.connect import dialer_to
from backends.upstream.exchange import NOT_SENT, Dialer, ExchangeError, Fault

log = logging.getLogger(__name__)

PROBE_EVERY = 2.0  # seconds between probes of one that is ready
RETRY_MAX = 10.0  # seconds between probes of one that is not
CANARY_WITHIN = 60.0  # seconds: it may be loading the model for the first request


@dataclass(eq=False, slots=True)
class Period:
    """One stretch of being reachable: what a life is to a process."""

    generation: int
    dialer: Dialer
    spec: BackendSpec
    verdict: Failure | None = None
    inflight_at_failure: int = 0
    suspects: frozenset[Lease] = frozenset()

    async def diagnose(self, error: ExchangeError, lease: Lease) -> Failure:
        """For one request whose exchange broke: what a probe says now."""
        if self.verdict is not None:
            suspect = lease in self.suspects and error.sent is Sent.MAYBE
            return replace(
                self.verdict, sent=error.sent, suspect=suspect, alone=suspect and self.inflight_at_failure == 1
            )
        failure = Failure(
            Cause.NONE,
            Aftermath.ALIVE,
            f"{self.spec.id} ended its answer early ({error.detail})",
            backend=self.spec.id,
            generation=self.generation,
            sent=error.sent,
            truncated=True,
        )
        if error.fault is Fault.STALLED:
            return replace(failure, cause=Cause.STALLED, truncated=False)
        health = await probe.health(self.dialer, within=1.0)
        if health is Health.OK and error.fault not in NOT_SENT:
            return failure
        message = f"{self.spec.id} cannot be reached: {error.detail}"
        return replace(failure, cause=Cause.UNREACHABLE, aftermath=Aftermath.UNKNOWN, message=message, truncated=False)


class RemoteReplica:
    """The command Start begins the probing, ``close`` ends it."""

    def __init__(self, spec: BackendSpec, remote: Remote, runtime: Runtime) -> None:
        self.spec = spec  # its target is ``remote``
        self.on_change: Callable[[], None] = lambda: None
        self.output = Ring()  # stays empty: its output is not ours to read
        self.state = State.STOPPED
        self._runtime = runtime
        self._remote = remote
        self._dialer = dialer_to(remote, runtime.chance)
        self._period = Period(0, self._dialer, spec)
        self._limiter = ConcurrencyLimiter(spec.max_inflight, runtime.clock, self._changed)
        self._inflight = self._limiter.inflight
        self._tasks = Tasks(spec.id)
        self._health = Health.UNKNOWN
        self._same_health = 0
        self._answered = 0.0
        self._suspected = False
        self._here = SuspendDetector(runtime.clock(), interval=PROBE_EVERY + probe.HEALTH_TIMEOUT)
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
        return self._health is Health.OK and not self._limiter.closed_to_all

    unloaded = loading_on_demand = recently_denied = False  # whether its model is loaded is the remote server's affair

    def set_demand(self, queued: int) -> None:
        """A remote server sees the requests when they come."""

    def load(self, _reason: StartReason = StartReason.DEMAND) -> None:
        """Begins the probing; whether the model is loaded is the remote server's affair."""
        if self.state is State.STOPPED:
            self._enter(State.STARTING)
            self._tasks.start(self._follow(), "follow")

    @property
    def is_up_or_starting(self) -> bool:
        return self.state in (State.READY, State.STARTING)

    def has_slot(self) -> bool:
        return self.state is State.READY and self._limiter.free

    def admit(self) -> Lease:
        lease = Lease(self, self._period, self._runtime.clock())
        self._inflight.add(lease)
        return lease

    def released(self, lease: Lease) -> None:
        opened = self._limiter.release(lease)
        if opened:
            log.warning("taken out", extra={"backend": self.id, "reason": self._limiter.breaker.reason})
        abandoned = not lease.non_streaming and lease.silence(self._runtime.clock()) >= liveness.ABANDONED_AFTER
        if opened or abandoned:
            self._suspected = True
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
            eta=0.0 if self.state is State.READY else RETRY_MAX if self.state is not State.STOPPED else None,
            responsive=self.responsive,
            slots=self._limiter.slots if self.state is State.READY else 0,
            note=self._limiter.breaker.reason if self._limiter.closed_to_all else "",
            last_failure=self._last_failure,
            last_failure_at=self._last_failure_at,
        )

    def command(self, event: lifecycle.PersonsCommand) -> str | None:
        match event:
            case lifecycle.Start() if self.state is State.STOPPED:
                self.load()
                return None
            case lifecycle.Start():
                return f"it is {self.state.value} already"
            case _:
                return "it is not ours to stop: it was given by its url"

    async def close(self) -> None:
        await self._tasks.close()
        self._limiter.close()
        self._enter(State.STOPPED)
        await self._dialer.aclose()

    def kill(self) -> None:
        """There is nothing of ours to kill."""

    # -- probing ------------------------------------------------------------------------------------------------------

    async def _follow(self) -> None:
        while True:
            try:
                await self._until_reached()
                await self._until_lost()
            except Exception:  # a fault of ours must not leave it unprobed for good
                log.exception("probing failed, begun again", extra={"backend": self.id})
                await asyncio.sleep(PROBE_EVERY)

    async def _until_reached(self) -> None:
        pause = 1.0
        while True:
            failure = await self._try_once()
            if failure is None:
                self._period = Period(self._period.generation + 1, self._dialer, self.spec)
                self._health, self._suspected = Health.OK, False
                self._answered = self._runtime.clock()
                self._limiter.begin(slowly=self._losses > 0)
                self._enter(State.READY)
                return
            self._lose(failure)
            await asyncio.sleep(pause)
            pause = min(RETRY_MAX, 2 * pause)

    async def _try_once(self) -> Failure | None:
        """Reached means the same as ready does for a process: one token came back."""
        try:
            answer = await probe.canary(
                self._dialer, self.spec.upstream_model, is_mlx=self.spec.is_mlx, within=CANARY_WITHIN
            )
        except ExchangeError as error:
            return self._failure(Cause.UNREACHABLE, f"cannot be reached: {error.detail}")
        return None if answer is None else self._refused(answer)

    async def _until_lost(self) -> None:
        while True:
            await asyncio.sleep(PROBE_EVERY)
            self._here.tick(self._runtime.clock())
            health = await probe.health(self._dialer, model=self.spec.upstream_model)
            self._same_health = self._same_health + 1 if health is self._health else 1
            self._health = health
            now = self._runtime.clock()
            if health in (Health.OK, Health.UNAVAILABLE):
                self._answered = now
            for lease in self._inflight.of(self._period.generation):
                if self._here.cap(lease.silence(now), now) >= self.spec.timeouts.progress and not lease.non_streaming:
                    error = ExchangeError(Fault.STALLED, f"no progress for {self.spec.timeouts.progress:g} s")
                    lease.abort(error)
                    self._suspected = True
            finding = liveness.assess(self._signs(now), progress=self.spec.timeouts.progress, is_mlx=self.spec.is_mlx)
            if isinstance(finding, liveness.AskCanary):
                failure = await self._try_once()
                self._suspected = False
                if failure is not None:
                    self._lose(failure)
                    return
                self._limiter.probe_succeeded()
            elif isinstance(finding, liveness.Condemn):
                cause = finding.cause if finding.cause is Cause.STALLED else Cause.UNREACHABLE
                self._lose(self._failure(cause, f"is taken out: {finding.reason}"))
                return

    def _signs(self, now: float) -> liveness.Signs:
        waiting, quiet = self._inflight.quiet(self._period.generation, now)
        return liveness.Signs(
            inflight=len(self._inflight.of(self._period.generation)),
            waiting=waiting,
            non_streaming=self._inflight.all_non_streaming(self._period.generation),
            quiet=self._here.cap(quiet, now),
            health=self._health,
            same_health=self._same_health,
            unanswered=self._here.cap(now - self._answered, now),
            hint=None,
            suspected=self._suspected,
            canary_failed=False,
        )

    def _refused(self, answer: AnswerVerdict) -> Failure:
        cause = Cause.UNREACHABLE if answer.cause in (Cause.NONE, Cause.BAD_REQUEST) else answer.cause
        return self._failure(cause, f"answers a first request with an error: {answer.message}")

    def _failure(self, cause: Cause, what: str) -> Failure:
        return Failure(
            cause, Aftermath.UNKNOWN, f"{self.id} {what}", backend=self.id, generation=self._period.generation
        )

    def _lose(self, failure: Failure) -> None:
        period = self._period
        if self.state is State.READY:
            self._losses += 1
            period.verdict = failure
            progress_of = self._inflight.progress_of(period.generation)
            period.inflight_at_failure, period.suspects = len(progress_of), suspects.suspects(failure, progress_of)
        self._last_failure, self._last_failure_at = failure, self._runtime.wall()
        if self.state is not State.UNREACHABLE:
            self._enter(State.UNREACHABLE)
        self._inflight.abort(period.generation, ExchangeError(Fault.DIED, failure.message))

    def _enter(self, state: State) -> None:
        was, self.state = self.state, state
        self._since = self._runtime.wall()
        fields: dict[str, object] = {"backend": self.id, "state": state.value, "was": was.value}
        if state is State.UNREACHABLE and self._last_failure is not None:
            fields |= {"cause": self._last_failure.cause.value, "reason": self._last_failure.message}
        log.log(logging.WARNING if state is State.UNREACHABLE else logging.INFO, "backend", extra=fields)
        self.on_change()

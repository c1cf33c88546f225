"""One supervised replica: the actor that owns its process, its slots and its state.

Every change of state goes through ``post``: one synchronous step of the state machine in ``lifecycle``, whose effects
are then carried out. There is no await between a decision and its record, so no decision rests on a stale view, and no
lock is needed.

An instance (one process) is two tasks: ``_live`` launches the process, waits for its exit and reports it; ``_watch``
proves that the process generates, and then monitors it (``liveness`` decides).
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import replace
from signal import Signals

from backends.admission.lease import Lease
from backends.admission.limiter import ConcurrencyLimiter
from backends.domain.failure import Aftermath, Cause, Failure
from backends.domain.snapshot import Loading, Snapshot
from backends.domain.spec import BackendSpec, Launch
from backends.domain.state import StartReason, State
from backends.memory.residency import Residency
from backends.process.output import Ring
from backends.replica import lifecycle, liveness, log_fields
from backends.replica.instance import Instance
from backends.replica.launch import Launcher
from backends.replica.lifecycle import LifecycleState
from backends.replica.readiness import Readiness
from backends.replica.runtime import Runtime
from backends.tasks import Tasks
from backends.upstream.exchange import ExchangeError, Fault

log = logging.getLogger(__name__)


class SupervisedReplica:
    """``command`` says what is wanted; ``snapshot`` says what is."""

    def __init__(self, spec: BackendSpec, launch: Launch, runtime: Runtime) -> None:
        self.spec = spec  # its target is ``launch``
        self.on_change: Callable[[], None] = lambda: None
        self.output = Ring()
        self.launch = launch
        self.residency = Residency()
        self.demand = 0  # requests in line for its model
        self._runtime = runtime
        self._machine = LifecycleState(state=State.UNLOADED if spec.on_demand else State.STOPPED)
        self._limiter = ConcurrencyLimiter(spec.max_inflight, runtime.clock, self._changed)
        self._inflight = self._limiter.inflight
        self._launcher = Launcher(spec, launch, runtime, ring=self.output, inflight=self._inflight)
        self._life: Instance | None = None
        self._tasks = Tasks(spec.id)
        self._life_task: asyncio.Task[None] | None = None
        self._stopping: asyncio.Task[int] | None = None
        self._alarm: asyncio.TimerHandle | None = None
        self._since = runtime.wall()
        self._failed_at: float | None = None
        runtime.scheduler.join(self)

    # -- what the pool and the fleet see ------------------------------------------------------------------------------

    @property
    def id(self) -> str:
        return self.spec.id

    @property
    def state(self) -> State:
        return self._machine.state

    @property
    def generation(self) -> int:
        return self._machine.generation

    @property
    def inflight(self) -> int:
        return len(self._inflight)

    @property
    def responsive(self) -> bool:
        life = self._life
        return life is not None and life.monitor.responsive and not self._limiter.closed_to_all

    @property
    def is_up_or_starting(self) -> bool:
        return self._machine.is_up_or_starting

    def has_slot(self) -> bool:
        return self._machine.state is State.READY and self._limiter.free

    def admit(self) -> Lease:
        """A slot on the present life. The caller has just seen ``has_slot``, with no await between."""
        if self._life is None:
            raise RuntimeError(f"{self.id} has no process to admit to")
        lease = Lease(self, self._life.calls, self._runtime.clock())
        self.residency.used_at = lease.admitted
        self._inflight.add(lease)
        return lease

    def snapshot(self) -> Snapshot:
        m, life = self._machine, self._life
        return Snapshot(
            id=self.spec.id,
            model=self.spec.model,
            state=m.state,
            pid=life.child.pid if life else None,
            url=f"http://{self.launch.host}:{life.port}" if life else None,
            inflight=self._inflight.clients,
            restarts=m.restarts,
            generation=m.generation,
            since=self._since,
            eta=lifecycle.eta(m, self._runtime.clock()),
            responsive=self.responsive,
            slots=self._limiter.slots if m.state is State.READY else 0,
            memory=life.memory.now if life else None,
            last_failure=m.last_failure,
            last_failure_at=self._failed_at,
            note=self._note_of(m),
            unloaded=m.unloaded,
            evicting=m.evicting,
            loading=self._loading(m),
        )

    def _loading(self, m: LifecycleState) -> Loading | None:
        if m.state not in (State.STARTING, State.WAITING_FOR_MEMORY) or m.idle:
            return None
        phase = m.waiting_for or ("loading" if self._life is not None else "launching")
        return Loading(phase, self._runtime.clock() - m.started_at, self.residency.load_seconds)

    def _note_of(self, m: LifecycleState) -> str:
        if m.gave_up:
            return f"gave up: {m.gave_up}"
        return m.waiting_for or (self._limiter.breaker.reason if self._limiter.closed_to_all else "")

    def _changed(self) -> None:
        self.on_change()
        self._runtime.scheduler.changed()

    # -- memory and demand ---------------------------------------------------------------------------------------------

    @property
    def clients(self) -> int:
        return self._inflight.clients

    @property
    def wanted(self) -> bool:
        """The load under way, or the next, is still needed."""
        m = self._machine
        for_requests = m.reason in (StartReason.DEMAND, StartReason.RECYCLE) and not self.spec.pinned
        return m.state is not State.STOPPING and (not for_requests or self.demand > 0)

    @property
    def pressing(self) -> bool:
        """Requests in line, a person or the configuration need it now. A model that failed in use while no request
        waits comes back only where its memory is free."""
        asked_for = self._machine.reason in (StartReason.EAGER, StartReason.OPERATOR)
        return self.spec.pinned or asked_for or self.demand > 0

    @property
    def failing(self) -> bool:
        return self._failed_lately and not self._machine.proven

    @property
    def _failed_lately(self) -> bool:
        return bool(self._machine.history.recent(self.spec.restart, self._runtime.clock()))

    @property
    def evicting(self) -> bool:
        return self._machine.evicting

    @property
    def memory(self) -> int:
        return (self._life.memory.now or 0) if self._life is not None else 0

    @property
    def used_at(self) -> float:
        return self.residency.used_at

    @property
    def ready_at(self) -> float:
        return self.residency.ready_at

    @property
    def next_state(self) -> State:
        """The state that it is in, or on its way to."""
        return self._machine.next

    @property
    def unloaded(self) -> bool:
        return self._machine.unloaded

    @property
    def loading_on_demand(self) -> bool:
        return self._machine.loading_on_demand

    @property
    def recently_denied(self) -> bool:
        denied_at = self._machine.denied_at
        return denied_at is not None and self._runtime.clock() - denied_at < self._runtime.cadence.memory_retry

    def set_demand(self, queued: int) -> None:
        """``queued``: requests in line for the model."""
        changed = bool(queued) != bool(self.demand)
        self.demand = queued
        if changed:
            self._runtime.scheduler.changed()

    def load(self, reason: StartReason = StartReason.DEMAND) -> None:
        self.post(lifecycle.Load(reason))

    def unload(self) -> None:
        """Finish what is in flight, then leave the memory; for requests in line the model is loaded again."""
        self.post(lifecycle.Unload(demand=self.demand > 0))
        self._check_drained()

    def evict(self) -> None:
        self.post(lifecycle.Evict())
        self._check_drained()

    def keep(self) -> None:
        self.post(lifecycle.Keep())

    def enforce_residency(self, now: float, *, spare: bool) -> None:
        """Unloads a model that was idle for ``idle_unload``; begins with a new process, between requests, when this one
        takes more memory than the limit. ``spare``: another replica can take over; else it keeps taking requests until
        none is in flight."""
        m, life = self._machine, self._life
        if life is None or m.state not in (State.READY, State.DRAINING):
            return
        self._runtime.scheduler.peaks.note(self.launch, life.memory.peak)
        over_limit = self.residency.over_limit(self.memory, self.spec.memory)
        idle = not self._inflight
        if m.state is State.DRAINING:
            if m.reason is StartReason.RECYCLE and m.then is State.STARTING and not (over_limit and spare):
                self.keep()
        elif over_limit and (idle or spare):
            log.info("backend recycled", extra={"backend": self.id, "memory": self.memory, "limit": self.spec.memory})
            self.post(lifecycle.Recycle())
            self._check_drained()
        elif self.spec.idle_unload and idle and not self.demand and now - self.used_at >= self.spec.idle_unload:
            self.unload()

    # -- commands of a person -----------------------------------------------------------------------------------------

    def command(self, event: lifecycle.PersonsCommand) -> str | None:
        """None when it is being carried out, else why it cannot be."""
        refused = self.post(event)
        self._check_drained()
        return refused

    async def close(self) -> None:
        """Stop, and come back when the process is gone; or, should even SIGKILL not end it, after a while."""
        self.post(lifecycle.Stop())
        if self._life_task is not None:
            _, stuck = await asyncio.wait(
                {self._life_task}, timeout=self.spec.timeouts.stop + self._runtime.cadence.unkillable
            )
            if stuck:
                log.error("process cannot be ended", extra={"backend": self.id, "pid": self.snapshot().pid})
        await self._tasks.close()
        if self._alarm is not None:
            self._alarm.cancel()
        self._limiter.close()

    def kill(self) -> None:
        """SIGKILL, for a gateway that has to end at once."""
        self.post(lifecycle.Stop())
        if self._life is not None:
            self._life.child.signal_group(Signals.SIGKILL)

    # -- the machine --------------------------------------------------------------------------------------------------

    def post(self, event: lifecycle.Event) -> str | None:
        before = self._machine
        self._machine, effects = lifecycle.step(
            before, event, policy=self.spec.restart, now=self._runtime.clock(), chance=self._runtime.chance()
        )
        self._note(before, self._machine)
        refused = None
        for effect in effects:
            if isinstance(effect, lifecycle.Refuse):
                refused = effect.reason
            else:
                self._do(effect)
        if self._machine is not before:
            self._changed()
        return refused

    def _do(self, effect: lifecycle.Spawn | lifecycle.Terminate | lifecycle.AbortCalls | lifecycle.WakeAfter) -> None:
        match effect:
            case lifecycle.Spawn(generation=generation):
                self._life_task = self._tasks.start(self._live(generation), f"life-{generation}")
            case lifecycle.Terminate():
                if self._life is not None:
                    self._terminate(self._life)
                else:
                    self._runtime.scheduler.changed()  # the launch sees that it is not wanted any more
            case lifecycle.AbortCalls(generation=generation, failure=failure):
                if self._life is not None:
                    self._life.calls.set_verdict(failure, self._inflight.progress_of(generation))
                self._inflight.abort(generation, ExchangeError(Fault.DIED, failure.message))
            case lifecycle.WakeAfter(generation=generation, delay=delay):
                loop = asyncio.get_running_loop()
                self._alarm = loop.call_later(delay, self._wake, generation)

    def _wake(self, generation: int) -> None:
        self.post(lifecycle.Woke(generation, wanted=self.wanted))

    def _note(self, before: LifecycleState, after: LifecycleState) -> None:
        """One line in the journal for each change of state, with the failure that led to it."""
        if after.last_failure_at != before.last_failure_at or after.last_failure is not before.last_failure:
            self._failed_at = self._runtime.wall()
        if after.state is before.state and after.generation == before.generation:
            return
        if after.state is State.READY:
            now = self._runtime.clock()
            if before.state is State.STARTING:
                self.residency.became_ready(now, load_seconds=now - before.started_at)
        self._since = self._runtime.wall()
        level, fields = log_fields.of_change(before, after, self._runtime.clock())
        log.log(level, "backend", extra={"backend": self.id, **fields})

    # -- a life -------------------------------------------------------------------------------------------------------

    async def _live(self, generation: int) -> None:
        """From the spawn to the report of the exit; whatever happens in between, the exit is reported last."""
        try:
            failure = await self._lived(generation)
        except Exception as error:  # a fault of ours must not leave a backend in a state that nothing leads out of
            log.exception("supervision failed", extra={"backend": self.id})
            failure = Failure(Cause.NATIVE_CRASH, Aftermath.UNKNOWN, f"{self.id} could not be supervised: {error!r}")
        if self._life is not None:
            self._life.calls.set_verdict(failure, self._inflight.progress_of(generation))
        self._life = None
        self._runtime.scheduler.left(self.id)
        failure = replace(failure, backend=self.id, generation=generation)
        if failure.aftermath is Aftermath.NOT_LAUNCHED:
            retry = self._runtime.cadence.memory_retry if self.spec.pinned else None
            self.post(lifecycle.Declined(generation, failure, retry))
        else:
            self.post(lifecycle.Exited(generation, failure))

    async def _lived(self, generation: int) -> Failure:
        """What became of this life."""

        def waits(what: str) -> None:
            self.post(lifecycle.Waiting(generation, what) if what else lifecycle.Granted(generation))

        async def enter() -> Failure | None:
            refused = await self._runtime.scheduler.enter(self, waits)
            if refused is None:
                waits("")
            return refused

        life = await self._launcher.launch(
            generation,
            wanted=lambda: self._machine.state is not State.STOPPING,
            enter=enter,
            waits=waits,
            proved=self._limiter.probe_succeeded,
        )
        if isinstance(life, Failure):
            return life
        self._life = life
        try:
            return await self._followed(life)
        except Exception:  # reported by ``_live``; the process must not be left behind
            await self._ended_at_once(life)
            raise
        finally:
            await self._launcher.ended(life)

    async def _followed(self, life: Instance) -> Failure:
        """From the process to what its end means, when it and all that it left are gone."""
        generation = life.generation
        self.post(lifecycle.Launched(generation))
        if self._machine.state is State.STOPPING:  # told to stop while it was being spawned
            self._terminate(life)
        watch = self._tasks.start(self._watch(life), f"watch-{generation}")
        try:
            returncode = await life.child.wait()
        finally:
            watch.cancel()
        failure = self._shared(replace(life.calls.verdict or life.of_exit(returncode), exit=returncode))
        life.calls.set_verdict(failure, self._inflight.progress_of(generation))
        # Told at once: requests wait for it, and nobody may be admitted to a process that is gone. It also ends what
        # the leader has left of its process group; only when that is done the life is over. (Nothing is told where we
        # were ending it anyway.)
        self.post(lifecycle.Failed(generation, replace(failure, backend=self.id, generation=generation)))
        if self._stopping is not None:
            await asyncio.wait({self._stopping})
            self._stopping = None
        if life.monitor.was_ready:
            self._runtime.scheduler.peaks.note(self.launch, life.memory.peak)
        return failure

    async def _ended_at_once(self, life: Instance) -> None:
        """SIGKILL, after a fault of ours."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._runtime.cadence.unkillable):
                await life.child.stop(0.0)

    def _shared(self, failure: Failure) -> Failure:
        """Marked, where it is part of what a sibling has failed of."""
        part = self._runtime.incidents.is_part_of_another(failure, self._runtime.clock())
        return replace(failure, shared=part)

    def _condemn(self, generation: int, failure: Failure) -> None:
        self.post(lifecycle.Failed(generation, self._shared(failure)))

    async def _watch(self, life: Instance) -> None:
        failure = await self._proved(life)
        if failure is None:
            life.monitor.begin()
            self._limiter.begin(slowly=self._failed_lately)
            self.post(lifecycle.Proven(life.generation))
            failure = life.of_condemned(await self._condemned(life))
        self._condemn(life.generation, life.named(failure))

    async def _proved(self, life: Instance) -> Failure | None:
        try:
            return await Readiness(life, self.spec, clock=self._runtime.clock, cadence=self._runtime.cadence).prove()
        except Exception as error:  # as above: it must not stay in STARTING
            log.exception("readiness could not be judged", extra={"backend": self.id})
            message = f"{self.id} could not be judged ready: {error!r}"
            return Failure(Cause.START_TIMEOUT, Aftermath.UNKNOWN, message)

    async def _condemned(self, life: Instance) -> liveness.Condemn:
        """A watch that ends by a fault of ours is begun again: nobody else would notice a wedged backend."""
        while True:
            try:
                return await life.monitor.until_condemned()
            except Exception:  # whatever it was, the backend must not go unwatched
                log.exception("watch failed, begun again", extra={"backend": self.id})
                await asyncio.sleep(self._runtime.cadence.supervision_retry)

    def _terminate(self, life: Instance) -> None:
        life.asked_to_stop = True
        self._stopping = self._tasks.start(life.child.stop(self.spec.timeouts.stop), f"stop-{life.generation}")

    # -- the leases' side ---------------------------------------------------------------------------------------------

    def released(self, lease: Lease) -> None:
        opened, life = self._limiter.release(lease), self._life
        if life is not None and life.generation == lease.generation:
            life.monitor.request_ended(lease, breaker_opened=opened)
            if opened:
                log.warning("backend taken out", extra={"backend": self.id, "reason": self._limiter.breaker.reason})
        if not lease.internal:
            self.residency.used_at = self._runtime.clock()
        self._check_drained()
        self._changed()

    def _check_drained(self) -> None:
        m = self._machine
        if m.state is State.DRAINING and not self._inflight.of(m.generation):
            self.post(lifecycle.Emptied(m.generation, demand=self.demand > 0))

"""One supervised replica: the actor that owns its process, its slots and its state.

Every change of state goes through ``post``: one synchronous step of the state machine in ``lifecycle``, whose effects
are then executed. There is no await between a decision and its record, so no decision is based on stale state, and no
lock is needed.

An instance (one process) has two tasks: ``_run_instance`` launches the process, waits for its exit and reports it;
``_watch`` proves that the process generates, and then monitors it (``liveness`` decides).
"""

import asyncio
import contextlib
import logging
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from signal import Signals

from backends.admission import slow_start
from backends.admission.inflight import InFlight
from backends.admission.lease import Lease
from backends.admission.limiter import ConcurrencyLimiter
from backends.admission.memory_gate import Shortage
from backends.admission.slot_request import SlotRequest
from backends.diagnosis.suspects import MEMORY
from backends.domain.engine import Engine
from backends.domain.engine_command import EngineCommand
from backends.domain.failure import Aftermath, Blame, Cause, Failure
from backends.domain.inflight_limit import InflightLimit, inflight_limits
from backends.domain.prompt_bound import PromptBound
from backends.domain.report import EngineReport
from backends.domain.snapshot import Loading, Snapshot
from backends.domain.spec import BackendSpec, Launch
from backends.domain.state import StartReason, State
from backends.memory import measured
from backends.memory.past_lives import PastLives
from backends.memory.residency import Residency
from backends.process.output import Ring
from backends.replica import events, lifecycle, liveness, log_fields
from backends.replica.batch_memory import BatchMemory
from backends.replica.engine_memory import EngineMemory
from backends.replica.instance import Instance
from backends.replica.launch import Launcher
from backends.replica.learned_rates import RatesMemory
from backends.replica.lifecycle import LifecycleState
from backends.replica.memory_blame import MemoryBlame
from backends.replica.mending import Mended, MendWatch
from backends.replica.readiness import Readiness
from backends.replica.runtime import Runtime
from backends.tasks import Tasks
from backends.upstream.exchange import ExchangeError, Fault

log = logging.getLogger(__name__)

MISSING = "not loaded: it is loaded as soon as enough memory is free"
_FOR_REQUESTS = frozenset({StartReason.DEMAND, StartReason.RECYCLE, StartReason.RESTORE})


class SupervisedReplica:
    """``command`` requests a state; ``snapshot`` returns the present one."""

    def __init__(self, spec: BackendSpec, launch: Launch, runtime: Runtime) -> None:
        self.spec = spec  # its target is ``launch``
        self.on_change: Callable[[], None] = lambda: None
        self.output = Ring()
        self.launch = launch
        self.residency = Residency()
        self.past = PastLives()
        self._lasting = 0  # bytes of its process when they were last measured, without its freed buffers
        self.demand = 0  # requests queued for its model
        self._accompanied = False  # another replica of its model is ready
        self._mend_watch = MendWatch(launch, clock=runtime.clock, cadence=runtime.cadence)
        self._mending: asyncio.Task[None] | None = None
        self._runtime = runtime
        self._machine = LifecycleState(
            state=State.UNLOADED if spec.on_demand else State.STOPPED, start_seconds=runtime.load_times.get(launch)
        )
        limits = inflight_limits(spec)
        self._limiter = ConcurrencyLimiter(
            lambda: limits.by_memory if self._batch_memory.is_known else limits.usual,
            runtime.clock,
            self._changed,
            batches=spec.batches,
        )
        self._inflight = self._limiter.inflight
        self._rates = RatesMemory(self._inflight, launch, runtime.rates, runtime.clock())
        self._engine_memory = EngineMemory(
            launch,
            share=lambda: runtime.scheduler.share(self),
            tell=self.tell,
            peaks=runtime.scheduler.peaks,
            bases=runtime.scheduler.bases,
        )
        self._launcher = Launcher(
            spec,
            launch,
            runtime,
            ring=self.output,
            inflight=self._inflight,
            past=self.past,
            sizes=self._engine_memory.placeholders,
        )
        self._batch_memory = BatchMemory(
            spec,
            self._inflight,
            self._engine_memory,
            cost=partial(runtime.batch_cost, spec.model),
            report=lambda: self.report,
            clock=runtime.clock,
        )
        self._blame = MemoryBlame(self, runtime.scheduler, within=runtime.cadence.occupancy_wait)
        self._instance: Instance | None = None
        self._tasks = Tasks(spec.id)
        self._instance_task: asyncio.Task[None] | None = None
        self._stopping: asyncio.Task[int] | None = None
        self._wake_timer: asyncio.TimerHandle | None = None
        self._since = runtime.wall()
        self._failed_at: float | None = None
        runtime.scheduler.join(self)

    # -- for the pool and the fleet -----------------------------------------------------------------------------------

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
        instance = self._instance
        unfit = instance is None or instance.ended or not instance.monitor.responsive
        return not unfit and not self._limiter.closed_to_all

    @property
    def engine(self) -> Engine:
        instance = self._instance
        return instance.identity.engine if instance else self.spec.engine

    @property
    def report(self) -> EngineReport | None:
        """What the process tells of itself; None = no instrument, or it has fallen silent."""
        return self._instance.report if self._instance is not None else None

    def tell(self, command: EngineCommand) -> bool:
        """To the instrument in the process. False: there is none, or it does not listen."""
        channel = self._instance.channel if self._instance is not None else None
        return channel is not None and channel.tell(command)

    @property
    def abandoned(self) -> int:
        return self._inflight.abandoned_count

    @property
    def flight(self) -> InFlight:
        return self._inflight

    @property
    def is_up_or_starting(self) -> bool:
        return self._machine.is_up_or_starting

    @property
    def recovers(self) -> bool:
        return self._machine.recovers

    @property
    def limit(self) -> InflightLimit:
        return self._limiter.limit

    def has_slot(self) -> bool:
        instance = self._instance
        unfit = instance is None or instance.ended or instance.monitor.occupied
        return self._machine.state is State.READY and self._limiter.free and not unfit

    def fits(self, request: SlotRequest, share: float = 1.0) -> bool:
        return self._batch_memory.fits(request, self.generation, share)

    def shortage(self, request: SlotRequest) -> Shortage | None:
        return self._batch_memory.shortage(request, self.generation)

    @property
    def prompt_bound(self) -> PromptBound | None:
        return self._batch_memory.prompt_bound

    def admit(self) -> Lease:
        """A slot on the present instance. The caller has checked ``has_slot``, with no await in between."""
        if self._instance is None:
            raise RuntimeError(f"{self.id} has no process to admit to")
        lease = Lease(self, self._instance.calls, self._runtime.clock())
        self.residency.used_at = lease.admitted
        self._inflight.add(lease)
        self._batch_memory.admitted()
        return lease

    def snapshot(self) -> Snapshot:
        m, instance = self._machine, self._instance
        return Snapshot(
            id=self.spec.id,
            model=self.spec.model,
            state=m.state,
            pid=instance.child.pid if instance else None,
            url=f"http://{self.launch.host}:{instance.port}" if instance else None,
            inflight=self._inflight.clients,
            restarts=m.restarts,
            generation=m.generation,
            since=self._since,
            eta=lifecycle.eta(m, self._runtime.clock()),
            eta_known=lifecycle.eta_known(m, self._runtime.clock()),
            retry_in=lifecycle.retry_in(m, self._runtime.clock()),
            recovers=m.recovers,
            given_up=m.given_up,
            responsive=self.responsive,
            faltering=instance is not None and (instance.ended or instance.monitor.faltering),
            slots=self._limiter.slots if m.state is State.READY else 0,
            limit=self.limit,
            memory=self.memory or None,
            share=self._engine_memory.share if instance else None,
            last_failure=m.last_failure,
            last_failure_at=self._failed_at,
            note=self._note_of(m),
            unloaded=m.unloaded,
            missing=m.missing,
            crash_looping=m.crash_looping,
            failed_lives=m.history.streak,
            evicting=m.evicting,
            loading=self._loading(m),
            engine=self.engine,
            report=self.report,
            abandoned=self._inflight.abandoned_count,
            silence_limit=instance.monitor.silence_limit if instance and m.state is State.READY else None,
        )

    def _loading(self, m: LifecycleState) -> Loading | None:
        if m.state not in (State.STARTING, State.WAITING_FOR_MEMORY) or m.idle:
            return None
        phase = m.waiting_for or ("loading" if self._instance is not None else "launching")
        return Loading(phase, self._runtime.clock() - m.started_at, m.start_seconds)

    def _note_of(self, m: LifecycleState) -> str:
        if m.gave_up:
            return f"gave up: {m.gave_up}"
        if m.missing and self._accompanied:
            return MISSING
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
        """The load in progress, or the next load, is still needed. A model that is in use is loaded with all its
        replicas: the second of them is needed for failover, not for the requests that are queued."""
        m = self._machine
        for_requests = m.reason in _FOR_REQUESTS and not self.spec.pinned
        return m.state is not State.STOPPING and (not for_requests or self.demand > 0 or self._accompanied)

    @property
    def pressing(self) -> bool:
        """Queued requests, the operator or the configuration need it now. A model that failed in use while no request
        is queued, and a replica beside others that are ready, are loaded only if enough memory is free; the load is
        ended if another model needs the memory."""
        asked_for = self._machine.reason in (StartReason.EAGER, StartReason.OPERATOR)
        return self.spec.pinned or asked_for or self.demand > 0

    @property
    def failing(self) -> bool:
        m = self._machine
        return self._failed_lately and (not m.proven or m.crash_looping)

    def _slow_start_is_due(self) -> bool:
        m = self._machine
        cause = Cause.NONE if m.last_failure is None else m.last_failure.cause
        return slow_start.is_due(cause, unanswered=m.history.streak, accompanied=self._accompanied)

    @property
    def _failed_lately(self) -> bool:
        return self._machine.history.failed_lately(self.spec.restart, self._runtime.clock())

    @property
    def evicting(self) -> bool:
        return self._machine.evicting

    @property
    def memory(self) -> int:
        return measured.held(self._instance.memory.now, self.report) if self._instance is not None else 0

    @property
    def pooled(self) -> int:
        return 0 if self.report is None else self.report.pooled

    @property
    def cached(self) -> int:
        report = self.report
        return (report.cached_bytes or 0) if report is not None and self._engine_memory.ours.prompt_cache else 0

    @property
    def working_set(self) -> int | None:
        return None if self.report is None else self.report.working_set

    def release(self) -> None:
        if self.report is not None:
            self._engine_memory.release(self.report)

    @property
    def pid(self) -> int | None:
        return self._instance.child.pid if self._instance is not None else None

    @property
    def used_at(self) -> float:
        return self.residency.used_at

    @property
    def ready_at(self) -> float:
        return self.residency.ready_at

    @property
    def next_state(self) -> State:
        """The present state, or in DRAINING and STOPPING the state that follows."""
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

    def set_demand(self, queued: int, *, accompanied: bool) -> None:
        """``queued``: requests queued for the model. ``accompanied``: another replica of it is ready."""
        changed = (bool(queued), accompanied) != (bool(self.demand), self._accompanied)
        self.demand, self._accompanied = queued, accompanied
        if changed:
            self._runtime.scheduler.changed()

    def restore(self) -> None:
        """Loads a missing replica of a model in use, if enough memory is free."""
        wanted = self._machine.missing and self._accompanied and self._machine.idle
        if wanted and not self.recently_denied and self._runtime.scheduler.has_room(self):
            self.load(StartReason.RESTORE)

    def load(self, reason: StartReason = StartReason.DEMAND) -> None:
        self.post(events.Load(reason))

    def look_again(self) -> None:
        self._mend_watch.look_again()

    def unload(self) -> None:
        """Finish the requests in flight, then unload; the model is loaded again for queued requests."""
        self.post(events.Unload(demand=self.demand > 0))
        self._check_drained()

    def evict(self) -> None:
        self.post(events.Evict())
        self._check_drained()

    def keep(self) -> None:
        self.post(events.Keep())

    def enforce_residency(self, *, spare: bool, model_idle: float) -> None:
        """Unloads a model that was idle for ``idle_unload``; recycles a process that uses more memory than the limit.
        ``spare``: another replica can take over; otherwise it takes requests until none is in flight. ``model_idle``:
        seconds without a request for the model: a replica that gets none is needed for failover."""
        m, instance = self._machine, self._instance
        if instance is None or m.state not in (State.READY, State.DRAINING):
            return
        over_limit = self.residency.over_limit(self._lasting, self.spec.memory)
        idle = not self._inflight.active
        now = self._runtime.clock()
        unused = now - self.residency.used_at if idle else 0.0
        self._engine_memory.update(self.report, instance.memory, idle=unused, now=now)
        self._rates.tick(now)
        if m.state is State.DRAINING:
            if m.reason is StartReason.RECYCLE and m.then is State.STARTING and not (over_limit and spare):
                self.keep()
        elif over_limit and (idle or spare):
            log.info("backend recycled", extra={"backend": self.id, "memory": self.memory, "limit": self.spec.memory})
            self.post(events.Recycle())
            self._check_drained()
        elif self.spec.idle_unload and idle and not self.demand and model_idle >= self.spec.idle_unload:
            self.unload()

    # -- commands of the operator -------------------------------------------------------------------------------------

    def command(self, event: events.OperatorCommand) -> str | None:
        """None if the command is accepted, else why it is refused."""
        refused = self.post(event)
        self._check_drained()
        return refused

    async def close(self) -> None:
        """Stops; returns when the process has ended or, if SIGKILL fails, after ``cadence.unkillable`` more seconds."""
        self._rates.note()
        self.post(events.Stop())
        if self._instance_task is not None:
            _, stuck = await asyncio.wait(
                {self._instance_task}, timeout=self.spec.timeouts.stop + self._runtime.cadence.unkillable
            )
            if stuck:
                log.error("process cannot be ended", extra={"backend": self.id, "pid": self.snapshot().pid})
        await self._tasks.close()
        if self._wake_timer is not None:
            self._wake_timer.cancel()
        self._limiter.close()

    def kill(self) -> None:
        """SIGKILL, for a gateway that has to exit at once."""
        self.post(events.Stop())
        if self._instance is not None:
            self._instance.child.signal_session(Signals.SIGKILL)

    # -- the state machine --------------------------------------------------------------------------------------------

    def post(self, event: events.Event) -> str | None:
        before = self._machine
        self._machine, effects = lifecycle.step(
            before, event, policy=self.spec.restart, now=self._runtime.clock(), chance=self._runtime.chance()
        )
        self._note(before, self._machine)
        refused = None
        for effect in effects:
            if isinstance(effect, events.Refuse):
                refused = effect.reason
            else:
                self._do(effect)
        if self._machine is not before:
            self._changed()
        return refused

    def _do(self, effect: events.Order) -> None:
        match effect:
            case events.Spawn(generation=generation):
                self._instance_task = self._tasks.start(self._run_instance(generation), f"instance-{generation}")
            case events.Terminate():
                if self._instance is not None:
                    self._terminate(self._instance)
                else:
                    self._runtime.scheduler.changed()  # the launch then sees that it is no longer wanted
            case events.AbortCalls(generation=generation, failure=failure):
                if self._instance is not None:
                    self._set_verdict(self._instance, failure)
                self._inflight.abort(generation, ExchangeError(Fault.DIED, failure.message))
            case events.Watch(generation=generation):
                if self._mending is not None:
                    self._mending.cancel()
                self._mending = self._tasks.start(self._await_mending(generation), f"mending-{generation}")
            case events.WakeAfter(generation=generation, delay=delay):
                loop = asyncio.get_running_loop()
                self._wake_timer = loop.call_later(delay, self._wake, generation)

    async def _await_mending(self, generation: int) -> None:
        """Starts it again when it is mended. One that was given up is tried at ``retry_at`` in any case."""

        def down() -> bool:
            return self._machine.generation == generation and self._machine.state in (State.BACKOFF, State.FAILED)

        def retry_at() -> float:
            given_up = self._machine.state is State.FAILED
            return (self._machine.retry_at if given_up else 0.0) or math.inf

        mended = await self._mend_watch.until_mended(down=down, retry_at=retry_at)
        if mended is not None:
            log.info("backend is tried again", extra={"backend": self.id, "reason": mended.value})
            self.post(events.Mended(generation, wanted=self.wanted, unseen=mended is Mended.UNSEEN))

    def _wake(self, generation: int) -> None:
        self.post(events.Woke(generation, wanted=self.wanted))

    def _note(self, before: LifecycleState, after: LifecycleState) -> None:
        """Logs one line for each change of state, with the failure that caused it."""
        if after.last_failure_at != before.last_failure_at or after.last_failure is not before.last_failure:
            self._failed_at = self._runtime.wall()
        if after.state is before.state and after.generation == before.generation:
            return
        if before.state is State.STARTING and after.state is State.READY:
            self.residency.became_ready(self._runtime.clock())
            if after.start_seconds is not None:
                self._runtime.load_times.note(self.launch, after.start_seconds)
        self._since = self._runtime.wall()
        level, fields = log_fields.of_change(before, after, self._runtime.clock())
        log.log(level, "backend", extra={"backend": self.id, **fields})

    # -- an instance --------------------------------------------------------------------------------------------------

    async def _run_instance(self, generation: int) -> None:
        """From the launch to the report of the exit, which is always the last event."""
        try:
            failure = await self._launch_and_wait(generation)
        except Exception as error:  # a bug must not leave the replica in a state without exit
            log.exception("supervision failed", extra={"backend": self.id})
            failure = Failure(Cause.NATIVE_CRASH, Aftermath.UNKNOWN, f"{self.id} could not be supervised: {error!r}")
        if self._instance is not None:
            self._set_verdict(self._instance, failure)
        self._instance = None
        self._engine_memory.ended()
        self._inflight.forget(generation)
        self._runtime.scheduler.left(self.id, self._launcher.lingering)
        failure = replace(failure, backend=self.id, generation=generation)
        if failure.aftermath is Aftermath.NOT_LAUNCHED:
            retry = self._runtime.cadence.memory_retry if self.spec.pinned else None
            self.post(events.Declined(generation, failure, retry))
        else:
            self.post(events.Exited(generation, failure))

    async def _launch_and_wait(self, generation: int) -> Failure:
        """The failure with which the instance ended."""

        def waits(what: str) -> None:
            self.post(events.Waiting(generation, what) if what else events.Granted(generation))

        async def enter() -> Failure | None:
            refused = await self._runtime.scheduler.enter(self, waits)
            if refused is None:
                await self._runtime.scheduler.look_at_device()
                waits("")
            return refused

        instance = await self._launcher.launch(
            generation,
            wanted=lambda: self._machine.state is not State.STOPPING,
            enter=enter,
            waits=waits,
            proved=self._limiter.probe_succeeded,
        )
        if isinstance(instance, Failure):
            return instance
        self._instance = instance
        try:
            return await self._wait_for_exit(instance)
        except Exception:  # reported by ``_run_instance``; the process must not be left running
            await self._kill_and_wait(instance)
            raise
        finally:
            await self._launcher.ended(instance)

    async def _wait_for_exit(self, instance: Instance) -> Failure:
        """The failure of the instance, when its process and the rest of its process group have ended."""
        generation = instance.generation
        self.post(events.Launched(generation))
        if self._machine.state is State.STOPPING:  # stop requested during the spawn
            self._terminate(instance)
        self._tasks.start(self._blame.note_before(), f"device-{generation}")
        watch = self._tasks.start(self._watch(instance), f"watch-{generation}")
        sampling = self._tasks.start(self._sample(instance), f"memory-{generation}")
        try:
            returncode = await instance.child.wait()
        finally:
            watch.cancel()
            sampling.cancel()
        instance.ended = True  # no request may be admitted while the verdict is looked for
        verdict = instance.calls.verdict or await self._blame.judged(instance.of_exit(returncode), alive=False)
        failure = self._shared(replace(verdict, exit=returncode))
        self._set_verdict(instance, failure)
        # Posted at once: requests wait for it, and no request may be admitted to a process that has ended. Its effects
        # also end what the leader has left of its process group; only then the instance is over. (In STOPPING, where
        # the gateway was ending it anyway, the event is ignored.)
        self.post(events.Failed(generation, replace(failure, backend=self.id, generation=generation)))
        if self._stopping is not None:
            await asyncio.wait({self._stopping})
            self._stopping = None
        if instance.monitor.was_ready:
            self._engine_memory.note_exit(instance.memory.peak)
        self.past.ended(failure, answered=self._machine.answered)
        return failure

    def _set_verdict(self, instance: Instance, failure: Failure) -> None:
        if instance.calls.verdict is not None:
            return
        if failure.cause in MEMORY and failure.blame is Blame.BACKEND:
            self._batch_memory.ran_out()
        now, progress_of = self._runtime.clock(), self._inflight.progress_of(instance.generation)
        began = min((lease.admitted for lease in progress_of), default=now)
        named = replace(failure, backend=self.id)
        shared = self._runtime.incidents.is_part_of_a_shortage(named, now, began=began)
        beside = self._runtime.scheduler.beside(self) or int(shared)  # those have ended with their replica, one or more
        instance.calls.set_verdict(failure, progress_of, beside=beside)

    async def _kill_and_wait(self, instance: Instance) -> None:
        """SIGKILL, after a bug in the supervision."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._runtime.cadence.unkillable):
                await instance.child.stop(0.0)

    def _shared(self, failure: Failure) -> Failure:
        """``failure.shared`` is set if another replica has reported the same incident."""
        part = self._runtime.incidents.is_part_of_another(failure, self._runtime.clock())
        return replace(failure, shared=part)

    def _condemn(self, generation: int, failure: Failure) -> None:
        self.post(events.Failed(generation, self._shared(failure)))

    async def _watch(self, instance: Instance) -> None:
        failure = await self._prove_ready(instance)
        if failure is None:
            # It may end before the next tick, and holds more than at the last one.
            await asyncio.to_thread(instance.memory.sample)
            instance.monitor.begin()
            self._limiter.begin(slowly=self._failed_lately and self._slow_start_is_due())
            self.post(events.Proven(instance.generation, downloaded=instance.downloads))
            self._tasks.start(self._blame.note_device(instance.child.pid), f"device-use-{instance.generation}")
            failure = instance.of_condemned(await self._until_condemned(instance))
        self._condemn(instance.generation, await self._blame.judged(instance.identified(failure), alive=True))

    async def _sample(self, instance: Instance) -> None:
        """Measures the process from its launch on: also a load can run out of memory."""
        while True:
            await asyncio.to_thread(instance.memory.sample)
            self._lasting = self.memory - self.pooled
            self._batch_memory.stop_growth()
            if self._batch_memory.look_again:
                self.on_change()
            await asyncio.sleep(self._runtime.cadence.liveness_tick)

    async def _prove_ready(self, instance: Instance) -> Failure | None:
        try:
            return await Readiness(
                instance, self.spec, clock=self._runtime.clock, cadence=self._runtime.cadence
            ).prove()
        except Exception as error:  # as above: the replica must not stay in STARTING
            log.exception("readiness check failed", extra={"backend": self.id})
            message = f"the readiness of {self.id} could not be checked: {error!r}"
            return Failure(Cause.START_TIMEOUT, Aftermath.UNKNOWN, message)

    async def _until_condemned(self, instance: Instance) -> liveness.Condemn:
        """A monitor that ends because of a bug is restarted: nothing else would detect a wedged process."""
        while True:
            try:
                return await instance.monitor.until_condemned()
            except Exception:  # whatever it was, the replica must not be left unmonitored
                log.exception("liveness monitor failed, restarted", extra={"backend": self.id})
                await asyncio.sleep(self._runtime.cadence.supervision_retry)

    def _terminate(self, instance: Instance) -> None:
        instance.asked_to_stop = True
        grace = self.spec.timeouts.stop
        if self._machine.failed_since_launch:
            grace = min(grace, self._runtime.cadence.failed_stop)
        self._stopping = self._tasks.start(instance.child.stop(grace), f"stop-{instance.generation}")

    # -- leases -------------------------------------------------------------------------------------------------------

    def released(self, lease: Lease) -> None:
        opened, instance = self._limiter.release(lease), self._instance
        if instance is not None and instance.generation == lease.generation:
            instance.monitor.request_ended(lease, breaker_opened=opened)
        if lease.completed:
            self._batch_memory.answered()
        if lease.completed and not lease.internal and not self._machine.answered:
            self.post(events.Answered(lease.generation))
        if not lease.internal:
            self.residency.used_at = self._runtime.clock()
        self._check_drained()
        self._changed()

    def over(self, lease: Lease) -> None:
        self._inflight.over(lease)
        self._changed()

    def _check_drained(self) -> None:
        m = self._machine
        if m.state is State.DRAINING and not self._inflight.of(m.generation):
            self.post(events.Emptied(m.generation, demand=self.demand > 0))

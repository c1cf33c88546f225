"""Keeping an eye on a backend that is ready: gathers the signs that ``vigil`` judges."""

import asyncio
import sys
from collections.abc import Callable

import psutil

from backends.admission.lease import InFlight
from backends.domain.cadence import Cadence
from backends.domain.failure import Cause
from backends.domain.spec import BackendSpec
from backends.memory import host
from backends.replica import liveness, probe
from backends.replica.instance import Instance
from backends.replica.suspend import SuspendDetector
from backends.upstream.exchange import ExchangeError, Fault

SHORT_OF_MEMORY = 0.04  # of the machine's memory available: below it, a SIGKILL from outside means out of memory
ALONE = 3.0  # times ``timeouts.progress`` that one request may be silent while others on the backend go on


class LivenessMonitor:
    """``clock`` is the event loop's time."""

    def __init__(
        self, life: Instance, spec: BackendSpec, inflight: InFlight, *, clock: Callable[[], float], cadence: Cadence
    ) -> None:
        self._cadence = cadence
        self._life = life
        self._spec = spec
        self._inflight = inflight
        self._clock = clock
        self._findings = life.log.findings
        self._wanted = False  # the canary
        self._here = SuspendDetector(clock(), interval=cadence.liveness_tick)

    async def until_condemned(self) -> liveness.Condemn:
        """Comes back only with a reason to replace the process; cancelled when it exits.

        Asking takes as long as a stopped process is silent, and must not keep the rest waiting: it is a task beside.
        """
        self._life.answered = self._clock()
        asking = asyncio.ensure_future(self._keep_asking())
        try:
            while not asking.done():
                self._here.tick(self._clock())
                self._weigh()
                self._read_output()
                self._end_the_stuck()
                finding = liveness.assess(self.signs(), progress=self._spec.timeouts.progress, is_mlx=self._spec.is_mlx)
                if isinstance(finding, liveness.Condemn):
                    return finding
                self._wanted = isinstance(finding, liveness.AskCanary)
                await asyncio.wait({asking}, timeout=self._cadence.liveness_tick)
        finally:
            asking.cancel()
        raise RuntimeError(f"the probes of {self._spec.id} ended") from asking.exception()

    async def _keep_asking(self) -> None:
        while True:
            self._life.note_health(await probe.health(self._life.dialer), self._clock())
            if self._wanted:
                await self._ask_canary()
            await asyncio.sleep(self._cadence.probe_interval)

    def signs(self) -> liveness.Signs:
        life, now = self._life, self._clock()
        waiting, quiet = self._inflight.quiet(life.generation, now)
        return liveness.Signs(
            inflight=len(self._inflight.of(life.generation)),
            waiting=waiting,
            non_streaming=self._inflight.all_non_streaming(life.generation),
            quiet=self._here.cap(min(quiet, now - life.last_progress_at), now),
            health=life.health,
            same_health=life.same_health,
            unanswered=self._here.cap(now - life.answered, now),
            hint=life.hint,
            suspected=life.suspected,
            canary_failed=life.canary_failed,
        )

    def _read_output(self) -> None:
        if self._life.log.findings > self._findings:
            self._findings = self._life.log.findings
            self._life.hint = self._life.named_cause()
            self._life.hinted_at = self._clock()

    def _end_the_stuck(self) -> None:
        limit = self._spec.timeouts.progress
        now = self._clock()
        for lease in self._inflight.of(self._life.generation):
            silence = self._here.cap(min(lease.silence(now), now - self._life.last_progress_at), now)
            if silence >= ALONE * limit and not lease.non_streaming:
                lease.abort(ExchangeError(Fault.STALLED, f"no progress for {ALONE * limit:g} s"))

    async def _ask_canary(self) -> None:
        life = self._life
        within = min(self._spec.timeouts.progress, liveness.HINTED_SILENCE if life.hint else liveness.IDLE_SILENCE)
        try:
            answer = await probe.canary(life.dialer, self._spec.upstream_model, is_mlx=self._spec.is_mlx, within=within)
        except ExchangeError as error:
            if error.fault is Fault.EXHAUSTED:
                return  # that was our own want
            # With requests in flight the canary may just stand in line; their own silence then tells.
            life.canary_failed = not self._inflight.of(life.generation)
            return
        if answer is None or answer.cause is Cause.BAD_REQUEST:
            life.suspected = False
            life.hint = None
            life.proved()
            life.ready_at = life.log.position  # it generates: what it printed so far is not held against it
        else:
            life.canary_failed = True

    def _weigh(self) -> None:
        """What its memory was is asked after its death, when it cannot be looked up any more."""
        life = self._life
        try:
            process = psutil.Process(life.child.pid)
            life.memory = host.footprint(process.pid)
            life.peak = max(life.peak, life.memory)
            life.memory_limited = _limited(process)
            memory = psutil.virtual_memory()
            life.memory_short = memory.available < SHORT_OF_MEMORY * memory.total
        except (psutil.Error, OSError):  # gone, or we are out of descriptors: it is only a reading
            life.memory = None


def _limited(process: psutil.Process) -> bool:
    """Linux only: macOS neither tells the limits of another process nor enforces one on address space."""
    if sys.platform != "linux":
        return False
    limits = (process.rlimit(psutil.RLIMIT_AS), process.rlimit(psutil.RLIMIT_DATA))
    return any(soft != psutil.RLIM_INFINITY for soft, _ in limits)

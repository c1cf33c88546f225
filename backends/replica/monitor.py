"""Liveness of one replica: probes it, gathers the signs that ``liveness.assess`` judges, ends requests that are stuck.

One monitor per life of a supervised replica, and per period in which a remote one is reachable. It alone writes what is
known of the replica's health; others tell it what they saw (``note_health``, ``request_ended``) and read.
"""

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass

from backends.admission.lease import InFlight, Lease
from backends.diagnosis.log_parser import LogParser
from backends.diagnosis.verdict import text_cause
from backends.domain.cadence import Cadence
from backends.domain.failure import HARMLESS, Cause
from backends.domain.spec import BackendSpec
from backends.domain.state import Health
from backends.replica import liveness, probe
from backends.replica.process_memory import ProcessMemory
from backends.replica.suspend import SuspendDetector
from backends.upstream.exchange import Dialer, ExchangeError, Fault

ALONE = 3.0  # times ``timeouts.progress`` that one request may be silent while others on the backend go on


@dataclass(frozen=True, slots=True)
class Watched:
    """What there is to see of one life. ``log`` and ``memory`` are those of its process, None where it is not ours.

    ``canary_within``: seconds for the canary's answer; None = as long as silence is borne. ``health_model``: the model
    whose status counts, where ``/health`` is that of another gateway.
    """

    generation: int
    dialer: Dialer
    log: LogParser | None = None
    memory: ProcessMemory | None = None
    canary_within: float | None = None
    health_model: str | None = None


class LivenessMonitor:
    """``clock`` is the event loop's time; ``proved`` is called when a token came although there had been doubt.

    ``hint``: the cause that the output names since it was last shown to generate. ``suspected``: a client left after a
    long silence, or the circuit breaker opened. ``since``: number of lines of output that are not held against it.
    """

    def __init__(
        self,
        watched: Watched,
        spec: BackendSpec,
        inflight: InFlight,
        *,
        clock: Callable[[], float],
        cadence: Cadence,
        proved: Callable[[], None],
    ) -> None:
        self.health = Health.UNKNOWN
        self.hint: Cause | None = None
        self.suspected = False
        self.since = 0
        self.was_ready = False
        self._same_health = 0  # how many probes in a row said so
        self._answered_at = 0.0  # when /health was last answered
        self._hinted_at = 0.0
        self._progress_at = 0.0  # when the output last told of progress
        self._canary_failed = False
        self._canary_wanted = False
        self._findings = 0  # of the log, looked at
        self._progress = 0
        self._watched = watched
        self._spec = spec
        self._inflight = inflight
        self._clock = clock
        self._cadence = cadence
        self._proved = proved
        self._news = asyncio.Event()  # look again at once
        self._recheck = asyncio.Event()  # probe again at once
        self._here = SuspendDetector(clock(), interval=cadence.liveness_tick)

    @property
    def responsive(self) -> bool:
        return self.health in (Health.OK, Health.UNKNOWN) and self.hint is None

    # -- what others tell it -------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """It is ready."""
        self.was_ready = True
        self._forgive()

    def note_health(self, health: Health) -> None:
        if health is not self.health:
            self._news.set()
        self._same_health = self._same_health + 1 if health is self.health else 1
        self.health = health
        if health in (Health.OK, Health.UNAVAILABLE):
            self._answered_at = self._clock()

    def recheck(self) -> None:
        """A 503 was seen elsewhere. Of a server that is not mlx_lm.server it may just mean "busy": no hurry there."""
        if self._spec.is_mlx:
            self._recheck.set()

    def request_ended(self, lease: Lease, *, breaker_opened: bool) -> None:
        """A full answer clears the doubts that are older than the request; a client that waited in vain casts some."""
        if lease.completed:
            self.suspected = False
            if self.hint is not None and lease.admitted > self._hinted_at:
                self._forgive()
        elif not lease.non_streaming and lease.silence(self._clock()) >= self._cadence.abandoned_after:
            self.suspected = True
        self.suspected = self.suspected or breaker_opened

    # -- watching ------------------------------------------------------------------------------------------------------

    async def until_condemned(self) -> liveness.Condemn:
        """Returns only with a reason to replace the process or to take the server out; cancelled when it exits.

        A probe takes as long as a stopped process is silent, and must not delay the rest: it runs in a task beside.
        """
        now = self._clock()
        self._answered_at = now
        self._here = SuspendDetector(now, interval=self._cadence.liveness_tick)
        asking = asyncio.ensure_future(self._keep_asking())
        asking.add_done_callback(lambda _: self._news.set())
        try:
            while not asking.done():
                finding = self._look()
                if isinstance(finding, liveness.Condemn):
                    return finding
                self._canary_wanted = isinstance(finding, liveness.AskCanary)
                await _set_within(self._news, self._cadence.liveness_tick)
        finally:
            asking.cancel()
        raise RuntimeError(f"the probes of {self._spec.id} ended") from asking.exception()

    def signs(self) -> liveness.Signs:
        now, generation = self._clock(), self._watched.generation
        waiting, quiet = self._inflight.quiet(generation, now)
        return liveness.Signs(
            inflight=len(self._inflight.of(generation)),
            waiting=waiting,
            non_streaming=self._inflight.all_non_streaming(generation),
            quiet=self._here.cap(min(quiet, now - self._progress_at), now),
            health=self.health,
            same_health=self._same_health,
            unanswered=self._here.cap(now - self._answered_at, now),
            hint=self.hint,
            suspected=self.suspected,
            canary_failed=self._canary_failed,
        )

    def _look(self) -> liveness.Finding:
        self._here.tick(self._clock())
        if self._watched.memory is not None:
            self._watched.memory.sample()
        if self._watched.log is not None:
            self._read_output(self._watched.log)
        self._end_the_stuck()
        return liveness.assess(self.signs(), progress=self._spec.timeouts.progress, is_mlx=self._spec.is_mlx)

    def _read_output(self, log: LogParser) -> None:
        if log.progress > self._progress:
            self._progress, self._progress_at = log.progress, self._clock()
        if log.findings > self._findings:
            self._findings, self._hinted_at = log.findings, self._clock()
            cause = text_cause(log.reading(self.since))
            self.hint = None if cause in HARMLESS else cause

    def _end_the_stuck(self) -> None:
        limit = ALONE * self._spec.timeouts.progress
        now = self._clock()
        for lease in self._inflight.of(self._watched.generation):
            silence = self._here.cap(min(lease.silence(now), now - self._progress_at), now)
            if silence >= limit and not lease.non_streaming:
                lease.abort(ExchangeError(Fault.STALLED, f"no progress for {limit:g} s"))

    def _forgive(self) -> None:
        """It generates: what it printed so far is not held against it."""
        self.hint = None
        if self._watched.log is not None:
            self.since, self._findings = self._watched.log.position, self._watched.log.findings

    # -- probing -------------------------------------------------------------------------------------------------------

    async def _keep_asking(self) -> None:
        while True:
            health = await probe.health(
                self._watched.dialer, model=self._watched.health_model, within=self._cadence.health_timeout
            )
            self.note_health(health)
            if self._canary_wanted:
                await self._ask_canary()
            await _set_within(self._recheck, self._cadence.probe_interval)

    async def _ask_canary(self) -> None:
        within = self._watched.canary_within
        if within is None:
            silence = liveness.HINTED_SILENCE if self.hint else liveness.IDLE_SILENCE
            within = min(self._spec.timeouts.progress, silence)
        try:
            answer = await probe.canary(
                self._watched.dialer,
                self._spec.upstream_model,
                is_mlx=self._spec.is_mlx,
                within=within,
                codes=self._spec.codes,
            )
        except ExchangeError as error:
            if error.fault is not Fault.EXHAUSTED:  # that is a shortage of this process
                # With requests in flight the canary may just stand in line; their own silence then tells.
                self._canary_failed = not self._inflight.of(self._watched.generation)
            return
        if answer is None or answer.cause is Cause.BAD_REQUEST:
            self.suspected = False
            self._proved()
            self._forgive()
        else:
            self._canary_failed = True


async def _set_within(event: asyncio.Event, seconds: float) -> None:
    """Waits for the event, and takes it; or for so long."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
    event.clear()

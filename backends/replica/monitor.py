"""Liveness monitor of one replica: probes it, collects the signs for ``liveness.assess``, aborts stalled requests.

One monitor per instance of a supervised replica, and per period in which a remote replica is reachable. The monitor is
the only writer of the replica's health; others report observations (``note_health``, ``request_ended``) and read.
"""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from backends.admission.inflight import InFlight
from backends.admission.lease import Lease
from backends.admission.pace import UsualSilence
from backends.diagnosis.engine import EngineIdentity
from backends.diagnosis.error_answers import AnswerVerdict
from backends.diagnosis.log_parser import LogParser
from backends.diagnosis.verdict import text_cause
from backends.domain.activity import Activity
from backends.domain.cadence import Cadence
from backends.domain.failure import HARMLESS, Cause
from backends.domain.report import EngineReport
from backends.domain.spec import BackendSpec
from backends.domain.state import Health
from backends.replica import liveness, probe
from backends.replica.effort import Effort, EffortMeter
from backends.replica.expected_end import ExpectedEnd
from backends.replica.rhythm_watch import RhythmWatch
from backends.replica.suspend import SuspendDetector
from backends.upstream.exchange import Dialer, ExchangeError, Fault

log = logging.getLogger(__name__)

# A request may be silent while others are not: text is withheld while a tool call, or a character, is not whole. So
# the rhythm of the model tells nothing of one alone.
LONE_SILENCE_FACTOR = 3.0  # times ``timeouts.progress``: silence of one request while others make progress
UNANSWERED = 5.0  # seconds without an answer to /health: it may be the machine that is slow
NEWS = 1.5  # times longer or shorter: a deadline that is worth a line in the log
LAST_WORDS = 0.1  # seconds for the output of a thread that has ended, which comes by another pipe than the news of it
OVERDUE_CHECKS = 3  # times that an answer in one piece may be overdue while the replica generates for the canary


@dataclass(frozen=True, slots=True)
class Watched:
    """What the monitor observes of one instance. ``log``: of its process, None for a remote server.

    ``health_model``: the model whose status counts if ``/health`` is that of another mlx-gateway. ``may_load``: seconds
    of silence in which the server may be loading the model; 0.0 = the model is loaded. ``canary``: asks for a token in
    another way than an instance of our own is asked; None = not at the moment. ``activity``: of its processes, called
    in a thread. A server that has none here may serve others too, whose prompts we do not see: its rhythm tells
    nothing.
    """

    generation: int
    dialer: Dialer
    identity: EngineIdentity
    log: LogParser | None = None
    health_model: str | None = None
    may_load: Callable[[], float] = lambda: 0.0
    canary: Callable[[], Awaitable[AnswerVerdict | None] | None] | None = None
    activity: Callable[[], Activity | None] | None = None


class LivenessMonitor:
    """``clock`` is the event loop's time; ``proved`` is called when the canary has shown that the replica generates.

    ``hint``: a cause in the output since the replica was last shown to generate. ``suspected``: a client left after a
    long silence, or the circuit breaker opened. ``since``: number of lines of output that no longer count.
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
        self.health_since = 0.0  # event loop time of the first answer in a row that said so
        self.hint: Cause | None = None
        self.suspected = False
        self.since = 0
        self.was_ready = False
        self._same_health = 0  # number of probes in a row with this result
        self._answered_at = 0.0  # when /health was last answered
        self._hinted_at = 0.0
        self._progress_at = 0.0  # when the output last reported progress
        self._occupied_at = 0.0  # when requests were moved away because of an abandoned one; 0.0 = not occupied
        self._thread_ended_at: float | None = None  # when the process told that its generation thread had ended
        self._canary_failed = False
        self._canary_wanted = False
        self._findings = 0  # ``log.findings`` at the last reading
        self._progress = 0  # ``log.progress`` at the last reading
        self._watched = watched
        self._spec = spec
        self._inflight = inflight
        self._usual_silence = UsualSilence()
        self._meter = EffortMeter()
        self._rhythm_watch = RhythmWatch(inflight, watched.generation)
        self._deadline: float | None = None  # that was logged last
        self._end = ExpectedEnd(inflight, spec.timeouts.progress, watched.log)
        self._clock = clock
        self._cadence = cadence
        self._proved = proved
        self._assess_now = asyncio.Event()
        self._recheck = asyncio.Event()  # probe again now
        self._suspend = SuspendDetector(clock(), interval=cadence.liveness_tick)

    @property
    def responsive(self) -> bool:
        return self.health in (Health.OK, Health.UNKNOWN) and self.hint is None and not self.occupied

    @property
    def faltering(self) -> bool:
        """The latest health check failed, which is no outage yet: the process is replaced, or answers the next one."""
        return self.health in (Health.REFUSED, Health.UNAVAILABLE) or (
            self.health is Health.SILENT and self._same_health == 1
        )

    @property
    def occupied(self) -> bool:
        """An abandoned request holds up all others: none should be sent."""
        return self._occupied_at > 0

    @property
    def silence_limit(self) -> float:
        """Seconds of silence after which it is condemned with what it has to do now, if it does nothing meanwhile."""
        learned, longest = self._learned_deadline(self._clock()), self._spec.timeouts.progress
        return longest if learned is None or not self._meter.is_trusted else min(learned, longest)

    @property
    def thread_ended(self) -> bool:
        """The generation thread has ended, and its output has been read."""
        return self._thread_ended_at is not None and self._clock() - self._thread_ended_at >= LAST_WORDS

    # -- reports of others ---------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """The replica is ready."""
        self.was_ready = True
        self._clear_hint()

    def note_health(self, health: Health) -> None:
        if health is not self.health:
            self.health_since = self._clock()
            self._assess_now.set()
        self._same_health = self._same_health + 1 if health is self.health else 1
        self.health = health
        if health in (Health.OK, Health.LOADING, Health.UNAVAILABLE):
            self._answered_at = self._clock()

    def note_report(self, report: EngineReport) -> None:
        """What the process tells of itself. A generation thread that has ended does not come back."""
        if report.generating is False and self._thread_ended_at is None:
            self._thread_ended_at = self._clock()
            self._assess_now.set()
        if report.reading == 0 and report.decoding == 0:
            self._end.told_idle(self._clock())

    def recheck(self) -> None:
        """A call was answered with 503. From a server that is not mlx_lm.server that may just mean "busy": ignored."""
        if self._watched.identity.is_mlx:
            self._recheck.set()

    def request_ended(self, lease: Lease, *, breaker_opened: bool) -> None:
        """A complete answer clears the suspicion, and a hint that is older than the request. A client that left after a
        long silence raises suspicion."""
        self._rhythm_watch.ended(lease)
        if lease.completed:
            self.suspected = False
            self._prove(lease.admitted)
            if self.hint is not None and lease.admitted > self._hinted_at:
                self._clear_hint()
        elif not lease.work.one_piece and lease.silence(self._clock()) >= self._cadence.abandoned_after:
            self.suspected = True
        self.suspected = self.suspected or breaker_opened

    # -- monitoring ----------------------------------------------------------------------------------------------------

    async def until_condemned(self) -> liveness.Condemn:
        """Returns only with a reason to replace the process or to mark the server unreachable; cancelled on exit.

        A probe of a stopped process blocks for its whole timeout and must not delay the assessment: a task of its own.
        """
        now = self._clock()
        self._answered_at = now
        self._suspend = SuspendDetector(now, interval=self._cadence.liveness_tick)
        probing = asyncio.ensure_future(self._probe_regularly())
        sampling = asyncio.ensure_future(self._sample_activity(self._watched.activity))
        probing.add_done_callback(lambda _: self._assess_now.set())
        try:
            while not probing.done():
                finding = self._assess()
                if isinstance(finding, liveness.Condemn):
                    return finding
                if isinstance(finding, liveness.Move):
                    self._move()
                self._canary_wanted = isinstance(finding, liveness.AskCanary)
                tick = self._cadence.liveness_tick
                await _set_within(self._assess_now, tick if self._thread_ended_at is None else min(tick, LAST_WORDS))
        finally:
            probing.cancel()
            sampling.cancel()
        raise RuntimeError(f"the probes of {self._spec.id} ended") from probing.exception()

    def signs(self) -> liveness.Signs:
        now, generation = self._clock(), self._watched.generation
        waiting, quiet = self._inflight.quiet(generation, now)
        read, effort = self._inflight.reading_until(generation), self._meter.effort
        starved = self._meter.starved_since(self._heard_at)
        return liveness.Signs(
            inflight=len(self._inflight.of(generation)),
            waiting=waiting,
            one_piece=self._inflight.all_in_one_piece(generation),
            quiet=self._suspend.cap(max(0.0, min(quiet, now - max(self._progress_at, read)) - starved), now),
            health=self.health,
            same_health=self._same_health,
            unanswered=self._suspend.cap(max(0.0, now - max(self._answered_at, read)), now),
            hint=self.hint,
            suspected=self.suspected,
            canary_failed=self._canary_failed,
            overdue=bool(self._overdue(now)),
            occupied=self._may_be_occupied(now),
            unproven=any(self._end.is_unproven(lease, now) for lease in self._inflight.abandoned(generation)),
            silence=self._suspend.cap(max(0.0, min(quiet, now - self._progress_at, self._meter.still_for(now))), now),
            deadline=self._learned_deadline(now),
            stopped=effort is Effort.STOPPED,
            withheld=effort is Effort.WORKING and self._may_withhold(now),
            thread_ended=self.thread_ended,
        )

    def _may_withhold(self, now: float) -> bool:
        waiting = [lease for lease in self._inflight.of(self._watched.generation) if lease.waiting]
        return any(self._end.may_withhold(lease, now) for lease in waiting)

    def _learned_deadline(self, now: float) -> float | None:
        """Seconds of silence that are too long; None = it cannot be told."""
        unanswered = self._suspend.cap(now - self._answered_at, now) >= UNANSWERED
        if unanswered or not self._rhythm_watch.warm or self._may_be_occupied(now) or self._watched.may_load() > 0:
            return None
        return self._inflight.rhythm.deadline(self._rhythm_watch.workload, now)

    def _assess(self) -> liveness.Finding:
        self._suspend.tick(self._clock())
        if self._watched.log is not None:
            self._read_output(self._watched.log)
        self._note_free()
        self._note_order()
        self._abort_stalled()
        signs, now, heard = self.signs(), self._clock(), self._heard_at
        self._usual_silence.note(signs.quiet, heard)
        self._rhythm_watch.tick(now, signs.silence, heard)
        self._log_deadline(now)
        return liveness.assess(
            signs,
            progress=max(self._spec.timeouts.progress, self._usual_silence.patience),
            is_mlx=self._watched.identity.is_mlx,
            load=self._watched.may_load(),
        )

    @property
    def _heard_at(self) -> float:
        """Event loop time of the last sign of life."""
        return max(self._progress_at, self._inflight.last_byte_at(self._watched.generation))

    def _log_deadline(self, now: float) -> None:
        work, was = self._rhythm_watch.workload, self._deadline
        deadline = self._inflight.rhythm.deadline(work, now) if work.members else None
        if deadline is None or (was is not None and was / NEWS < deadline < was * NEWS):
            return
        self._deadline = deadline
        fields = {"backend": self._spec.id, "seconds": round(deadline, 1), "reading": len(work.unread)}
        fields |= {"in_flight": work.members, "longest": work.longest, "effort": round(self._meter.usual, 3)}
        log.debug("silence that is too long, unless it works", extra=fields)

    async def _sample_activity(self, activity: Callable[[], Activity | None] | None) -> None:
        """While requests are in flight. A process may be slow to read, so this is a task of its own."""
        while activity is not None:
            silent = self._clock() - self._heard_at
            if self._inflight.at_work(self._watched.generation) and self._meter.needs_sample(silent):
                found, now = await asyncio.to_thread(activity), self._clock()
                if found is None:
                    self._meter.lost()
                else:
                    writing = not self._rhythm_watch.workload.reading
                    self._meter.note(found, now, heard=self._heard_at, writing=writing)
            await asyncio.sleep(self._cadence.liveness_tick)

    def _read_output(self, log: LogParser) -> None:
        if log.progress > self._progress:
            self._progress, self._progress_at = log.progress, self._clock()
        if log.findings > self._findings:
            self._findings, self._hinted_at = log.findings, self._clock()
            cause = text_cause(log.reading(self.since))
            self.hint = None if cause in HARMLESS else cause

    def _abort_stalled(self) -> None:
        limit = max(LONE_SILENCE_FACTOR * self._spec.timeouts.progress, self._watched.may_load())
        now = self._clock()
        read = self._inflight.reading_until(self._watched.generation)
        for lease in self._inflight.of(self._watched.generation):
            silence = self._suspend.cap(min(lease.silence(now), now - max(self._progress_at, read)), now)
            if silence >= limit and not (lease.work.one_piece or self._end.may_withhold(lease, now)):
                lease.abort(ExchangeError(Fault.STALLED, f"no progress for {limit:g} s"))

    # -- answers in one piece, and abandoned requests ------------------------------------------------------------------

    def _overdue(self, now: float) -> list[Lease]:
        """The waiting requests whose answers, in one piece, should have come."""
        return [
            lease
            for lease in self._inflight.of(self._watched.generation)
            if lease.work.one_piece
            and self._suspend.cap(min(lease.silence(now), now - self._progress_at), now)
            >= (1 + lease.confirmed) * self._end.allowance(lease)
        ]

    def _may_be_occupied(self, now: float) -> bool:
        """An abandoned request may hold up all others. (What was moved away waited itself.)"""
        return any(
            not lease.moved and not self._end.is_late(lease, now) and (lease.unbatchable or not self._inflight.batches)
            for lease in self._inflight.abandoned(self._watched.generation)
        )

    def _prove(self, began: float) -> None:
        """A request that was sent at ``began`` was answered."""
        for lease in self._inflight.abandoned(self._watched.generation):
            reset = 0.0 < lease.hung_up_at < began
            if self._end.is_late(lease, began) or (reset and self._end.is_unproven(lease, began)):
                lease.over()

    def _move(self) -> None:
        self._occupied_at = self._clock()
        for lease in self._inflight.of(self._watched.generation):
            lease.abort(ExchangeError(Fault.OCCUPIED, "whose client has left; no other made progress meanwhile"))

    def _note_order(self) -> None:
        """An engine that answers one request after the other gets one at a time from now on."""
        for lease in self._inflight.held_up(self._watched.generation, self._clock()):
            self._inflight.sequential = True
            lease.abort(ExchangeError(Fault.OCCUPIED, "beside which it answers no other"))

    def _note_free(self) -> None:
        """Ends ``occupied``, once the abandoned requests are over or bytes came."""
        generation = self._watched.generation
        heard = self._inflight.last_byte_at(generation)
        if self.occupied and (heard > self._occupied_at or not self._inflight.abandoned(generation)):
            self._occupied_at = 0.0
            self._proved()

    def _clear_hint(self) -> None:
        """The replica generates: its output so far no longer counts."""
        self.hint = None
        if self._watched.log is not None:
            self.since, self._findings = self._watched.log.position, self._watched.log.findings

    # -- probing -------------------------------------------------------------------------------------------------------

    async def _probe_regularly(self) -> None:
        while True:
            health = await probe.health(
                self._watched.dialer,
                model=self._watched.health_model,
                within=self._cadence.health_timeout,
                identity=self._watched.identity,
            )
            self.note_health(health)
            if self._canary_wanted:
                await self._ask_canary()
            await _set_within(self._recheck, self._cadence.probe_interval)

    def _canary(self) -> Awaitable[AnswerVerdict | None] | None:
        if self._watched.canary is not None:
            return self._watched.canary()
        silence = liveness.HINTED_SILENCE if self.hint else liveness.IDLE_UNANSWERED
        within = min(self._spec.timeouts.progress, silence)
        return probe.canary(self._watched.dialer, self._watched.identity, within=within, codes=self._spec.codes)

    async def _ask_canary(self) -> None:
        asking = self._canary()
        if asking is None:
            return
        began = self._clock()
        overdue = self._overdue(began)
        try:
            answer = await asking
        except ExchangeError as error:
            if error.fault is not Fault.EXHAUSTED:  # EXHAUSTED is a shortage in the gateway
                # With requests in flight the canary may just be queued; then their silence is the sign.
                held_up = self._inflight.of(self._watched.generation) or self._may_be_occupied(self._clock())
                self._canary_failed = bool(overdue) or not held_up
            return
        if answer is None or answer.cause is Cause.BAD_REQUEST:
            self.suspected = False
            self._occupied_at = 0.0
            self._prove(began)
            self._confirm(overdue)
            self._proved()
            self._clear_hint()
        else:
            self._canary_failed = True

    def _confirm(self, overdue: list[Lease]) -> None:
        """The replica generates; what is overdue may go on for as long again, but not for ever."""
        for lease in overdue:
            lease.confirmed += 1
            if lease.confirmed >= OVERDUE_CHECKS:
                lease.abort(ExchangeError(Fault.STALLED, "no answer in the time that its tokens need"))


async def _set_within(event: asyncio.Event, seconds: float) -> None:
    """Waits until the event is set, for at most ``seconds``, and clears it."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
    event.clear()

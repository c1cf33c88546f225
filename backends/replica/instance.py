"""One process: from its spawn to its reaping, and what became of it."""

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from signal import SIGHUP, SIGINT, SIGTERM, Signals

from backends.admission.lease import Lease
from backends.diagnosis import suspects
from backends.diagnosis.log_parser import LogParser
from backends.diagnosis.suspects import RequestProgress
from backends.diagnosis.verdict import Evidence, judge, text_cause
from backends.domain.failure import HARMLESS, Aftermath, Blame, Cause, Failure, Sent
from backends.domain.state import Health
from backends.process.child import ChildProcess
from backends.replica import probe
from backends.replica.liveness import Condemn
from backends.upstream.exchange import NOT_SENT, Dialer, ExchangeError, Fault

WINDOW = 400  # lines of output that a verdict looks at: a cause that was named longer ago has nothing to do with it
EVIDENCE_WAIT = 1.0  # seconds that a request whose answer broke off waits for the process's own evidence


@dataclass(eq=False, slots=True)
class Instance:
    """``settled`` is set as soon as it is known how this life ended, or must end; ``verdict`` then says it.

    Times are the event loop's. ``log`` is fed each line of output. ``ready_at``: its number of lines when the process
    was ready, or was last shown to generate: what was printed before is not held against it later. None = it never was.
    """

    backend: str
    generation: int
    is_mlx: bool
    port: int
    child: ChildProcess
    dialer: Dialer
    condemn: Callable[[Failure], None]  # tells the owner that the process has to be replaced
    proved: Callable[[], None]  # and that it generates, though there had been doubt
    log: LogParser = field(default_factory=lambda: LogParser(WINDOW))
    ready_at: int | None = None
    settled: asyncio.Event = field(default_factory=asyncio.Event)
    verdict: Failure | None = None
    inflight_at_failure: int = 0  # requests in flight when it failed
    suspects: frozenset[Lease] = frozenset()  # those of them that may have ended it
    asked_to_stop: bool = False
    hint: Cause | None = None  # what its output names since it was ready
    hinted_at: float = 0.0
    last_progress_at: float = 0.0  # the last line of output that shows progress
    health: Health = Health.UNKNOWN
    same_health: int = 0  # how many probes in a row said so
    answered: float = 0.0  # when /health was last answered
    suspected: bool = False  # a client left after a long silence
    canary_failed: bool = False
    memory: int | None = None  # bytes
    peak: int = 0  # the most that was
    memory_short: bool = False  # of the whole machine, when last looked
    memory_limited: bool = False  # it runs under a limit of its own

    def note_health(self, health: Health, now: float) -> None:
        self.same_health = self.same_health + 1 if health is self.health else 1
        self.health = health
        if health in (Health.OK, Health.UNAVAILABLE):
            self.answered = now

    def set_verdict(self, failure: Failure, progress_of: Mapping[Lease, RequestProgress]) -> None:
        """The first verdict stands: what comes later is its consequence. ``progress_of``: what was in flight."""
        if self.verdict is None:
            self.verdict = failure
            self.inflight_at_failure = len(progress_of)
            self.suspects = suspects.suspects(failure, progress_of)
            self.settled.set()

    # -- verdicts on it -----------------------------------------------------------------------------------------------

    def named(self, failure: Failure) -> Failure:
        return replace(failure, backend=self.backend, generation=self.generation)

    def of_exit(self, returncode: int) -> Failure:
        """What the end of the process means."""
        if self.asked_to_stop:
            message = f"{self.backend} was stopped by the gateway"
            return self.named(Failure(Cause.NONE, Aftermath.EXITED, message, blame=Blame.GATEWAY, exit=returncode))
        seen = judge(
            Evidence(
                self.log.reading(),
                returncode,
                starting=self.ready_at is None,
                memory_short=self.memory_short,
                memory_limited=self.memory_limited,
            )
        )
        cause, message = seen.cause, seen.message
        blame = seen.blame
        if returncode in (-SIGHUP, -SIGINT, -SIGTERM) and cause in HARMLESS:
            cause, blame = Cause.KILLED, Blame.MACHINE
            message = f"it was ended from outside ({Signals(-returncode).name})"
        elif not seen.backend_failed:  # nobody asked it to end: that is a failure whatever it printed
            cause = Cause.NATIVE_CRASH
            message = f"it exited with status {returncode} though nobody had stopped it"
        elif cause is Cause.NATIVE_CRASH and returncode > 0:
            message = f"it exited by itself with status {returncode}"
        failure = Failure(
            cause,
            Aftermath.EXITED,
            f"{self.backend} died: {message}",
            blame=blame,
            evidence=seen.evidence,
            exit=returncode,
        )
        return self.named(failure)

    def of_condemned(self, finding: Condemn) -> Failure:
        """What it means that a living process has to be replaced."""
        seen = judge(Evidence(self.log.reading(self.ready_at or 0), health=self.health))
        same = seen.cause is finding.cause
        failure = Failure(
            finding.cause,
            Aftermath.WEDGED,
            f"{self.backend} is being replaced: {finding.reason}" + (f" ({seen.message})" if same else ""),
            blame=seen.blame if same else Blame.BACKEND,
            evidence=seen.evidence if same else (),
        )
        return self.named(failure)

    def of_call(self, error: ExchangeError, lease: Lease) -> Failure:
        """What it means for one request that was in flight."""
        verdict = self.verdict
        if verdict is None and error.fault is Fault.STALLED:
            message = f"{self.backend} went on with others but said nothing to this request ({error.detail})"
            verdict = self.named(Failure(Cause.STALLED, Aftermath.ALIVE, message))
        if verdict is None and error.fault in NOT_SENT:
            message = f"{self.backend} could not be reached ({error.detail}), though it is running"
            busy = "overloaded" if error.fault is Fault.EXHAUSTED else None
            verdict = self.named(Failure(Cause.UNREACHABLE, Aftermath.ALIVE, message, code=busy))
        if verdict is None:
            message = f"{self.backend} ended its answer early ({error.detail}); it is still running"
            verdict = self.named(Failure(Cause.NONE, Aftermath.ALIVE, message, truncated=True))
        suspect = lease in self.suspects and error.sent is Sent.MAYBE
        return replace(verdict, sent=error.sent, suspect=suspect, alone=suspect and self.inflight_at_failure == 1)

    async def diagnose(self, error: ExchangeError, lease: Lease) -> Failure:
        """For one request: waits, about two seconds at most, until the exit or the health of the process says more
        than the wire did. A killed process is seen dead only some milliseconds after its connections are."""
        if self.verdict is None:
            await self._settled(within=0.25)
        if self.verdict is None and error.fault not in (Fault.STALLED, Fault.EXHAUSTED):
            health = await probe.health(self.dialer, within=EVIDENCE_WAIT)
            if health is Health.OK and error.fault not in NOT_SENT:
                return self.of_call(error, lease)
            if health is Health.UNAVAILABLE and self.is_mlx and self.verdict is None:
                self.health = health
                reason = "its generation thread is dead (/health says 503)"
                self.condemn(self.of_condemned(Condemn(self.named_cause() or Cause.WEDGE, reason)))
            await self._settled(within=EVIDENCE_WAIT)
        return self.of_call(error, lease)

    def named_cause(self) -> Cause | None:
        """The failure that its output since it was ready names, if any: a hint, never a verdict."""
        cause = text_cause(self.log.reading(self.ready_at or 0))
        return None if cause in HARMLESS else cause

    def confirm_healthy(self, admitted: float) -> None:
        """A request admitted at this time was answered in full: what was printed before says nothing against it now."""
        self.suspected = False
        if self.hint is not None and admitted > self.hinted_at:
            self.hint = None
            self.ready_at = self.log.position

    async def _settled(self, *, within: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within):
                await self.settled.wait()

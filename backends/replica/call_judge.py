"""What a broken call means: the verdict on the replica that it was sent to, or what the wire and a probe show.

One judge per instance of a supervised replica, and per period in which a remote server is reachable. They differ in
evidence: a supervised process is known to run or to have exited, and its exit is worth a short wait; for a remote
server there is only a probe straight after the failure.
"""

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from backends.admission.lease import Lease
from backends.diagnosis import suspects
from backends.diagnosis.engine import EngineIdentity
from backends.diagnosis.suspects import MEMORY, RequestProgress
from backends.domain.cadence import Cadence
from backends.domain.failure import Aftermath, Blame, CallFailure, Cause, Failure, Reason, Sent
from backends.domain.secrets import NO_SECRETS, Secrets
from backends.domain.state import Health
from backends.replica import probe
from backends.replica.dropped_calls import DroppedCalls
from backends.upstream.exchange import NOT_SENT, Dialer, ExchangeError, Fault


@dataclass(eq=False, slots=True)
class CallJudge:
    """``has_process``: ``set_verdict`` follows when the process ends. ``recheck``: asks the liveness monitor to look at
    ``/health`` now. ``settled`` is set as soon as ``verdict`` says how the instance ended, or must end."""

    backend: str
    generation: int
    dialer: Dialer
    identity: EngineIdentity
    has_process: bool
    cadence: Cadence
    recheck: Callable[[], None]
    verdict: Failure | None = None
    settled: asyncio.Event = field(default_factory=asyncio.Event)
    inflight_at_failure: int = 0
    beside: int = 0  # requests that were in flight on other replicas that share its memory
    suspects: frozenset[Lease] = frozenset()
    secrets: Secrets = NO_SECRETS
    dropped: DroppedCalls = field(default_factory=DroppedCalls)  # tool calls, as the output of the process tells

    def set_verdict(self, failure: Failure, progress_of: Mapping[Lease, RequestProgress], *, beside: int = 0) -> None:
        """The first verdict stands: later ones are its consequence. ``progress_of``: the requests in flight, abandoned
        ones and tests of the gateway included; ``beside``: those on other replicas that share its memory."""
        if self.verdict is None:
            self.verdict = failure
            self.inflight_at_failure, self.beside = len(progress_of), beside
            self.suspects = suspects.suspects(failure, progress_of)
            self.settled.set()

    async def diagnose(self, error: ExchangeError, lease: Lease) -> CallFailure:
        """For one request. Waits until the exit or the health of the replica says more than the wire did: for
        ``exit_wait`` and twice ``evidence_wait`` at most; for ``ending_wait`` where the port of our process is closed:
        it ends, or will be condemned."""
        if self.has_process:
            await self._settled(within=self.cadence.exit_wait)
        health = Health.UNKNOWN
        if self.verdict is None and error.fault not in (Fault.STALLED, Fault.EXHAUSTED, Fault.OCCUPIED, Fault.CROWDED):
            health = await probe.health(self.dialer, within=self.cadence.evidence_wait)
            if health in (Health.UNAVAILABLE, Health.REFUSED):
                self.recheck()
            if self.has_process and (health is not Health.OK or error.fault in NOT_SENT):
                closed = health is Health.REFUSED
                await self._settled(within=self.cadence.ending_wait if closed else self.cadence.evidence_wait)
        return self.of_call(error, lease, health)

    def of_call(self, error: ExchangeError, lease: Lease, health: Health = Health.UNKNOWN) -> CallFailure:
        """``health``: what was answered after the call had broken."""
        if self.verdict is None and self._raised_in_call(lease):
            message = f"{self.backend} ended its answer: it could not read a tool call of the model, and goes on"
            lost = self._failure(Cause.NONE, Aftermath.ALIVE, message, reason=Reason.LOST_CALL)
            return CallFailure(replace(lost, blame=Blame.REQUEST), sent=error.sent, doubtful=True)
        suspect = lease in self.suspects and error.sent is Sent.MAYBE
        verdict = self.verdict or self._unexplained(error, health)
        return CallFailure(
            verdict,
            sent=error.sent,
            truncated=verdict.cause is Cause.NONE and self.verdict is None,
            suspect=suspect,
            alone=suspect and self.inflight_at_failure == 1 and not (self.beside and verdict.cause in MEMORY),
            inflight=self.inflight_at_failure,
            beside=self.beside,
        )

    async def dropped_call(self, *, since: float, within: float) -> bool:
        """Whether the process has dropped a tool call at ``since`` (event loop's time) or later, that no other request
        has claimed; waits for its log for ``within`` seconds."""
        return self.has_process and await self.dropped.claim(since=since, within=within)

    def _raised_in_call(self, lease: Lease) -> bool:
        if not self.dropped.raised or lease.exchange is None:
            return False
        return self.dropped.claim_raised(lease.exchange.local_port)

    def _unexplained(self, error: ExchangeError, health: Health) -> Failure:
        """There is no verdict on the replica, so this concerns the one call. The cause is NONE where the answer just
        ended."""
        if error.fault is Fault.OCCUPIED:
            message = f"{self.backend} works on another request, {error.detail}"
            occupied = self._failure(Cause.STALLED, Aftermath.ALIVE, message, reason=Reason.OCCUPIED)
            return replace(occupied, blame=Blame.GATEWAY)
        if error.fault is Fault.CROWDED:
            message = f"this request was stopped, so that the memory of {self.backend} lasts: {error.detail}"
            crowded = self._failure(Cause.OOM, Aftermath.ALIVE, message, reason=Reason.NO_ROOM)
            return replace(crowded, blame=Blame.GATEWAY)
        if error.fault is Fault.STALLED:
            message = f"{self.backend} went on with others but said nothing to this request ({error.detail})"
            return self._failure(Cause.STALLED, Aftermath.ALIVE, message)
        if error.fault in NOT_SENT or not (self.has_process or health is Health.OK):
            reason = Reason.BUSY if error.fault is Fault.EXHAUSTED else None
            if self.has_process:
                message = f"{self.backend} could not be reached ({error.detail}), though it is running"
                return self._failure(Cause.UNREACHABLE, Aftermath.ALIVE, message, reason=reason)
            message = f"{self.backend} cannot be reached: {error.detail}"
            return self._failure(Cause.UNREACHABLE, Aftermath.UNKNOWN, message, reason=reason)
        running = "; it is still running" if self.has_process else ""
        message = f"{self.backend} ended its answer early ({error.detail}){running}"
        return self._failure(Cause.NONE, Aftermath.ALIVE, message)

    def _failure(self, cause: Cause, aftermath: Aftermath, message: str, *, reason: Reason | None = None) -> Failure:
        told = self.secrets.hide(message)  # the wire's error may quote the backend
        return Failure(cause, aftermath, told, backend=self.backend, generation=self.generation, reason=reason)

    async def _settled(self, *, within: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within):
                await self.settled.wait()

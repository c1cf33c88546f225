"""Readiness: the proof that a new process can generate.

An open port proves nothing (another process may hold it; since mlx-lm 0.31.3 it opens before the model is loaded), nor
does ``/health`` with 200. Ready means: the listener is our process, and one token was generated.

Since 0.31.3 a failed load leaves the process alive, and in that version even ``/health`` stays at 200 while every
request hangs. So the output is read too; but text alone never condemns: a 503, an error answer, or
``start_hint_silence`` without an answer has to confirm it.
"""

import asyncio
from collections.abc import Callable

from backends.diagnosis.error_answers import AnswerVerdict
from backends.diagnosis.verdict import Evidence, judge
from backends.domain.cadence import Cadence
from backends.domain.failure import Aftermath, Blame, Cause, Failure
from backends.domain.spec import BackendSpec, Launch
from backends.domain.state import Health
from backends.process import ports
from backends.replica import probe
from backends.replica.instance import Instance
from backends.replica.suspend import WakingClock
from backends.upstream.exchange import ExchangeError

CHECK_INTERVAL = 0.5  # seconds between checks of /health and output until the first token


class Readiness:
    """``clock`` is the event loop's time."""

    def __init__(self, instance: Instance, spec: BackendSpec, *, clock: Callable[[], float], cadence: Cadence) -> None:
        self._instance = instance
        self._spec = spec
        longest = max(cadence.health_timeout + CHECK_INTERVAL, cadence.start_pause_max)
        self._clock = WakingClock(clock, interval=longest)  # sleep of the machine is no time that the start took
        self._cadence = cadence
        self._deadline = self._clock() + spec.timeouts.start
        self._hinted_at: float | None = None
        self._answer = ""  # the last answer without a token

    async def prove(self) -> Failure | None:
        """None: the process is ready. A Failure as soon as it cannot become ready; cancelled when the process exits."""
        failure = await self._until_it_listens()
        if failure is not None:
            return failure
        pause = self._cadence.start_pause
        while self._clock() < self._deadline:
            asking = asyncio.ensure_future(self._ask())
            try:
                failure = await self._while_asking(asking)
            finally:
                asking.cancel()
            if failure is not None:
                return failure
            if asking.done() and not asking.cancelled():
                answer = asking.result()
                if answer is None:
                    return None
                if (failure := self._of_answer(answer)) is not None:
                    return failure
            await asyncio.sleep(pause)
            pause = min(self._cadence.start_pause_max, 1.5 * pause)
        return self._too_late()

    async def _until_it_listens(self) -> Failure | None:
        while self._clock() < self._deadline:
            state = await self._health()
            if state not in (Health.REFUSED, Health.UNKNOWN):  # UNKNOWN: the gateway itself could not connect
                ours = await asyncio.to_thread(ports.listener_is, self._instance.child.pid, self._instance.port)
                if ours is not False:
                    return None
                return await self._port_lost()
            hint = self._hint()
            if hint is not None and hint.cause is Cause.PORT_IN_USE:
                return hint  # alive without a listener, and the output says why: the bind failed
            if hint is not None and self._silent_long_enough():
                return hint
            await asyncio.sleep(self._cadence.start_pause)
        return self._too_late()

    async def _health(self) -> Health:
        return await probe.health(
            self._instance.dialer, within=self._cadence.health_timeout, identity=self._instance.identity
        )

    async def _ask(self) -> AnswerVerdict | None:
        """None: a token was generated. A broken exchange counts as no answer, and the request is repeated."""
        within = max(self._cadence.start_pause, self._deadline - self._clock())
        try:
            return await probe.canary(
                self._instance.dialer, self._instance.identity, within=within, codes=self._spec.codes
            )
        except ExchangeError as error:
            return AnswerVerdict(Cause.NONE, Blame.BACKEND, f"no answer to a first request: {error.detail}")

    async def _while_asking(self, asking: "asyncio.Future[AnswerVerdict | None]") -> Failure | None:
        """Checks ``/health`` and the output until the first token is there."""
        while not asking.done():
            await asyncio.wait({asking}, timeout=CHECK_INTERVAL)
            if asking.done():
                return None
            state = await self._health()
            self._instance.monitor.note_health(state)
            hint = self._hint()
            if state is Health.UNAVAILABLE and self._instance.identity.is_mlx:
                return hint or self._failure(Cause.WEDGE, "it answers /health with 503 before it was ever ready")
            if self._instance.monitor.thread_ended:
                return hint or self._failure(Cause.WEDGE, "its generation thread ended before it was ever ready")
            if hint is not None and self._silent_long_enough():
                return hint
            if self._clock() >= self._deadline:
                return self._too_late()
        return None

    def _hint(self) -> Failure | None:
        """The failure in the output, if any. During a start no client can have caused the text."""
        verdict = judge(Evidence(self._instance.log.reading(), health=self._instance.monitor.health, starting=True))
        if not verdict.backend_failed:
            self._hinted_at = None
            return None
        if self._hinted_at is None:
            self._hinted_at = self._clock()
        message = f"{self._instance.backend} did not start: {verdict.message}"
        return Failure(verdict.cause, Aftermath.WEDGED, message, blame=verdict.blame, evidence=verdict.evidence)

    def _silent_long_enough(self) -> bool:
        return self._hinted_at is not None and self._clock() - self._hinted_at >= self._cadence.start_hint_silence

    def _of_answer(self, answer: AnswerVerdict) -> Failure | None:
        """None: ask again. An answer that only means "not yet", or no answer, is no verdict."""
        self._answer = answer.message
        if answer.cause in (Cause.NONE, Cause.UNREACHABLE):
            return None
        hint = self._hint()
        if hint is not None:
            return hint
        cause = Cause.LOAD_FAILURE if answer.cause is Cause.BAD_REQUEST else answer.cause
        return self._failure(cause, f"its first answer was an error: {answer.message}", blame=answer.blame)

    async def _port_lost(self) -> Failure:
        target = self._spec.target
        host = target.host if isinstance(target, Launch) else "127.0.0.1"
        holder = await asyncio.to_thread(ports.holder, host, self._instance.port) or "another process"
        reason = f"port {self._instance.port} is held by {holder}, not by this backend"
        return self._failure(Cause.PORT_IN_USE, reason, blame=Blame.MACHINE)

    def _too_late(self) -> Failure:
        limit = self._spec.timeouts.start
        hint = self._hint()
        if hint is not None:
            return hint
        last = f'; its last answer: "{self._answer}"' if self._answer else ""
        return self._failure(Cause.START_TIMEOUT, f"it generated nothing within {limit:g} s (timeouts.start){last}")

    def _failure(self, cause: Cause, reason: str, *, blame: Blame = Blame.BACKEND) -> Failure:
        message = f"{self._instance.backend} did not start: {reason}"
        return Failure(cause, Aftermath.WEDGED, message, blame=blame)

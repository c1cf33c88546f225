"""Proving that a new process can generate.

An open port proves nothing (another process may hold it; since mlx-lm 0.31.3 it opens before the model is loaded), nor
does ``/health`` with 200. Ready means: the listener is our process, and one token came back.

Since 0.31.3 a load that fails leaves the process alive, and in that version even ``/health`` stays at 200 while every
request hangs. So the output is read too; but text alone never condemns: it takes a 503, an error as an answer, or
``start_hint_silence`` without an answer beside it.
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
from backends.upstream.exchange import ExchangeError

LOOK = 0.5  # seconds between two looks while the first token is awaited


class Readiness:
    """``clock`` is the event loop's time."""

    def __init__(self, life: Instance, spec: BackendSpec, *, clock: Callable[[], float], cadence: Cadence) -> None:
        self._life = life
        self._spec = spec
        self._clock = clock
        self._cadence = cadence
        self._deadline = clock() + spec.timeouts.start
        self._hinted_at: float | None = None
        self._answer = ""  # the last one that was no token

    async def prove(self) -> Failure | None:
        """None: it is ready. Returns a Failure as soon as it is clear that it will not be; cancelled when it exits."""
        failure = await self._until_it_listens()
        if failure is not None:
            return failure
        pause = self._cadence.start_pause
        while self._clock() < self._deadline:
            asked = asyncio.ensure_future(self._ask())
            try:
                failure = await self._while_asking(asked)
            finally:
                asked.cancel()
            if failure is not None:
                return failure
            if asked.done() and not asked.cancelled():
                answer = asked.result()
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
            if state is not Health.REFUSED:
                ours = await asyncio.to_thread(ports.listener_is, self._life.child.pid, self._life.port)
                if ours is not False:
                    return None
                return await self._port_lost()
            hint = self._hint()
            if hint is not None and hint.cause is Cause.PORT_IN_USE:
                return hint  # alive without a listener, and it says why: the bind failed
            if hint is not None and self._silent_long_enough():
                return hint
            await asyncio.sleep(self._cadence.start_pause)
        return self._too_late()

    async def _health(self) -> Health:
        return await probe.health(self._life.dialer, within=self._cadence.health_timeout)

    async def _ask(self) -> AnswerVerdict | None:
        """None: a token came. An exchange that broke counts as no answer, and is asked again."""
        within = max(self._cadence.start_pause, self._deadline - self._clock())
        try:
            return await probe.canary(
                self._life.dialer,
                self._spec.upstream_model,
                is_mlx=self._spec.is_mlx,
                within=within,
                codes=self._spec.codes,
            )
        except ExchangeError as error:
            return AnswerVerdict(Cause.NONE, Blame.BACKEND, f"no answer to a first request: {error.detail}")

    async def _while_asking(self, asked: "asyncio.Future[AnswerVerdict | None]") -> Failure | None:
        """Looks at ``/health`` and at the output while the first token is awaited."""
        while not asked.done():
            await asyncio.wait({asked}, timeout=LOOK)
            if asked.done():
                return None
            state = await self._health()
            self._life.monitor.note_health(state)
            hint = self._hint()
            if state is Health.UNAVAILABLE and self._spec.is_mlx:
                return hint or self._failure(Cause.WEDGE, "it answers /health with 503 before it ever was ready")
            if hint is not None and self._silent_long_enough():
                return hint
            if self._clock() >= self._deadline:
                return self._too_late()
        return None

    def _hint(self) -> Failure | None:
        """The failure that the output names, if any. During a start no client can have printed it."""
        seen = judge(Evidence(self._life.log.reading(), health=self._life.monitor.health, starting=True))
        if not seen.backend_failed:
            self._hinted_at = None
            return None
        if self._hinted_at is None:
            self._hinted_at = self._clock()
        message = f"{self._life.backend} did not start: {seen.message}"
        return Failure(seen.cause, Aftermath.WEDGED, message, blame=seen.blame, evidence=seen.evidence)

    def _silent_long_enough(self) -> bool:
        return self._hinted_at is not None and self._clock() - self._hinted_at >= self._cadence.start_hint_silence

    def _of_answer(self, answer: AnswerVerdict) -> Failure | None:
        """None: ask again. An answer that only says "not yet", or none at all, is no verdict."""
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
        holder = await asyncio.to_thread(ports.holder, host, self._life.port) or "another process"
        reason = f"port {self._life.port} is held by {holder}, not by it"
        return self._failure(Cause.PORT_IN_USE, reason, blame=Blame.MACHINE)

    def _too_late(self) -> Failure:
        limit = self._spec.timeouts.start
        hint = self._hint()
        if hint is not None:
            return hint
        said = f'; its last answer: "{self._answer}"' if self._answer else ""
        return self._failure(Cause.START_TIMEOUT, f"it generated nothing within {limit:g} s (timeouts.start){said}")

    def _failure(self, cause: Cause, reason: str, *, blame: Blame = Blame.BACKEND) -> Failure:
        message = f"{self._life.backend} did not start: {reason}"
        return Failure(cause, Aftermath.WEDGED, message, blame=blame)

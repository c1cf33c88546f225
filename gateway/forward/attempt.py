"""One attempt: one replica is asked, and answers in full, or there is a Failure that says why it did not.

The awkward bit is telling: a close-delimited stream ends in the same way whether the server has finished or died. So
the answer itself is judged first (``evidence``), and where it is not whole the process is asked (``diagnose``).
"""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

from backends.admission.circuit_breaker import against
from backends.admission.lease import Lease
from backends.diagnosis.error_answers import judge_answer
from backends.domain.failure import HARMLESS, Aftermath, Blame, Cause, Failure, Sent
from backends.upstream.exchange import Exchange, ExchangeError, Fault, Head, Offer, Request
from gateway.api.kinds import Kind
from gateway.forward.request_state import ModelRules, RequestState, facts
from gateway.forward.responders import Responder
from gateway.forward.upstream_errors import of_answer, of_event
from gateway.policy.request_guard import RequestGuard
from gateway.request import ParsedRequest, fit_allowed, fit_room, fit_vocab, upstream_body
from gateway.stream.interpreter import Completeness, End
from gateway.stream.relay import Relay
from gateway.stream.whole_answer import Source, WholeAnswer, is_whole_answer

MAX_ERROR = 1 << 20  # bytes of an error answer that are read

PATHS: Mapping[Kind, str] = {Kind.CHAT: "/v1/chat/completions", Kind.COMPLETION: "/v1/completions"}
HEADERS = ((b"content-type", b"application/json"), (b"accept", b"text/event-stream, application/json"))
NO_LOGPROBS = "logprobs: left out: mlx_lm.server gives none in streams"
NEEDS_VOCAB = frozenset({"logit_bias", "top_k"})


class Attempts:
    def __init__(self, rules: Mapping[str, ModelRules], suspicion: RequestGuard, clock: Callable[[], float]) -> None:
        self._rules = rules
        self._suspicion = suspicion
        self._clock = clock

    async def run(self, job: RequestState, lease: Lease, *, replay_until: float | None = None) -> Failure | None:
        """None: the client has its whole answer. ``replay_until``: the answer is begun already, and what was delivered
        has to have come again by then (event loop's time)."""
        reply, progress = job.reply, job.progress
        try:
            intake = self._fitted(job, lease)
            request = self._request(job, lease, intake)
            if replay_until is None:
                reply.attempt(self._shown_name(job, lease.spec.model))
            progress.tries += 1
            progress.backend, progress.model = lease.spec.id, lease.spec.model
            if not job.client.begun:
                job.client.extra = facts(job, lease, intake)
            failure = await self._exchange(job, lease, request, replay_until)
            over = job.deadline is not None and self._clock() >= job.deadline
            lease.failed = failure is not None and against(failure) and not over
        finally:
            lease.release()
        if failure is not None:
            progress.tried.add(lease.spec.id)
            progress.generations += failure.sent is Sent.MAYBE
            progress.failures.append(failure)
            on, now = lease.spec.model, self._clock()
            self._suspicion.failed(job.intake, failure, job.sight(), model=job.model, on=on, now=now)
        return failure

    async def _exchange(
        self, job: RequestState, lease: Lease, request: Request, replay_until: float | None
    ) -> Failure | None:
        reply = job.reply
        lease.look = job.sight
        exchange = lease.open(request, mute=not reply.upstream_streams)
        alarms = [_at(job.deadline, exchange.abort)] if job.deadline is not None else []
        if replay_until is not None:
            alarms.append(_at(replay_until, partial(_give_up, reply, exchange)))
        try:
            head = await exchange.start()
            if head.status != 200:
                return await self._refusal_of_backend(lease, exchange, head)
            turned = reply.upstream_streams and is_whole_answer(head)
            source: Source = WholeAnswer(exchange, job.intake.kind) if turned else exchange
            if lease.alone and not job.progress.alone and reply.replay is not None:
                source = _AloneNoLonger(source, lease, reply.replay)
            end = await reply.take(source)
        except ExchangeError as error:
            end = reply.end()
            if end.verdict is not Completeness.COMPLETE:
                return await self._diagnose(lease, error)
        finally:
            for alarm in alarms:
                alarm.cancel()
            exchange.close()
        if end.verdict is Completeness.COMPLETE:
            lease.completed = True
            self._suspicion.answered(job.intake, _prompt_tokens(reply), model=job.model, by=lease.spec.model)
            await reply.deliver(end.data)
            return None
        if reply.replay is not None and reply.replay.diverged:
            message = f"{lease.spec.id} was to go on with the answer and gave another one"
            return Failure(Cause.NONE, Aftermath.ALIVE, message, Blame.GATEWAY, backend=lease.spec.id, truncated=True)
        return await self._incomplete(lease, end)

    async def _diagnose(self, lease: Lease, error: ExchangeError) -> Failure:
        if error.fault is Fault.DEADLINE:
            message = f"{lease.spec.id} had not finished within {lease.spec.timeouts.total:g} s (timeouts.total)"
            return Failure(Cause.STALLED, Aftermath.ALIVE, message, backend=lease.spec.id)
        return await lease.diagnose(error)

    async def _incomplete(self, lease: Lease, end: End) -> Failure:
        """The exchange ended in order, and the answer is not whole."""
        if end.verdict is Completeness.FAILED and end.error is not None and not end.error.protocol:
            return await self._confirmed(lease, of_event(lease, end.error))
        if end.error is not None:
            what = end.error.message
        elif end.verdict is Completeness.EMPTY:
            what = "the answer ended without content"
        else:
            what = "the answer ended without finish_reason and [DONE]"
        return await lease.diagnose(ExchangeError(Fault.INCOMPLETE, what))

    async def _refusal_of_backend(self, lease: Lease, exchange: Exchange, head: Head) -> Failure:
        """Its answer has another status than 200. Raises ExchangeError."""
        body = bytearray()
        while len(body) <= MAX_ERROR and (data := await exchange.read()):
            body += data
        answer = judge_answer(head.status, bytes(body), is_mlx=lease.spec.is_mlx)
        if answer is None:
            raise ExchangeError(Fault.PROTOCOL, f"it answered with status {head.status}")
        return await self._confirmed(lease, of_answer(lease, answer, head))

    async def _confirmed(self, lease: Lease, said: Failure) -> Failure:
        """What the backend said of itself, unless its process says more: a dead generation thread is replaced now,
        not when the next probe comes by."""
        if said.blame is Blame.REQUEST or said.cause in HARMLESS:
            return said
        seen = await lease.diagnose(ExchangeError(Fault.INCOMPLETE, said.message))
        return said if seen.truncated else seen

    # -- what is sent --------------------------------------------------------------------------------------------------

    def _fitted(self, job: RequestState, lease: Lease) -> ParsedRequest:
        """Within the bounds of the model that will answer. Raises RequestError."""
        rules, intake = self._rules[lease.spec.model], job.intake
        if lease.spec.model != job.model:
            intake = fit_allowed(intake, rules.allow)
        if rules.is_mlx and intake.stream and intake.wants_logprobs:
            intake = replace(intake, warnings=(*intake.warnings, NO_LOGPROBS))
        if rules.is_mlx and not NEEDS_VOCAB.isdisjoint(intake.params):
            intake = fit_vocab(intake, rules.vocab_size())
        room = self._suspicion.contexts[lease.spec.model].room(job.size)
        return intake if room is None else fit_room(intake, room, rules.max_tokens)

    def _request(self, job: RequestState, lease: Lease, intake: ParsedRequest) -> Request:
        spec = lease.spec
        rules = self._rules[spec.model]
        body = upstream_body(
            intake, model=spec.upstream_model, stream=job.reply.upstream_streams, request_rules=rules.request
        )
        return Request("POST", PATHS[intake.kind], body, HEADERS)

    def _shown_name(self, job: RequestState, model: str) -> str:
        """The name in the answer: as the client called the model; a fallback under its own name."""
        return job.intake.model or model if model == job.model else model


class _AloneNoLonger:
    """Keeps others away only while the answer is generated again: from then on it need not come out the same."""

    def __init__(self, source: Source, lease: Lease, replay: Relay) -> None:
        self._source = source
        self._lease = lease
        self._replay = replay

    async def read(self, offer: Offer | None = None) -> bytes:
        """Raises ExchangeError."""
        if self._replay.replaying:
            return await self._source.read()  # every piece is looked at here, for the one that ends it
        self._lease.share()
        return await self._source.read(offer)


def _at(when: float, abort: Callable[[ExchangeError], None]) -> asyncio.TimerHandle:
    return asyncio.get_running_loop().call_at(when, abort, ExchangeError(Fault.DEADLINE, "the time is over"))


def _give_up(reply: Responder, exchange: Exchange, error: ExchangeError) -> None:
    """Unless the client gets more already."""
    if reply.replay is not None and reply.replay.replaying:
        exchange.abort(error)


def _prompt_tokens(reply: Responder) -> int:
    """0 = it did not say."""
    tokens = (reply.usage or {}).get("prompt_tokens")
    return tokens if isinstance(tokens, int) else 0

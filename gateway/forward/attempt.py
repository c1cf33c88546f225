"""One attempt: one replica is asked, and answers in full, or there is a CallFailure that says why it did not.

Caveat: a close-delimited stream ends in the same way whether the server has finished or died. So the answer itself is
judged first (``stream.interpreter``), and where it is not whole the process is asked (``Lease.diagnose``).

The slot is given back as soon as the upstream's answer has ended, before the last of it is delivered: a client that
reads slowly holds a slot only while the backend still generates for it.
"""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

from backends.admission.circuit_breaker import against
from backends.admission.growth import Stop
from backends.admission.lease import Lease
from backends.diagnosis.error_answers import judge_answer
from backends.diagnosis.suspects import MEMORY
from backends.domain.failure import HARMLESS, Aftermath, Blame, CallFailure, Cause, Failure, Reason, Sent
from backends.upstream.exchange import Exchange, ExchangeError, Fault, Head, Offer, Request
from gateway.api.kinds import Kind
from gateway.forward.answer_trace import Traced
from gateway.forward.body_workers import BodyWorkers
from gateway.forward.linger import Rest, until_json_ends
from gateway.forward.request_state import ModelRules, RequestState, facts, work_of
from gateway.forward.responders import Responder, asks_for_tools
from gateway.forward.upstream_errors import of_answer, of_event, of_lost_call
from gateway.forward.usage import usage_of
from gateway.policy.context_limit import Size
from gateway.policy.request_guard import RequestGuard, Suspect
from gateway.request import (
    ParsedRequest,
    fit_allowed,
    fit_engine,
    fit_room,
    fit_samplers,
    fit_vocab,
    longer,
    sent,
    unbatched,
    upstream_body,
)
from gateway.stream.interpreter import Completeness, End
from gateway.stream.lost_calls import Doubt, cut_off, doubt
from gateway.stream.relay import Relay, Seen
from gateway.stream.unstreamed import Source, UnstreamedAnswer, is_unstreamed

MAX_ERROR_BODY = 1 << 20  # bytes of an error answer that are read
ERROR_BODY_WAIT = 2.0  # seconds; the status has told most of it

PATHS: Mapping[Kind, str] = {Kind.CHAT: "/v1/chat/completions", Kind.COMPLETION: "/v1/completions"}
HEADERS = ((b"content-type", b"application/json"), (b"accept", b"text/event-stream, application/json"))
NO_LOGPROBS = "logprobs: left out: mlx_lm.server gives none in streams"
UNCANCELLABLE_TOKENS = 4096  # of an answer that mlx_lm.server generates to its end, though its client has left
IN_ONE_PIECE = "of an answer with logprobs, which cannot be cancelled"
LOG_WAIT = 0.1  # seconds for the log's word on a tool call; it was written before the bytes that ended the answer
SHORT_LOG_WAIT = 0.005  # the same, where the answer has a call and its loss is not likely
NOT_GENERATED = frozenset({Reason.PROMPT_CACHED, Reason.OCCUPIED, Reason.NO_ROOM})
MAY_TAKE_IT_LATER = frozenset({Reason.OCCUPIED, Reason.NO_ROOM})
NEEDS_VOCAB = frozenset({"logit_bias", "top_k"})
SEED = frozenset({"seed"})
NOTHING = frozenset[str]()


class Attempts:
    def __init__(
        self, rules: Mapping[str, ModelRules], guard: RequestGuard, workers: BodyWorkers, clock: Callable[[], float]
    ) -> None:
        self._rules = rules
        self._guard = guard
        self._workers = workers
        self._clock = clock

    async def run(self, state: RequestState, lease: Lease, *, replay_until: float | None = None) -> CallFailure | None:
        """None: the client has its whole answer. ``replay_until``: the answer is begun already, and what was delivered
        has to have come again by then (event loop's time)."""
        outcome = await self._on_lease(state, lease, replay_until)
        if isinstance(outcome, CallFailure):
            await self.failed(state, lease, outcome)
            return outcome
        await self._answered(state, lease)
        await state.responder.deliver(outcome.data)
        return None

    async def _on_lease(self, state: RequestState, lease: Lease, replay_until: float | None) -> End | CallFailure:
        """The whole of the upstream's answer, or why there is none. The lease is released in either case."""
        responder, progress = state.responder, state.progress
        try:
            self._note_prompt(state, lease)
            parsed = await self._fitted(state, lease)
            if progress.guarded:
                parsed = unbatched(parsed, seed=int(self._clock() * 1e6) % 2**32)
            if parsed is not state.parsed or progress.slicing is not None:  # else as it was admitted
                rules = self._rules[lease.spec.model]
                lease.work = work_of(state, parsed, lease.spec.model, rules=rules, lengths=self._guard.lengths)
            if replay_until is None:
                slicing = progress.slicing
                found = None if slicing is None else slicing.found
                responder.attempt(self._shown_name(state, lease.spec.model), found)
            progress.tries += 1
            progress.backend, progress.model = lease.spec.id, lease.spec.model
            if not state.client.headers_sent:
                state.client.extra = facts(state, lease, parsed)
            if progress.guarded:
                outcome = await self._guarded(state, lease, parsed)
            else:
                outcome = await self._exchange(state, lease, parsed, replay_until)
            lease.failed = isinstance(outcome, CallFailure) and self.counts(state, outcome)
            return outcome
        finally:
            lease.release()

    def counts(self, state: RequestState, failure: CallFailure) -> bool:
        """Against the replica."""
        over = state.deadline is not None and self._clock() >= state.deadline
        return against(failure) and not over

    async def _answered(self, state: RequestState, lease: Lease) -> None:
        if self._guard.quarantine:
            await self._workers.work_on(state.parsed, state.fingerprint)
        usage = state.progress.usage
        self._guard.answered(state.fingerprint, state.parsed.prompt_chars, usage.prompt, by=lease.spec.model)
        if usage.answer:
            self._guard.lengths.note(lease.spec.model, state.source, usage.answer)

    async def failed(
        self, state: RequestState, lease: Lease, failure: CallFailure, *, chars: int | None = None
    ) -> None:
        """``chars``: of its prompt, if only a beginning of it was sent; how far that came is what the lease tells."""
        progress, whole = state.progress, chars is None
        outgrew = failure.verdict.reason is Reason.NO_ROOM
        progress.outgrown |= outgrew
        if failure.verdict.reason not in MAY_TAKE_IT_LATER:
            progress.excluded = progress.excluded.with_seats([lease.seat])
        progress.generations += failure.sent is Sent.MAYBE and failure.verdict.reason not in NOT_GENERATED
        progress.emptied |= failure.suspect and failure.verdict.reason is Reason.EMPTY_PROMPT
        progress.failures.append(failure)
        state.keep_reported()
        try:
            if failure.suspect:
                await self._workers.work_on(state.parsed, state.fingerprint)
            if whole and (outgrew or (failure.alone and failure.verdict.cause in MEMORY)):
                await self._count(state, lease.spec.model)
        finally:  # also where the client leaves at this moment
            sent = min(state.parsed.prompt_chars, chars) if chars is not None else state.parsed.prompt_chars
            suspect = Suspect(state.fingerprint, sent, state.progress_now() if whole else lease.progress)
            self._guard.failed(suspect, failure, model=state.model, on=lease.spec.model, now=self._clock())

    async def _count(self, state: RequestState, model: str) -> None:
        """Its prompt, for what its failure teaches, and so that one which was taken for smaller than it is is not
        admitted and stopped again and again. mlx_lm.server reports the tokens only after the first step of the
        prompt, and without those in its prompt cache; a step that runs out of memory reports nothing."""
        if state.sizes[model].exact:
            return
        count = await self._rules[model].counter.count(state.parsed.kind, state.parsed.params)
        if count is not None and (count.exact or not state.best_size(model).certain):
            state.sizes[model] = Size(count.tokens, state.parsed.prompt_chars, count.exact, count.at_least)

    async def _exchange(
        self, state: RequestState, lease: Lease, parsed: ParsedRequest, replay_until: float | None
    ) -> End | CallFailure:
        responder, whole = state.responder, False
        lease.progress = state.progress_now()
        lease.stop = partial(_stop, responder)
        # In no variable: the exchange lets go of the body once it is sent, and here it would be kept until the end.
        exchange = lease.open(await self._request(state, lease, parsed, stream=responder.upstream_streams))
        alarms = [abort_at(state.deadline, exchange)] if state.deadline is not None else []
        if replay_until is not None:
            alarms.append(_at(replay_until, partial(_give_up, responder, exchange)))
        try:
            head = await exchange.start()
            if head.status != 200:
                return await self.refusal(lease, exchange, head)
            end = await responder.take(_source(exchange, head, lease, state))
            whole = end.verdict is Completeness.COMPLETE or (end.error is not None and end.error.lost_call)
        except ExchangeError as error:
            end = responder.end()
            whole = end.verdict is Completeness.COMPLETE
            if not whole:
                return await self.diagnose(lease, error)
        finally:
            for alarm in alarms:
                alarm.cancel()
            lease.hang_up(whole=whole)
        if end.verdict is Completeness.COMPLETE:
            lost = await self._lost_call(state, lease, end)
            if lost is not None:
                responder.retract()
                return lost
            lease.completed = True
            state.progress.usage = usage_of(responder.usage)
            self._note_pace(state, lease)
            return end
        if responder.replay is not None and responder.replay.diverged:
            message = f"{lease.spec.id} was to go on with the answer and gave another one"
            verdict = Failure(Cause.NONE, Aftermath.ALIVE, message, Blame.GATEWAY, backend=lease.spec.id)
            return CallFailure(verdict, truncated=True)
        return await self.incomplete(state, lease, end)

    async def _lost_call(self, state: RequestState, lease: Lease, end: End) -> CallFailure | None:
        """What is missing in an answer that looks whole."""
        if not asks_for_tools(state.parsed):
            return None
        match doubt(end.ending, is_mlx=lease.identity.is_mlx):
            case Doubt.NONE:
                return None
            case Doubt.ASK_LOG:
                lost = await lease.dropped_call(within=LOG_WAIT)
            case Doubt.ASK_LOG_IF_ALONE:
                lost = not lease.accompanied and await lease.dropped_call(within=SHORT_LOG_WAIT)
            case Doubt.LOST:
                await lease.dropped_call(within=SHORT_LOG_WAIT)  # the line in the log, if any, is this request's
                lost = True
        return of_lost_call(lease, state.parsed, cut=cut_off(end.ending)) if lost else None

    def _note_pace(self, state: RequestState, lease: Lease) -> None:
        responder, usage = state.responder, state.progress.usage
        began = lease.admitted if lease.work.one_piece else responder.first_content_at or lease.admitted
        lease.written = (usage.answer, self._clock() - began)
        if not lease.work.one_piece:
            sliced, progress = state.progress.slicing is not None, responder.progress
            cached = usage.found_beside_slices(progress) if sliced and progress else usage.cached
            lease.read = (usage.prompt, cached, began - lease.admitted)

    async def diagnose(self, lease: Lease, error: ExchangeError) -> CallFailure:
        if error.fault is Fault.DEADLINE:
            message = f"{lease.spec.id} had not finished within {lease.spec.timeouts.total:g} s (timeouts.total)"
            return CallFailure(Failure(Cause.STALLED, Aftermath.ALIVE, message, backend=lease.spec.id))
        return await lease.diagnose(error)

    async def incomplete(self, state: RequestState, lease: Lease, end: End) -> CallFailure:
        """The exchange ended in order, and the answer is not whole."""
        if end.error is not None and end.error.lost_call:
            await lease.dropped_call(within=SHORT_LOG_WAIT)  # the line in the log is this request's
            return of_lost_call(lease, state.parsed, cut=False, what=end.error.message)
        if end.verdict is Completeness.FAILED and end.error is not None and not end.error.protocol:
            return await self._confirmed(lease, of_event(lease, end.error))
        if end.error is not None:
            what = end.error.message
        elif end.verdict is Completeness.EMPTY:
            what = "the answer ended without content"
        else:
            what = "the answer ended without finish_reason and [DONE]"
        return await lease.diagnose(ExchangeError(Fault.INCOMPLETE, what))

    async def refusal(self, lease: Lease, exchange: Exchange, head: Head) -> CallFailure:
        """Its answer has another status than 200. Raises ExchangeError."""
        body, rest = bytearray(), Rest(ERROR_BODY_WAIT)
        lease.finished = True  # the status has told most of it
        while len(body) <= MAX_ERROR_BODY and (data := await rest.read(exchange)):
            body += data
        lease.identity.note_answer(head, bytes(body))
        answer = judge_answer(head.status, bytes(body), is_mlx=lease.identity.is_mlx, codes=lease.spec.codes)
        if answer is None:
            raise ExchangeError(Fault.PROTOCOL, f"it answered with status {head.status}")
        return await self._confirmed(lease, of_answer(lease, answer, head))

    async def _confirmed(self, lease: Lease, said: CallFailure) -> CallFailure:
        """What the backend said of itself, unless its process says more: a dead generation thread is replaced now,
        not when the next probe comes by."""
        if said.verdict.blame is Blame.REQUEST or said.verdict.cause in HARMLESS:
            return said
        seen = await lease.diagnose(ExchangeError(Fault.INCOMPLETE, said.verdict.message))
        unexplained = seen.truncated or seen.verdict.cause is Cause.UNREACHABLE
        return said if unexplained else seen

    # -- a prompt that may be in the prompt cache whole (``request.cached``) -------------------------------------------

    def _note_prompt(self, state: RequestState, lease: Lease) -> None:
        state.progress.trace = self._guard.cached.sent(lease.seat, state.prompt) if lease.identity.is_mlx else None

    async def _guarded(self, state: RequestState, lease: Lease, parsed: ParsedRequest) -> End | CallFailure:
        failure = await self._cleared(state, lease, parsed)
        if failure is not None:
            return failure
        outcome = await self._exchange(state, lease, parsed, None)
        if isinstance(outcome, CallFailure) and outcome.truncated and not state.responder.answered:
            return _cached_whole(lease)
        return outcome

    async def _cleared(self, state: RequestState, lease: Lease, parsed: ParsedRequest) -> CallFailure | None:
        """Has the entry replaced by a longer one. An error answer is left to the request itself, which gets it too."""
        exchange = lease.open(await self._request(state, lease, longer(parsed), stream=True))
        alarms = [abort_at(state.deadline, exchange)] if state.deadline is not None else []
        left, over = MAX_ERROR_BODY, False
        try:
            await exchange.start()
            while left > 0 and (data := await exchange.read()):
                left -= len(data)
            over = True
        except ExchangeError as error:
            over = True
            failure = await self.diagnose(lease, error)
            return None if failure.truncated else failure
        finally:
            for alarm in alarms:
                alarm.cancel()
            lease.hang_up(whole=over)
        return None

    # -- what is sent --------------------------------------------------------------------------------------------------

    async def _fitted(self, state: RequestState, lease: Lease) -> ParsedRequest:
        """Within the bounds of the model that will answer. Raises RequestError."""
        rules, parsed = self._rules[lease.spec.model], state.parsed
        if lease.spec.model != state.model:
            parsed = fit_allowed(parsed, rules.allow)
        if lease.identity.is_mlx and parsed.stream and parsed.wants_logprobs:
            parsed = replace(parsed, warnings=(*parsed.warnings, NO_LOGPROBS))
        if lease.identity.is_mlx and not NEEDS_VOCAB.isdisjoint(parsed.params):
            parsed = fit_vocab(parsed, await rules.vocab_size())
        if lease.identity.is_mlx:
            parsed = fit_samplers(parsed)
        parsed = self._within_context(state, parsed, lease.spec.model)
        if lease.identity.is_mlx and not state.responder.upstream_streams:
            parsed = fit_engine(parsed, UNCANCELLABLE_TOKENS, rules.max_tokens, IN_ONE_PIECE)
        return parsed

    def _within_context(self, state: RequestState, parsed: ParsedRequest, model: str) -> ParsedRequest:
        rules, size = self._rules[model], state.sizes[model]
        room = self._guard.contexts[model].room(size)
        default = sent(parsed, rules.request)("max_tokens") or rules.max_tokens
        return parsed if room is None else fit_room(parsed, room, default, certain=size.certain)

    async def _request(self, state: RequestState, lease: Lease, parsed: ParsedRequest, *, stream: bool) -> Request:
        rules = self._rules[lease.spec.model].request
        kept = SEED if state.progress.guarded else NOTHING
        model = lease.identity.model
        write = partial(upstream_body, parsed, model=model, stream=stream, request_rules=rules, kept=kept)
        body = await self._workers.work_on(parsed, write)
        return Request("POST", PATHS[parsed.kind], body, HEADERS)

    def _shown_name(self, state: RequestState, model: str) -> str:
        """The name in the answer: as the client called the model; a fallback under its own name."""
        return state.parsed.model or model if model == state.model else model


def _source(exchange: Exchange, head: Head, lease: Lease, state: RequestState) -> Source:
    """The answer as the responder reads it, with those who look at what passes."""
    source: Source = exchange
    responder, progress = state.responder, state.progress
    if responder.upstream_streams and is_unstreamed(head):
        more = partial(until_json_ends, seems_whole=partial(setattr, lease, "finished"))
        source = UnstreamedAnswer(exchange, state.parsed.kind, more)
    if progress.trace is not None:
        source = Traced(source, progress.trace, streams=responder.upstream_streams)
    shares = not (progress.isolation or progress.guarded)
    if lease.alone and shares and responder.replay is not None:
        source = _AloneNoLonger(source, lease, responder.replay)
    return _Reporting(source, lease, state, head)


class _Reporting:
    """Keeps ``lease.progress`` up to date with what was read, until the first token has come; the first piece shows
    which engine answers."""

    def __init__(self, source: Source, lease: Lease, state: RequestState, head: Head) -> None:
        self._source = source
        self._lease = lease
        self._state = state
        self._head: Head | None = head

    async def read(self, offer: Offer | None = None) -> bytes:
        """Raises ExchangeError."""
        if not self._lease.progress.decoding:
            self._lease.report(self._state.progress_now())
        self._lease.finished = self._state.responder.finished
        data = await self._source.read(offer)
        if self._head is not None:
            self._lease.identity.note_answer(self._head, data)
            self._head = None
        return data


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
        self._lease.allow_others()
        return await self._source.read(offer)


def abort_at(when: float, exchange: Exchange) -> asyncio.TimerHandle:
    """``when``: event loop's time of the request's deadline."""
    return _at(when, exchange.abort)


def _stop(responder: Responder) -> Stop:
    """What it would mean to the client if this attempt was stopped now."""
    if responder.finished or responder.seen is Seen.DONE:
        return Stop.NEVER
    if responder.seen is not Seen.SPEAKING:
        return Stop.AGAIN
    return Stop.LOST if responder.catch_up is None else Stop.REPLAY


def _at(when: float, abort: Callable[[ExchangeError], None]) -> asyncio.TimerHandle:
    return asyncio.get_running_loop().call_at(when, abort, ExchangeError(Fault.DEADLINE, "the time is over"))


def _give_up(responder: Responder, exchange: Exchange, error: ExchangeError) -> None:
    """Unless the client gets more already."""
    if responder.replay is not None and responder.replay.replaying:
        exchange.abort(error)


def _cached_whole(lease: Lease) -> CallFailure:
    name = lease.spec.id
    message = (
        f"{name} holds the whole of this prompt in its prompt cache and cannot answer it until the entry has left the "
        "cache: change the prompt (one more character is enough), or restart the backend"
    )
    verdict = Failure(Cause.NONE, Aftermath.ALIVE, message, Blame.REQUEST, name, reason=Reason.PROMPT_CACHED)
    return CallFailure(replace(verdict, generation=lease.generation))

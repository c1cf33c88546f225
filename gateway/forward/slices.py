"""Reads a long prompt in slices, before the request itself is sent. ``policy.slicing`` says when, and where it is cut.

    lease ── slice ── release ── others run ── lease ── slice ── … ── lease ── the request, whole

A slice is ours: it has no usage and no log line. Its failure is that of the request, which counts as one try however
many slices it had. What the slices have read is not told as cached: the client's ``cached_tokens`` are those that the
first slice found.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial

from backends.admission.lease import Lease
from backends.diagnosis.suspects import RequestProgress
from backends.domain.engine import Engine
from backends.domain.failure import Blame, CallFailure
from backends.domain.refusal import Why
from backends.domain.snapshot import Seat
from backends.domain.spec import Launch
from backends.fleet import Fleet
from backends.upstream.exchange import Exchange, ExchangeError, Request
from gateway.api.kinds import Kind
from gateway.forward.attempt import HEADERS, PATHS, Attempts, abort_at
from gateway.forward.body_workers import BodyWorkers
from gateway.forward.leasing import Denied, Leasing, slice_work
from gateway.forward.linger import Rest
from gateway.forward.request_state import ModelRules, RequestState, facts
from gateway.forward.token_counter import Cut, Script
from gateway.forward.usage import usage_of
from gateway.policy import slicing
from gateway.policy.cached_prompts import Beginning, Trace
from gateway.policy.context_limit import Size
from gateway.policy.request_guard import RequestGuard
from gateway.policy.slicing import Abilities, Ability, Slice, Slicing
from gateway.request import params_sent, slice_body
from gateway.stream.aggregate import Aggregator

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Reading:
    """A prompt that is read in slices. ``text``: all of it; ``read``: what the slices have of it; ``next``: what the
    next one has; ``trace``: of the last slice, on record as a prompt that its instance may hold."""

    text: str
    plan: Slicing
    read: Beginning = field(default_factory=Beginning)
    next: Beginning = field(default_factory=Beginning)
    trace: Trace | None = None
    waited: float = 0.0  # seconds from the last slice to this lease

    def told(self) -> str:
        return f"reading the prompt, {self.plan.read} of {self.plan.tokens} tokens so far"

    def sit(self, seat: Seat) -> None:
        if self.plan.seat not in (None, seat):
            self.read, self.trace = Beginning(), None
        self.plan.sit(seat)


class Slices:
    def __init__(
        self,
        fleet: Fleet,
        rules: Mapping[str, ModelRules],
        leasing: Leasing,
        attempts: Attempts,
        *,
        guard: RequestGuard,
        workers: BodyWorkers,
        clock: Callable[[], float],
    ) -> None:
        self._fleet = fleet
        self._rules = rules
        self._leasing = leasing
        self._attempts = attempts
        self._guard = guard
        self._workers = workers
        self._clock = clock
        self.abilities = Abilities()

    async def prepare(self, state: RequestState) -> None:
        """Decides whether the prompt is to be read in slices; then sets ``state.progress.slicing``."""
        if state.parsed.prompt_chars < slicing.MIN_CHARS or not self._can(state) or not self._may_be_long(state):
            return
        rules = self._rules[state.model]
        if not await rules.trims():
            return
        script = await self._script(state, counted=True)
        if script is None:
            return
        if script.exact:
            state.sizes[state.model] = Size(script.tokens, state.parsed.prompt_chars, exact=True)
        pool, cached = self._fleet.pools[state.model], self._leasing.cached(state)
        if slicing.is_long(script.tokens, cached, pool.reading, known=self._knows_rate(state)):
            proven = self.abilities.of(state.model, self._clock()) is Ability.YES
            state.progress.slicing = Slicing(len(script.text), script.tokens, cached, proven=proven)

    async def _script(self, state: RequestState, *, counted: bool) -> Script | None:
        """The prompt as one text, kept only while it is read: it takes as much memory as the request itself. None: it
        cannot be written as one."""
        rules = self._rules[state.model]
        params = params_sent(state.parsed, rules.request)
        return await rules.counter.script(state.parsed.kind, params, counted=counted)

    def _can(self, state: RequestState) -> bool:
        progress, model = state.progress, state.model
        spec = self._fleet.pools[model].backends[0].spec
        return (
            isinstance(spec.target, Launch)
            and spec.engine is Engine.MLX_LM
            and spec.batches
            and state.responder.upstream_streams
            and not (state.is_copy or progress.isolation or self._leasing.unbatchable(state, model))
            and self.abilities.of(model, self._clock()) is not Ability.NO
        )

    def _may_be_long(self, state: RequestState) -> bool:
        share = min(1.0, self._leasing.cached(state) / max(1, state.size.tokens))
        chars = round(share * state.parsed.prompt_chars)
        pool, known = self._fleet.pools[state.model], self._knows_rate(state)
        return slicing.worth_counting(state.parsed.prompt_chars, chars, pool.reading, known=known)

    def _knows_rate(self, state: RequestState) -> bool:
        return self._fleet.pools[state.model].knows_rate

    async def lease(self, state: RequestState) -> Lease | Denied | CallFailure:
        """A slot on a replica that has read the most of a long prompt; the failure of one that was to read it. Where no
        replica of its model is left to go on with it, the chain of models is looked at again."""
        while True:
            lease = await self._leasing.acquire(state)
            if isinstance(lease, Denied) or state.progress.slicing is None:
                return lease
            granted = await self._read(state, lease)
            if not (isinstance(granted, Denied) and granted.refusal.why is Why.UNAVAILABLE):
                return granted

    async def _read(self, state: RequestState, lease: Lease) -> Lease | Denied | CallFailure:
        """The lease on which to send the request itself, once the most of its prompt was read."""
        progress, plan = state.progress, state.progress.slicing
        if plan is None or lease.spec.model != state.model or progress.isolation or progress.guarded:
            progress.slicing = None
            return lease
        try:
            script = await self._script(state, counted=False)
        except BaseException:
            lease.release()
            raise
        if script is None or len(script.text) != plan.chars:  # a template may write the time of day
            plan.give_up()
            return lease
        if not plan.count and self._fleet.pools[state.model].has_another(lease.spec.id):
            return lease  # the others go there meanwhile
        if not state.client.headers_sent:
            state.client.extra = facts(state, lease, state.parsed, begun=False)
        reading = Reading(script.text, plan)
        stop = state.tell_while_waiting(reading.told)
        try:
            return await self._all(state, lease, reading)
        finally:
            stop()
            self._fleet.pools[state.model].ends_slices(plan)

    async def _all(self, state: RequestState, lease: Lease, reading: Reading) -> Lease | Denied | CallFailure:
        plan = reading.plan
        while (cut := await self._next(lease, reading)) is not None:
            failure = await self._slice(state, lease, reading, cut)
            if failure is not None and failure.verdict.blame is not Blame.REQUEST:
                await self._attempts.failed(state, lease, failure, chars=cut.at)
                return failure
            if failure is not None:
                plan.give_up()  # what is wrong with a slice may be right with the whole
            self._learn(state.model, plan)
            if plan.lost:
                self._note_found(state.model, found=False)
            ended = self._clock()
            granted = await self._leasing.turn(state, plan)
            if isinstance(granted, Denied):
                return granted
            reading.waited, lease = self._clock() - ended, granted
        return lease

    def answered(self, state: RequestState) -> None:
        """The request itself was answered in full. What it found in the prompt cache tells whether the model can be
        read in slices, where there was no second slice, or where its real template differs from that of its files."""
        plan, progress = state.progress.slicing, state.responder.progress
        if plan is not None and plan.count and progress is not None:
            told = plan.lost
            found = plan.judge(state.progress.usage.found_beside_slices(progress))
            if not told and plan.read and plan.able:
                self._note_found(state.model, found=found)
            self._learn(state.model, plan)

    def _learn(self, model: str, plan: Slicing) -> None:
        if plan.able is not None:
            self.abilities.note(model, able=plan.able, now=self._clock())

    def _note_found(self, model: str, *, found: bool) -> None:
        if found:
            self.abilities.found(model)
        else:
            self.abilities.lost(model, self._clock())

    async def _next(self, lease: Lease, reading: Reading) -> Cut | None:
        """Where to cut. If there is nothing to be cut, or the client has left, the lease is as it was, or released."""
        reading.sit(lease.seat)
        rate = self._fleet.backends[lease.spec.id].flight.reading
        beside = self._fleet.pools[lease.spec.model].has_slices_beside(reading.plan, lease.spec.id)
        near = reading.plan.next(rate, reading.waited, beside=beside)
        try:
            return None if near is None else await self._cut(lease, reading, near)
        except BaseException:
            lease.release()
            raise

    async def _cut(self, lease: Lease, reading: Reading, near: int) -> Cut | None:
        """No entry of the prompt cache may be equal to the slice."""
        for _ in range(slicing.TRIES):
            if reading.plan.is_end(near):
                break
            cut = await self._rules[lease.spec.model].counter.cut(reading.text, near)
            if cut is not None and cut.at > reading.read.at:
                reading.next = await self._workers.run(partial(reading.read.until, cut.at, reading.text))
                if not self._guard.cached.may_hold(lease.seat, reading.next.prompt):
                    return cut
            near += slicing.FURTHER
        return None

    async def _slice(self, state: RequestState, lease: Lease, reading: Reading, cut: Cut) -> CallFailure | None:
        """Releases the lease."""
        plan, progress = reading.plan, state.progress
        progress.backend, progress.model = lease.spec.id, lease.spec.model
        self._fleet.pools[state.model].begins_slices(plan, lease.spec.id)
        lease.work, lease.progress = slice_work(plan), RequestProgress(tokens=plan.target)
        try:
            trace = self._guard.cached.sent(lease.seat, reading.next.prompt)
            outcome = await self._exchange(state, lease, reading, cut)
            if isinstance(outcome, CallFailure):
                progress.tries += outcome.verdict.blame is not Blame.REQUEST
                lease.failed = self._attempts.counts(state, outcome)
                return outcome
            log.debug("slice", extra={"backend": lease.spec.id, **asdict(outcome), "waited": reading.waited})
            lease.completed = True
            lease.read = (outcome.tokens, outcome.cached, outcome.seconds)
            self._note(lease.seat, reading, outcome, trace)
            if trace is not None:
                trace.add(cut.says)
            return None
        finally:
            lease.release()

    def _note(self, seat: Seat, reading: Reading, latest: Slice, trace: Trace | None) -> None:
        """The entry of this slice is in the place of the last one's, and the next one's will be in its own."""
        if reading.trace is not None:
            self._guard.cached.forget(seat, reading.trace)
        stays = reading.plan.probes
        reading.plan.note(latest)
        reading.read, reading.trace = reading.next, None if stays else trace

    async def _exchange(self, state: RequestState, lease: Lease, reading: Reading, cut: Cut) -> Slice | CallFailure:
        token = int(cut.token == 0) if reading.plan.probes else cut.token
        write = partial(slice_body, reading.text[: cut.at], model=lease.identity.model, token=token)
        # In no variable: as in ``Attempts``, the exchange lets go of it once it is sent.
        exchange = lease.open(
            Request("POST", PATHS[Kind.COMPLETION], await self._workers.work_on(state.parsed, write), HEADERS)
        )
        alarm = None if state.deadline is None else abort_at(state.deadline, exchange)
        answer, whole = Aggregator(Kind.COMPLETION, ""), False
        try:
            head = await exchange.start()
            began = self._clock()
            if head.status != 200:
                return await self._attempts.refusal(lease, exchange, head)
            await _take(exchange, answer, lease)
            whole = answer.finished
        except ExchangeError as error:  # also after its one token: what it has read is stored then, which takes memory
            return await self._attempts.diagnose(lease, error)
        finally:
            if alarm is not None:
                alarm.cancel()
            lease.hang_up(whole=whole)
        if not whole:
            return await self._attempts.incomplete(state, lease, answer.end())
        usage = usage_of(answer.usage)
        return Slice(cut.at, usage.prompt, usage.cached, lease.last_byte_at - began)


async def _take(exchange: Exchange, answer: Aggregator, lease: Lease) -> None:
    """Raises ExchangeError."""
    rest = Rest()
    while not answer.ended and (data := await (rest.read(exchange) if answer.finished else exchange.read())):
        answer.feed(data)
        lease.finished = answer.finished
        if answer.progress is not None:
            read, unread = answer.progress
            tokens = lease.work.prompt_tokens
            lease.report(
                RequestProgress(
                    tokens,
                    prefilling=True,
                    decoding=answer.answered,
                    prompt_read=read >= unread > 0,
                    read=max(0, tokens - unread + read),
                )
            )

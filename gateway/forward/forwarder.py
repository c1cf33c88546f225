"""The path of one request: candidates, attempts, an answer.

    choose a model of the chain -> lease a replica -> one attempt -> done
          ^                                             |
          +---- another replica, while nothing of <-----+ failed -> an error that says why
                the answer is out

In every case the client gets a whole answer or a structured error, or has left; and the lease is released.
"""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from backends.admission.lease import Lease
from backends.admission.pool import Pool
from backends.diagnosis.suspects import MEMORY
from backends.domain.failure import CallFailure
from backends.domain.refusal import Refusal, Why
from backends.domain.snapshot import Seat
from backends.fleet import Fleet
from backends.mlx_server import is_batchable
from gateway.api import error_mapping
from gateway.api.error_mapping import GaveUp
from gateway.api.errors import Code, GatewayError, RequestError
from gateway.forward.attempt import Attempts
from gateway.forward.body_workers import BodyWorkers
from gateway.forward.request_state import Cached, ModelRules, RequestState, size_of
from gateway.forward.responders import responder_for
from gateway.forward.sink import Sink
from gateway.policy import failover, routing
from gateway.policy.affinity import Affinity, keys_of, turns_of
from gateway.policy.cached_prompts import Prompt, prompt_of
from gateway.policy.quarantine import Fingerprint
from gateway.policy.request_guard import RequestGuard
from gateway.policy.retry_budget import RetryBudget
from gateway.request import ParsedRequest, sent
from gateway.stream.relay import Part
from gateway.stream.resume import CATCH_UP_LIMIT, Outcome, Proof, Tally, deterministic, outcome_of


@dataclass(frozen=True, slots=True)
class Copy:
    """One of several answers to one request. ``first``: the first of those with the same prompt, None = this one."""

    part: Part
    first: RequestState | None


class Forwarder:
    def __init__(
        self,
        fleet: Fleet,
        routes: routing.Routes,
        rules: Mapping[str, ModelRules],
        attempts: Attempts,
        *,
        guard: RequestGuard,
        workers: BodyWorkers,
        show_output: bool,
        clock: Callable[[], float],
    ) -> None:
        self._fleet = fleet
        self._routes = routes
        self._rules = rules
        self._show_output = show_output
        self._clock = clock
        self.guard = guard
        self._workers = workers
        self.budget = RetryBudget()
        self.proofs = dict.fromkeys(rules, Proof.OFF)  # of determinism; set by ``DeterminismTest``
        self.resumes = {model: Tally() for model in rules}
        self._affinity = Affinity()
        self.cached = {model: Cached() for model in rules}
        self._attempts = attempts

    async def state(
        self, client: Sink, parsed: ParsedRequest, model: str, *, session: bytes = b"", copy: Copy | None = None
    ) -> RequestState:
        """``session``: as the client named it. ``copy``: this is one of several answers to one request."""
        first = copy.first if copy is not None else None
        size = await size_of(parsed, self.guard.contexts[model], self._rules[model]) if first is None else first.size
        if first is None:
            several = len(self._fleet.pools[model].backends) > 1
            digest = partial(_digests, parsed, model, session if several else None)
            keys, prompt = await self._workers.work_on(parsed, digest)
        else:
            keys, prompt = first.keys, first.prompt
        total = self._rules[model].total
        deadline = self._clock() + total if total else None
        remember = parsed.stream and any(self._repeats(parsed, name) for name in self._routes.chain(model))
        part = copy.part if copy is not None else None
        responder = responder_for(client, parsed, self._clock, part, remember=remember)
        fingerprint = Fingerprint(model, parsed.params)
        return RequestState(client, parsed, model, size, deadline, responder, fingerprint, keys, prompt)

    def _repeats(self, parsed: ParsedRequest, model: str) -> bool:
        """Whether the same request would get the same answer again from another replica of this model."""
        rules = self._rules[model]
        return self.proofs[model].holds and deterministic(sent(parsed, rules.request), rules.temperature)

    def _unbatchable(self, state: RequestState, model: str) -> bool:
        """mlx_lm.server would not answer others beside it."""
        return state.progress.guarded or not is_batchable(sent(state.parsed, self._rules[model].request))

    async def run(self, state: RequestState) -> GatewayError | None:
        """Answer the client, if need be with an error, which is then returned too. Raises RequestError when the
        request does not fit the model that would answer."""
        self.budget.active += 1
        try:
            error = await self._answer(state)
        finally:
            self.budget.active -= 1
            if state.progress.on_budget:
                self.budget.release()
        if error is not None:
            await state.client.fail(error)
        return error

    async def _answer(self, state: RequestState) -> GatewayError | None:
        """None: the client has its whole answer."""
        if self.guard.quarantine:
            await self._workers.work_on(state.parsed, state.fingerprint)
        decision = self.guard.check(state.size, state.fingerprint, model=state.model, now=self._clock())
        if decision.refused is not None:
            return decision.refused
        state.progress.alone = decision.alone
        while True:
            lease = await self._lease(state)
            if isinstance(lease, GatewayError):
                return lease
            try:
                failure = await self._attempts.run(state, lease)
            except RequestError:
                if not self._another_engine(state, lease):
                    raise
                state.progress.tried.add(lease.spec.id)
                continue
            if failure is None:
                self._answered(state, lease)
                return None
            then = failover.decide(self._situation(state, failure))
            if isinstance(then, failover.Surface):
                return self._surface(state, failure, suspect=then.suspect, gave_up=self._gave_up(state))
            if then.counts and not self._may_retry(state):
                return self._surface(state, failure, suspect=failure.suspect, gave_up=GaveUp.RETRIES)
            if isinstance(then, failover.Resume):
                await asyncio.sleep(then.pause)
                return await self._resume(state, failure)
            self._exclude(state, failure, then)
            await asyncio.sleep(then.pause)

    def _exclude(self, state: RequestState, failure: CallFailure, then: failover.TryNext) -> None:
        """Where the next attempt may run."""
        state.progress.alone |= then.alone
        if then.same and not self._fleet.pools[state.progress.model].ready(frozenset(state.progress.tried)):
            state.progress.tried.discard(failure.verdict.backend)
        if then.elsewhere:
            state.progress.tried |= self._fleet.sharing(failure.verdict.backend)

    def _another_engine(self, state: RequestState, lease: Lease) -> bool:
        """The model has a replica of another kind, for which other bounds hold."""
        return any(
            other.engine is not lease.identity.engine and other.has_slot() and other.id not in state.progress.tried
            for other in self._fleet.pools[lease.spec.model].backends
        )

    def _answered(self, state: RequestState, lease: Lease) -> None:
        self._affinity.note(state.keys, Seat(lease.spec.id, lease.generation))
        usage = state.responder.usage
        if usage is not None:
            self.cached[lease.spec.model].count(usage)

    def _may_retry(self, state: RequestState) -> bool:
        """Within the retry budget; a request holds at most one share of it."""
        state.progress.on_budget = state.progress.on_budget or self.budget.grant()
        return state.progress.on_budget

    async def _resume(self, state: RequestState, failure: CallFailure) -> GatewayError | None:
        """Go on with an answer of which the client has a part, or tell of the failure that broke it off."""
        progress, replay, began = state.progress, state.responder.replay, self._clock()
        if replay is None:
            raise RuntimeError("only what is streamed can be resumed")
        replay.resume()
        until = min(began + CATCH_UP_LIMIT, state.deadline or began + CATCH_UP_LIMIT)
        pool = self._fleet.pools[progress.model]
        tried = frozenset(progress.tried) | self._risky(state, pool)
        progress.guarded = False
        unbatchable = self._unbatchable(state, progress.model)
        lease: Lease | Refusal | None
        if self.proofs[progress.model] is Proof.IDLE_ONLY and not progress.alone:
            lease = pool.idle(tried, unbatchable=unbatchable)
        else:
            lease = await pool.acquire(
                exclude=tried, within=until - began, alone=progress.alone, unbatchable=unbatchable
            )
        second: CallFailure | None = failure
        if isinstance(lease, Lease):
            second = await self._attempts.run(state, lease, replay_until=until)
        outcome = outcome_of(replaying=replay.replaying, diverged=replay.diverged, asked=isinstance(lease, Lease))
        progress.resumed = outcome
        self.resumes[progress.model].count(outcome, replay.matched)
        if second is None:
            return None
        return self._surface(state, second if outcome is Outcome.SPLICED else failure, suspect=False)

    # -- who answers --------------------------------------------------------------------------------------------------

    async def _lease(self, state: RequestState) -> Lease | GatewayError:
        """A slot on a replica not yet tried, of the model or of a fallback; or the error that says why there is none.

        While a request waits in line its model may go down as a whole: then the chain is looked at again.
        """
        tried = frozenset(state.progress.tried)
        chain = self._routes.chain(state.model)
        asked: set[str] = set()  # models that this request has had loaded, if they were unloaded: once is enough
        while (model := routing.choose(chain, lambda name: self._prospect(state, name, tried, asked))) is not None:
            if model not in state.sizes:  # a fallback: once its tokens are counted, it may be out of the question
                state.sizes[model] = await size_of(state.parsed, self.guard.contexts[model], self._rules[model])
                continue
            asked.add(model)
            pool, progress = self._fleet.pools[model], state.progress
            risky = self._risky(state, pool)
            elsewhere = not progress.emptied and pool.ready(tried | risky)
            progress.guarded = progress.emptied or (bool(risky) and not elsewhere)
            within = 0.0 if state.deadline is None else max(0.001, state.deadline - self._clock())
            granted = await pool.acquire(
                exclude=tried | risky if elsewhere else tried,
                within=within,
                alone=progress.alone
                or progress.emptied,  # most that are guarded only look alike: no reason to hold up all
                unbatchable=self._unbatchable(state, model),
                prefer=self._affinity.of(state.keys),
            )
            if isinstance(granted, Lease):
                if progress.guarded or granted.spec.id not in self._risky(state, pool):
                    return granted
                granted.release()  # it was sent such a prompt while this one was queued; each replica becomes so once
                continue
            if granted.why is not Why.UNAVAILABLE:
                return self._refused(state, granted, model)
        for model in chain:
            self._fleet.pools[model].look_again()
        return self._refused(state, Refusal(Why.UNAVAILABLE), state.model)

    def _prospect(self, state: RequestState, model: str, tried: frozenset[str], asked: set[str]) -> routing.Prospect:
        """A model that is loaded on demand counts as ready: its fallbacks are for failures."""
        if model != state.model and self._too_long_for(model, state):
            return routing.Prospect(ready=False, is_up_or_starting=False)
        pool = self._fleet.pools[model]
        on_call = pool.loading_on_demand(tried) or (model not in asked and pool.unloaded(tried))
        return routing.Prospect(ready=pool.ready(tried) or on_call, is_up_or_starting=pool.may_answer(tried))

    def _too_long_for(self, model: str, state: RequestState) -> bool:
        """For a fallback, whose tokens are others."""
        size = state.sizes.get(model)
        return size is not None and self.guard.contexts[model].refusal(size, self._clock()) is not None

    def _refused(self, state: RequestState, refusal: Refusal, model: str) -> GatewayError:
        if state.deadline is not None and self._clock() >= state.deadline - 0.01:
            total = self._rules[state.model].total
            message = f"no replica of model {model!r} took the request within {total:g} s (timeouts.total)"
            return GatewayError(Code.OVERLOADED, message, model=model)
        if state.progress.failures:  # no other replica could take it: the first failure says more
            last = state.progress.failures[-1]
            return self._surface(state, last, suspect=last.suspect and last.verdict.cause in MEMORY)
        return error_mapping.of_refusal(
            refusal,
            self._fleet.snapshots(model),
            model=model,
            show_output=self._show_output,
            guarded=state.progress.guarded,
        )

    def _risky(self, state: RequestState, pool: Pool) -> frozenset[str]:
        """The replicas that may hold the whole prompt in their prompt cache."""
        return self.guard.cached.risky((Seat(b.id, b.generation) for b in pool.backends), state.prompt)

    # -- particulars --------------------------------------------------------------------------------------------------

    def _situation(self, state: RequestState, failure: CallFailure) -> failover.Situation:
        return failover.Situation(
            failure=failure,
            seen=state.responder.seen,
            generations=state.progress.generations,
            tries=state.progress.tries,
            suspected=all(one.suspect for one in state.progress.failures),
            left=None if state.deadline is None else state.deadline - self._clock(),
            replay=state.responder.catch_up if self._repeats(state.parsed, state.progress.model) else None,
        )

    def _gave_up(self, state: RequestState) -> GaveUp:
        if state.deadline is not None and self._clock() >= state.deadline:
            return GaveUp.TIME
        return GaveUp.TRIES if len(state.progress.failures) > 1 else GaveUp.NO_REPLICA

    def _surface(
        self, state: RequestState, failure: CallFailure, *, suspect: bool, gave_up: GaveUp = GaveUp.NO_REPLICA
    ) -> GatewayError:
        return error_mapping.of_failure(
            failure,
            model=state.model,
            suspect=suspect,
            eta=error_mapping.soonest(self._fleet.snapshots(state.model)),
            show_output=self._show_output,
            has_content=state.responder.first_content_at is not None and state.client.headers_sent,
            gave_up=gave_up,
        )


def _digests(parsed: ParsedRequest, model: str, session: bytes | None) -> tuple[tuple[int, ...], Prompt]:
    """What a request is recognised by: its conversation (``session`` None: one replica, none to prefer), and its
    prompt."""
    turns = turns_of(parsed)
    return keys_of(turns, model, session) if session is not None else (), prompt_of(parsed, turns)

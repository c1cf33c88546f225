"""THE request path: a parsed request, candidates, attempts, an answer.

    choose a model of the chain -> lease a replica -> one attempt -> done
          ^                                             |
          +---- another replica, while nothing of <-----+ failed -> an error that says why
                the answer is out

Whatever happens, the client gets a whole answer or a structured error, or has left; and the slot is given back.
"""

import asyncio
from collections.abc import Callable, Mapping

from backends.admission.lease import Lease
from backends.diagnosis.suspects import MEMORY
from backends.domain.failure import Failure
from backends.domain.refusal import Refusal, Why
from backends.domain.snapshot import Seat
from backends.fleet import Fleet
from gateway.api import error_mapping
from gateway.api.errors import Code, GatewayError
from gateway.forward.attempt import Attempts
from gateway.forward.request_state import Cached, ModelRules, RequestState
from gateway.forward.responders import responder_for
from gateway.forward.sink import Sink
from gateway.policy import failover, routing
from gateway.policy.affinity import Affinity, keys_of
from gateway.policy.context_limit import Size
from gateway.policy.request_guard import RequestGuard
from gateway.policy.retry_budget import RetryBudget
from gateway.request import ParsedRequest, sent
from gateway.stream.relay import Part
from gateway.stream.resume import WITHIN, Outcome, Proof, Tally, deterministic, outcome_of


class Forwarder:
    def __init__(
        self,
        fleet: Fleet,
        routes: routing.Routes,
        rules: Mapping[str, ModelRules],
        *,
        show_output: bool,
        clock: Callable[[], float],
    ) -> None:
        self._fleet = fleet
        self._routes = routes
        self._rules = rules
        self._show_output = show_output
        self._clock = clock
        self.suspicion = RequestGuard({model: rule.max_context for model, rule in rules.items()})
        self.budget = RetryBudget()
        self.proofs = dict.fromkeys(rules, Proof.OFF)  # of determinism; kept by ``selftest``
        self.resumes = {model: Tally() for model in rules}
        self._affinity = Affinity()
        self.cached = {model: Cached() for model in rules}
        self._attempts = Attempts(rules, self.suspicion, clock)

    async def job(
        self, client: Sink, intake: ParsedRequest, model: str, part: Part | None = None, *, session: bytes = b""
    ) -> RequestState:
        total = self._rules[model].total
        deadline = self._clock() + total if total else None
        size = await self._size(intake, model)
        remember = intake.stream and any(self._repeats(intake, name) for name in self._routes.chain(model))
        reply = responder_for(client, intake, self._clock, part, remember=remember)
        keys = keys_of(intake, model, session) if len(self._fleet.pools[model].backends) > 1 else ()
        return RequestState(client, intake, model, size, deadline, reply, keys)

    def _repeats(self, intake: ParsedRequest, model: str) -> bool:
        """Whether the same request would get the same answer again from another replica of this model."""
        rules = self._rules[model]
        return self.proofs[model].holds and deterministic(sent(intake, rules.request), rules.temperature)

    async def _size(self, intake: ParsedRequest, model: str) -> Size:
        """Estimated, where that is enough to tell that it fits; else counted, where that can be done."""
        context = self.suspicion.contexts[model]
        if context.in_question(intake.prompt_chars, len(intake.params.get("messages", ()))):
            counted = await self._rules[model].counter.count(intake.kind, intake.params)
            if counted is not None:
                return Size(counted, intake.prompt_chars, exact=True)
        return context.estimate(intake.prompt_chars)

    async def run(self, job: RequestState) -> GatewayError | None:
        """Answer the client, if need be with an error, which is then returned too. Raises RequestError when the
        request does not fit the model that would answer."""
        self.budget.active += 1
        try:
            error = await self._answer(job)
        finally:
            self.budget.active -= 1
            if job.progress.on_budget:
                self.budget.release()
        if error is not None:
            await job.client.fail(error)
        return error

    async def _answer(self, job: RequestState) -> GatewayError | None:
        """None: the client has its whole answer."""
        standing = self.suspicion.standing(job.intake, job.size, model=job.model, now=self._clock())
        if standing.refused is not None:
            return standing.refused
        job.progress.alone = standing.alone
        while True:
            lease = await self._lease(job)
            if isinstance(lease, GatewayError):
                return lease
            failure = await self._attempts.run(job, lease)
            if failure is None:
                self._answered(job, lease)
                return None
            decision = failover.decide(self._situation(job, failure))
            if isinstance(decision, failover.Surface):
                return self._surface(job, failure, suspect=decision.suspect)
            if decision.counts and not self._may_retry(job):
                return self._surface(job, failure, suspect=failure.suspect)
            if isinstance(decision, failover.Resume):
                await asyncio.sleep(decision.pause)
                return await self._resume(job, failure)
            job.progress.alone |= decision.alone
            if decision.elsewhere:
                job.progress.tried |= self._fleet.sharing(failure.backend)
            await asyncio.sleep(decision.pause)

    def _answered(self, job: RequestState, lease: Lease) -> None:
        self._affinity.note(job.keys, Seat(lease.spec.id, lease.generation))
        usage = job.reply.usage
        if usage is not None:
            self.cached[lease.spec.model].count(usage)

    def _may_retry(self, job: RequestState) -> bool:
        """Within the retry budget, of which a request holds one share at most."""
        job.progress.on_budget = job.progress.on_budget or self.budget.grant()
        return job.progress.on_budget

    async def _resume(self, job: RequestState, failure: Failure) -> GatewayError | None:
        """Go on with an answer of which the client has a part, or tell of the failure that broke it off."""
        progress, replay, began = job.progress, job.reply.replay, self._clock()
        if replay is None:
            raise RuntimeError("only what is streamed can be resumed")
        replay.resume()
        until = min(began + WITHIN, job.deadline or began + WITHIN)
        pool, tried = self._fleet.pools[progress.model], frozenset(progress.tried)
        lease: Lease | Refusal | None
        if self.proofs[progress.model] is Proof.IDLE_ONLY and not progress.alone:
            lease = pool.idle(tried)
        else:
            lease = await pool.acquire(exclude=tried, within=until - began, alone=progress.alone)
        second: Failure | None = failure
        if isinstance(lease, Lease):
            second = await self._attempts.run(job, lease, replay_until=until)
        outcome = outcome_of(replaying=replay.replaying, diverged=replay.diverged, asked=isinstance(lease, Lease))
        progress.resumed = outcome
        self.resumes[progress.model].count(outcome, replay.matched)
        if second is None:
            return None
        return self._surface(job, second if outcome is Outcome.SPLICED else failure, suspect=False)

    # -- who answers --------------------------------------------------------------------------------------------------

    async def _lease(self, job: RequestState) -> Lease | GatewayError:
        """A slot on a replica not yet tried, of the model or of a fallback; or the error that says why there is none.

        While a request waits in line its model may go down as a whole: then the chain is looked at again.
        """
        tried = frozenset(job.progress.tried)
        chain = self._routes.chain(job.model)
        asked: set[str] = set()  # models that this request has had loaded, if they were asleep: once is enough
        while (model := routing.choose(chain, lambda name: self._prospect(job, name, tried, asked))) is not None:
            asked.add(model)
            within = 0.0 if job.deadline is None else max(0.001, job.deadline - self._clock())
            granted = await self._fleet.pools[model].acquire(
                exclude=tried, within=within, alone=job.progress.alone, prefer=self._affinity.of(job.keys)
            )
            if isinstance(granted, Lease):
                return granted
            if granted.why is not Why.UNAVAILABLE:
                return self._refused(job, granted, model)
        return self._refused(job, Refusal(Why.UNAVAILABLE), job.model)

    def _prospect(self, job: RequestState, model: str, tried: frozenset[str], asked: set[str]) -> routing.Prospect:
        """One that is loaded when it is needed counts as ready: that is how it was meant to be."""
        if model != job.model and self.suspicion.contexts[model].refusal(job.size, self._clock()) is not None:
            return routing.Prospect(ready=False, hopeful=False)
        pool = self._fleet.pools[model]
        on_call = pool.waking(tried) or (model not in asked and pool.asleep(tried))
        return routing.Prospect(ready=pool.ready(tried) or on_call, hopeful=pool.may_answer(tried))

    def _refused(self, job: RequestState, refusal: Refusal, model: str) -> GatewayError:
        if job.deadline is not None and self._clock() >= job.deadline - 0.01:
            total = self._rules[job.model].total
            message = f"no replica of model {model!r} took the request within {total:g} s (timeouts.total)"
            return GatewayError(Code.OVERLOADED, message, model=model)
        if job.progress.failures:  # nobody else could take it: what happened first says more
            last = job.progress.failures[-1]
            return self._surface(job, last, suspect=last.suspect and last.cause in MEMORY)
        return error_mapping.of_refusal(
            refusal, self._fleet.snapshots(model), model=model, show_output=self._show_output
        )

    # -- particulars --------------------------------------------------------------------------------------------------

    def _situation(self, job: RequestState, failure: Failure) -> failover.Situation:
        return failover.Situation(
            failure=failure,
            seen=job.reply.seen,
            generations=job.progress.generations,
            tries=job.progress.tries,
            suspected=all(one.suspect for one in job.progress.failures),
            left=None if job.deadline is None else job.deadline - self._clock(),
            replay=job.reply.catch_up if self._repeats(job.intake, job.progress.model) else None,
        )

    def _surface(self, job: RequestState, failure: Failure, *, suspect: bool) -> GatewayError:
        return error_mapping.of_failure(
            failure,
            model=job.model,
            suspect=suspect,
            eta=error_mapping.soonest(self._fleet.snapshots(job.model)),
            show_output=self._show_output,
            begun=job.reply.spoke is not None and job.client.begun,
        )

"""The path of one request: candidates, attempts, an answer.

    choose a model of the chain -> lease a replica -> one attempt -> done
          ^                                             |
          +---- another replica, or the same one when <-+ failed -> an error that says why
                it is back, while nothing of the answer is out

In every case the client gets a whole answer or a structured error, or has left; and the lease is released.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from backends.admission.lease import Lease
from backends.admission.slot_request import Isolation
from backends.domain.failure import CallFailure
from backends.domain.priority import Priority
from backends.fleet import Fleet
from gateway.api.error_mapping import GaveUp
from gateway.api.errors import GatewayError, RequestError
from gateway.forward.attempt import Attempts
from gateway.forward.body_workers import BodyWorkers
from gateway.forward.client_errors import ClientErrors
from gateway.forward.leasing import Denied, Leasing
from gateway.forward.request_state import ModelRules, RequestState, size_of
from gateway.forward.responders import asks_for_tools, responder_for
from gateway.forward.sink import Sink
from gateway.forward.slices import Slices
from gateway.forward.usage import Cached
from gateway.policy import failover, routing
from gateway.policy.affinity import Path, path_of
from gateway.policy.cached_prompts import Prompt, prompt_of
from gateway.policy.quarantine import Fingerprint
from gateway.policy.request_guard import RequestGuard
from gateway.policy.retry_budget import RetryBudget
from gateway.request import ParsedRequest, sent
from gateway.stream.relay import Part
from gateway.stream.resume import CATCH_UP_LIMIT, Outcome, Proof, Tally, deterministic, outcome_of

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Copy:
    """One of several answers to one request. ``first``: the first of those with the same prompt, None = this one."""

    part: Part
    first: RequestState | None


class _AnotherEngine(Exception):
    """The request does not fit the replica that was chosen, and may fit another, which is an engine of another kind."""


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
        self._clock = clock
        self._errors = ClientErrors(fleet, rules, clock=clock, show_output=show_output)
        self._leasing = Leasing(fleet, routes, rules, guard, clock=clock)
        self._slices = Slices(fleet, rules, self._leasing, attempts, guard=guard, workers=workers, clock=clock)
        self.guard = guard
        self._workers = workers
        self.budget = RetryBudget()
        self.proofs = dict.fromkeys(rules, Proof.OFF)  # of determinism; set by ``DeterminismTest``
        self.resumes = {model: Tally() for model in rules}
        self.cached = {model: Cached() for model in rules}
        self._attempts = attempts

    async def state(
        self,
        client: Sink,
        parsed: ParsedRequest,
        model: str,
        *,
        session: bytes = b"",
        client_deadline: float | None = None,
        priority: Priority = Priority.INTERACTIVE,
        program: bytes = b"",
        copy: Copy | None = None,
    ) -> RequestState:
        """``session``: as the client named it. ``client_deadline``: event loop's time at which the client gives up, as
        far as it said. ``priority``: as the client asked. ``program``: that it is, by its user agent. ``copy``:
        this is one of several answers to one request."""
        first = copy.first if copy is not None else None
        size = await size_of(parsed, self.guard.contexts[model], self._rules[model]) if first is None else first.size
        if first is None:
            digest = partial(_digests, parsed, model, session)
            path, prompt = await self._workers.work_on(parsed, digest)
        else:
            path, prompt = first.path, first.prompt
        total = self._rules[model].total
        deadline = self._clock() + total if total else None
        remember = parsed.stream and any(self._repeats(parsed, name) for name in self._routes.chain(model))
        part = copy.part if copy is not None else None
        responder = responder_for(client, parsed, self._clock, part, remember=remember)
        fingerprint = Fingerprint(model, parsed.params)
        return RequestState(
            client,
            parsed,
            model,
            size,
            deadline,
            responder,
            fingerprint,
            path,
            prompt,
            client_deadline=client_deadline,
            priority=priority,
            is_copy=first is not None,
            source=hash((program, asks_for_tools(parsed))),
        )

    def _repeats(self, parsed: ParsedRequest, model: str) -> bool:
        """Whether the same request would get the same answer again from another instance, as far as is known."""
        rules = self._rules[model]
        return self.proofs[model].allows_resume and deterministic(sent(parsed, rules.request), rules.temperature)

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
        state.progress.isolation = decision.isolation
        await self._slices.prepare(state)
        while True:
            lease = await self._slices.lease(state)
            if isinstance(lease, Denied):
                return self._errors.of_refusal(state, lease.refusal, lease.model)
            try:
                failure = lease if isinstance(lease, CallFailure) else await self._attempted(state, lease)
            except _AnotherEngine:
                continue
            if failure is None:
                return None
            then = failover.decide(self._situation(state, failure))
            if isinstance(then, failover.Surface):
                return self._errors.of_failure(state, failure, suspect=then.suspect, gave_up=self._gave_up(state))
            if then.counts and not self._may_retry(state):
                return self._errors.of_failure(state, failure, suspect=failure.suspect, gave_up=GaveUp.RETRIES)
            if isinstance(then, failover.Resume):
                return await self._resume(state, failure, then)
            self._isolate(state, failure, then.isolation)
            self._exclude(state, failure, then)
            await asyncio.sleep(then.pause)

    async def _attempted(self, state: RequestState, lease: Lease) -> CallFailure | None:
        """None: the client has its whole answer. Raises RequestError, _AnotherEngine."""
        try:
            failure = await self._attempts.run(state, lease)
        except RequestError:
            if not self._another_engine(state, lease):
                raise
            state.progress.excluded = state.progress.excluded.with_seats([lease.seat])
            raise _AnotherEngine from None
        if failure is None:
            self._answered(state, lease)
        return failure

    def _isolate(self, state: RequestState, failure: CallFailure, isolation: Isolation) -> None:
        state.progress.isolation = max(state.progress.isolation, isolation)
        if isolation is not Isolation.APART:
            return
        size = state.best_size(state.progress.model)
        fields = {"inflight": failure.inflight, "beside": failure.beside or None, "prompt": str(size)}
        log.info(
            "memory ran out with others in flight, request is tried again alone",
            extra={"backend": failure.verdict.backend, **fields},
        )

    def _exclude(self, state: RequestState, failure: CallFailure, then: failover.TryNext) -> None:
        """Where the next attempt may run."""
        progress = state.progress
        if then.same and not self._fleet.pools[progress.model].ready(progress.excluded):
            progress.excluded = progress.excluded.without_seats_of(failure.verdict.backend)
        if then.elsewhere:
            progress.excluded = progress.excluded.with_backends(self._fleet.sharing(failure.verdict.backend))

    def _another_engine(self, state: RequestState, lease: Lease) -> bool:
        """The model has a replica of another kind, for which other bounds hold."""
        return any(
            other.engine is not lease.identity.engine
            and other.has_slot()
            and not state.progress.excluded.excludes(other.id, other.generation)
            for other in self._fleet.pools[lease.spec.model].backends
        )

    def _answered(self, state: RequestState, lease: Lease) -> None:
        self._slices.answered(state)
        usage, seat = state.progress.usage, lease.seat
        expected = state.progress.held.get(seat, 0)
        self._leasing.affinity.note(state.path, seat, usage.answered(state.size.tokens), expected)
        self.cached[lease.spec.model].count(usage)

    def _may_retry(self, state: RequestState) -> bool:
        """Within the retry budget; a request holds at most one share of it."""
        state.progress.on_budget = state.progress.on_budget or self.budget.grant()
        return state.progress.on_budget

    async def _resume(self, state: RequestState, failure: CallFailure, then: failover.Resume) -> GatewayError | None:
        """Go on with an answer of which the client has a part, or tell of the failure that broke it off. As long as the
        client has got no more, also what was to go on with it may end: a sibling that runs out of memory too."""
        last, again = failure, then
        while True:
            self._isolate(state, last, again.isolation)
            await asyncio.sleep(again.pause)
            second, outcome = await self._replayed(state)
            if second is None:
                return None if outcome is Outcome.SPLICED else self._errors.of_failure(state, last, suspect=False)
            decision = failover.decide(self._situation(state, second))
            if outcome is not Outcome.FAILED or not isinstance(decision, failover.Resume) or decision.counts:
                break  # the client has more, or the backend may still be at work on it
            last, again = second, decision
        suspect = isinstance(decision, failover.Surface) and decision.suspect
        told = second if outcome is Outcome.SPLICED or second.alone else failure
        return self._errors.of_failure(state, told, suspect=suspect)

    async def _replayed(self, state: RequestState) -> tuple[CallFailure | None, Outcome]:
        """Whether the answer went on, and the failure of the instance that was asked: None = it was whole, or there was
        none."""
        progress, replay = state.progress, state.responder.replay
        if replay is None:
            raise RuntimeError("only what is streamed can be resumed")
        replay.resume()
        lease = await self._leasing.again(state, idle=self.proofs[progress.model].needs_idle)
        failure: CallFailure | None = None
        if isinstance(lease, Lease):
            until = self._clock() + CATCH_UP_LIMIT
            until = until if state.deadline is None else min(until, state.deadline)
            failure = await self._attempts.run(state, lease, replay_until=until)
        outcome = outcome_of(replaying=replay.replaying, diverged=replay.diverged, asked=isinstance(lease, Lease))
        progress.resumed = outcome
        self.resumes[progress.model].count(outcome, replay.matched)
        return failure, outcome

    # -- particulars --------------------------------------------------------------------------------------------------

    def _situation(self, state: RequestState, failure: CallFailure) -> failover.Situation:
        return failover.Situation(
            failure=failure,
            seen=state.responder.seen,
            generations=state.progress.generations,
            tries=state.progress.tries,
            suspected=all(one.suspect for one in state.progress.failures),
            left=None if state.deadline is None else state.deadline - self._clock(),
            replay=self._replay(state),
            isolation=state.progress.isolation,
        )

    def _replay(self, state: RequestState) -> float | None:
        """Seconds from the moment that another instance takes it until the answer goes on; None = it cannot."""
        seconds, model = state.responder.catch_up, state.progress.model
        if seconds is None or not self._repeats(state.parsed, model):
            return None
        # What was delivered came after the prompt was read, which may have been in the cache then.
        return max(seconds, self._leasing.needs(state, model))

    def _gave_up(self, state: RequestState) -> GaveUp:
        if state.deadline is not None and self._clock() >= state.deadline:
            return GaveUp.TIME
        return GaveUp.TRIES if len(state.progress.failures) > 1 else GaveUp.NO_REPLICA


def _digests(parsed: ParsedRequest, model: str, session: bytes) -> tuple[Path, Prompt]:
    """What a request is recognised by: the pieces of its prompt, and its prompt as a whole."""
    path = path_of(parsed, model, session)
    return path, prompt_of(parsed, path.turns)

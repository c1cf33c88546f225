"""THE request path: a parsed request, candidates, attempts, an answer.

    choose a model of the chain -> lease a replica -> one attempt -> done
          ^                                             |
          +---- another replica, while nothing of <-----+ failed -> an error that says why
                the answer is out

Whatever happens, the client gets a whole answer or a structured error, or has left; and the slot is given back.
"""

import asyncio
from collections.abc import Callable, Mapping

from backends.admission import Lease
from backends.answers import judge_answer
from backends.blame import MEMORY
from backends.exchange import Exchange, ExchangeError, Fault, Head, Request
from backends.failure import HARMLESS, Aftermath, Blame, Cause, Failure, Sent
from backends.fleet import Fleet
from backends.refusal import Refusal, Why
from gateway import failover, routing, surface
from gateway.budget import RetryBudget
from gateway.client import Sink
from gateway.context import Size
from gateway.errors import Code, GatewayError
from gateway.evidence import End, Verdict
from gateway.intake import Intake, fit_allowed, fit_room, fit_vocab, upstream_body
from gateway.job import Job, ModelRules, facts
from gateway.kinds import Kind
from gateway.onepiece import OnePiece, in_one_piece
from gateway.relay import Part
from gateway.replies import Reply, reply_to
from gateway.suspicion import Suspicion
from gateway.upstream import of_answer, of_event

MAX_ERROR = 1 << 20  # bytes of an error answer that are read

PATHS: Mapping[Kind, str] = {Kind.CHAT: "/v1/chat/completions", Kind.COMPLETION: "/v1/completions"}
HEADERS = ((b"content-type", b"application/json"), (b"accept", b"text/event-stream, application/json"))
NEEDS_VOCAB = frozenset({"logit_bias", "top_k"})


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
        self.suspicion = Suspicion({model: rule.max_context for model, rule in rules.items()})
        self.budget = RetryBudget()

    async def job(self, client: Sink, intake: Intake, model: str, part: Part | None = None) -> Job:
        total = self._rules[model].total
        deadline = self._clock() + total if total else None
        size = await self._size(intake, model)
        return Job(client, intake, model, size, deadline, reply_to(client, intake, self._clock, part))

    async def _size(self, intake: Intake, model: str) -> Size:
        """Estimated, where that is enough to tell that it fits; else counted, where that can be done."""
        context = self.suspicion.contexts[model]
        if context.in_question(intake.prompt_chars, len(intake.params.get("messages", ()))):
            counted = await self._rules[model].counter.count(intake.kind, intake.params)
            if counted is not None:
                return Size(counted, intake.prompt_chars, exact=True)
        return context.estimate(intake.prompt_chars)

    async def run(self, job: Job) -> GatewayError | None:
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

    async def _answer(self, job: Job) -> GatewayError | None:
        """None: the client has its whole answer."""
        standing = self.suspicion.standing(job.intake, job.size, model=job.model, now=self._clock())
        if standing.refused is not None:
            return standing.refused
        job.progress.alone = standing.alone
        while True:
            lease = await self._lease(job)
            if isinstance(lease, GatewayError):
                return lease
            failure = await self._attempt(job, lease)
            if failure is None:
                return None
            decision = failover.decide(self._situation(job, failure))
            if isinstance(decision, failover.Surface):
                return self._surface(job, failure, suspect=decision.suspect)
            if decision.counts and not self._may_retry(job):
                return self._surface(job, failure, suspect=failure.suspect)
            job.progress.alone |= decision.alone
            if decision.elsewhere:
                job.progress.tried |= self._fleet.sharing(failure.backend)
            await asyncio.sleep(decision.pause)

    def _may_retry(self, job: Job) -> bool:
        """Within the retry budget, of which a request holds one share at most."""
        job.progress.on_budget = job.progress.on_budget or self.budget.grant()
        return job.progress.on_budget

    # -- who answers --------------------------------------------------------------------------------------------------

    async def _lease(self, job: Job) -> Lease | GatewayError:
        """A slot on a replica not yet tried, of the model or of a fallback; or the error that says why there is none.

        While a request waits in line its model may go down as a whole: then the chain is looked at again.
        """
        tried = frozenset(job.progress.tried)
        chain = self._routes.chain(job.model)
        while (model := routing.choose(chain, lambda name: self._prospect(job, name, tried))) is not None:
            within = 0.0 if job.deadline is None else max(0.001, job.deadline - self._clock())
            granted = await self._fleet.pools[model].acquire(exclude=tried, within=within, alone=job.progress.alone)
            if isinstance(granted, Lease):
                return granted
            if granted.why is not Why.UNAVAILABLE:
                return self._refused(job, granted, model)
        return self._refused(job, Refusal(Why.UNAVAILABLE), job.model)

    def _prospect(self, job: Job, model: str, tried: frozenset[str]) -> routing.Prospect:
        if model != job.model and self.suspicion.contexts[model].refusal(job.size, self._clock()) is not None:
            return routing.Prospect(ready=False, hopeful=False)
        pool = self._fleet.pools[model]
        return routing.Prospect(ready=pool.ready(tried), hopeful=pool.may_answer(tried))

    def _refused(self, job: Job, refusal: Refusal, model: str) -> GatewayError:
        if job.deadline is not None and self._clock() >= job.deadline - 0.01:
            total = self._rules[job.model].total
            message = f"no replica of model {model!r} took the request within {total:g} s (timeouts.total)"
            return GatewayError(Code.OVERLOADED, message, model=model)
        if job.progress.failures:  # nobody else could take it: what happened first says more
            last = job.progress.failures[-1]
            return self._surface(job, last, suspect=last.suspect and last.cause in MEMORY)
        return surface.of_refusal(refusal, self._fleet.snapshots(model), model=model)

    # -- one attempt --------------------------------------------------------------------------------------------------

    async def _attempt(self, job: Job, lease: Lease) -> Failure | None:
        """None: the client has its whole answer."""
        reply, progress = job.reply, job.progress
        try:
            intake = self._fitted(job, lease)
            request = self._request(job, lease, intake)
            reply.attempt(self._shown_name(job, lease.spec.model))
            progress.tries += 1
            progress.backend = lease.spec.id
            if not job.client.begun:
                job.client.extra = facts(job, lease, intake)
            failure = await self._exchange(job, lease, request)
        finally:
            lease.release()
        if failure is not None:
            progress.tried.add(lease.spec.id)
            progress.generations += failure.sent is Sent.MAYBE
            progress.failures.append(failure)
            on, now = lease.spec.model, self._clock()
            self.suspicion.failed(job.intake, failure, job.sight(), model=job.model, on=on, now=now)
        return failure

    async def _exchange(self, job: Job, lease: Lease, request: Request) -> Failure | None:
        reply = job.reply
        lease.look = job.sight
        exchange = lease.open(request, mute=not reply.upstream_streams)
        alarm = _at(job.deadline, exchange)
        try:
            head = await exchange.start()
            if head.status != 200:
                return await self._refusal_of_backend(lease, exchange, head)
            turned = reply.upstream_streams and in_one_piece(head)
            end = await reply.take(OnePiece(exchange, job.intake.kind) if turned else exchange)
        except ExchangeError as error:
            end = reply.end()
            if end.verdict is not Verdict.COMPLETE:
                return await self._diagnose(lease, error)
        finally:
            if alarm is not None:
                alarm.cancel()
            exchange.close()
        if end.verdict is Verdict.COMPLETE:
            lease.completed = True
            self.suspicion.answered(job.intake, _prompt_tokens(reply), model=job.model, by=lease.spec.model)
            await reply.deliver(end.data)
            return None
        return await self._incomplete(lease, end)

    async def _diagnose(self, lease: Lease, error: ExchangeError) -> Failure:
        if error.fault is Fault.DEADLINE:
            message = f"{lease.spec.id} had not finished within {lease.spec.timeouts.total:g} s (timeouts.total)"
            return Failure(Cause.STALLED, Aftermath.ALIVE, message, backend=lease.spec.id)
        return await lease.diagnose(error)

    async def _incomplete(self, lease: Lease, end: End) -> Failure:
        """The exchange ended in order, and the answer is not whole."""
        if end.verdict is Verdict.FAILED and end.error is not None and not end.error.protocol:
            return await self._confirmed(lease, of_event(lease, end.error))
        if end.error is not None:
            what = end.error.message
        elif end.verdict is Verdict.EMPTY:
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

    # -- particulars --------------------------------------------------------------------------------------------------

    def _fitted(self, job: Job, lease: Lease) -> Intake:
        """Within the bounds of the model that will answer. Raises RequestError."""
        rules, intake = self._rules[lease.spec.model], job.intake
        if lease.spec.model != job.model:
            intake = fit_allowed(intake, rules.allow)
        if rules.is_mlx and not NEEDS_VOCAB.isdisjoint(intake.params):
            intake = fit_vocab(intake, rules.vocab_size())
        room = self.suspicion.contexts[lease.spec.model].room(job.size)
        return intake if room is None else fit_room(intake, room, rules.max_tokens)

    def _request(self, job: Job, lease: Lease, intake: Intake) -> Request:
        spec = lease.spec
        rules = self._rules[spec.model]
        body = upstream_body(
            intake, model=spec.upstream_model, stream=job.reply.upstream_streams, request_rules=rules.request
        )
        return Request("POST", PATHS[intake.kind], body, HEADERS)

    def _shown_name(self, job: Job, model: str) -> str:
        """The name in the answer: as the client called the model; a fallback under its own name."""
        return job.intake.model or model if model == job.model else model

    def _situation(self, job: Job, failure: Failure) -> failover.Situation:
        return failover.Situation(
            failure=failure,
            seen=job.reply.seen,
            generations=job.progress.generations,
            tries=job.progress.tries,
            suspected=all(one.suspect for one in job.progress.failures),
            left=None if job.deadline is None else job.deadline - self._clock(),
        )

    def _surface(self, job: Job, failure: Failure, *, suspect: bool) -> GatewayError:
        return surface.of_failure(
            failure,
            model=job.model,
            suspect=suspect,
            eta=surface.soonest(self._fleet.snapshots(job.model)),
            show_output=self._show_output,
            begun=job.reply.spoke is not None and job.client.begun,
        )


def _at(deadline: float | None, exchange: Exchange) -> asyncio.TimerHandle | None:
    if deadline is None:
        return None
    error = ExchangeError(Fault.DEADLINE, "timeouts.total is over")
    return asyncio.get_running_loop().call_at(deadline, exchange.abort, error)


def _prompt_tokens(reply: Reply) -> int:
    """0 = it did not say."""
    tokens = (reply.usage or {}).get("prompt_tokens")
    return tokens if isinstance(tokens, int) else 0

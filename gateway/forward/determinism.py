"""Determinism test: whether two replicas of a model give the same text. Runs once, when two are ready and idle. Where
there is only one, it is asked twice: an answer is resumed on its next instance.

    two prompts and a seeded one, each alone on A and alone on B      equal?   else no resume
    the two prompts on B, within a batch of four                      equal?   else resume on an idle replica only

On Metal the same prompt may get another answer within a batch, since other kernels run then. A replay of an answer that
was begun in a batch then often diverges, which costs time and nothing else.

The test takes slots like any request, but has the lowest priority: it waits while a client's request is in flight or
queued, and is cancelled as soon as one arrives. Its requests are streams, since only a stream can be cancelled.

Caveat: the test itself may make a replica fail, e.g. four requests at a time may exceed the memory. So a test that
fails is repeated at most ``MAX_FAILURES`` times.
"""

import asyncio
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from backends.admission.backend import Backend
from backends.admission.excluded import Excluded
from backends.admission.lease import Lease
from backends.admission.pool import Pool
from backends.admission.slot_request import Isolation, SlotRequest
from backends.upstream.exchange import ExchangeError, Fault, Request
from gateway.api.kinds import Kind
from gateway.forward.linger import Rest
from gateway.stream.aggregate import Aggregator
from gateway.stream.interpreter import Completeness
from gateway.stream.resume import Proof
from gateway.stream.unstreamed import Source, UnstreamedAnswer, is_unstreamed

log = logging.getLogger(__name__)

RETRY_DELAY = 5.0  # seconds after a test that did not complete
MAX_FAILURES = 3  # failed tests, not counting those that a client interrupted
ANSWER_TIMEOUT = 120.0  # seconds for one answer
TOKENS = 32
PROMPTS = ("Tell me about a river and its bridge.", "Count the lamps of a small town, one by one, and name each.")
COMPANIONS = ("Why?", "Describe a long winter in the mountains, with snow, wind, wolves and a fire that will not burn.")
HEADERS = ((b"content-type", b"application/json"),)


class Interrupted(Exception):
    """A client needs the replicas, or a replica is no longer available."""


class Refused(Exception):
    """The replica answered with a status other than 200."""


@dataclass(frozen=True, slots=True)
class DeterminismTest:
    """``name``: of the model in the config; ``settle``: called with the result."""

    name: str
    pool: Pool
    settle: Callable[[Proof], None]
    retry_delay: float = RETRY_DELAY

    async def run(self) -> None:
        self.settle(Proof.PENDING)
        proof = await self._proof()
        log.info("self-test", extra={"model": self.name, "resume": proof.value})
        self.settle(proof)

    async def _proof(self) -> Proof:
        failures = 0
        while True:
            one, other = await self._free()
            try:
                return await self._undisturbed(one, other)
            except Interrupted:
                log.debug("self-test interrupted", extra={"model": self.name})
            except (Refused, ExchangeError) as error:
                failures += 1
                log.warning("self-test failed", extra={"model": self.name, "reason": str(error)})
                if failures >= MAX_FAILURES:
                    return Proof.OFF
            await asyncio.sleep(self.retry_delay)

    async def _free(self) -> tuple[str, str]:
        """Two replicas that are ready and idle, with an empty queue; the only replica twice."""
        needed = min(2, len(self.pool.backends))
        changed = asyncio.Event()
        unsubscribe = self.pool.subscribe(changed.set)
        try:
            while True:
                changed.clear()
                free = [b.id for b in self.pool.backends if b.responsive and not b.inflight and self._all_slots(b)]
                if len(free) >= needed and not self.pool.queued:
                    return free[0], free[needed - 1]
                await changed.wait()
        finally:
            unsubscribe()

    def _all_slots(self, backend: Backend) -> bool:
        """The replica is ready and its slow start is over."""
        return backend.snapshot().slots >= self._batch_size

    @property
    def _batch_size(self) -> int:
        """Of the replica that takes the fewest requests at a time."""
        return min(len(PROMPTS) + len(COMPANIONS), *(backend.limit.requests for backend in self.pool.backends))

    async def _undisturbed(self, one: str, other: str) -> Proof:
        """Raises Interrupted, Refused, ExchangeError."""
        needed, loop = asyncio.Event(), asyncio.get_running_loop()

        def check() -> None:
            if self._clients_need_it():
                needed.set()

        def changed() -> None:
            loop.call_soon(check)  # a lease of the test itself is marked as internal only after it was granted

        unsubscribe = self.pool.subscribe(changed)
        proving = asyncio.ensure_future(self._prove(one, other))
        interrupted = asyncio.ensure_future(needed.wait())
        try:
            await asyncio.wait({proving, interrupted}, return_when=asyncio.FIRST_COMPLETED)
            if needed.is_set():
                raise Interrupted
            return proving.result()
        finally:
            unsubscribe()
            interrupted.cancel()
            proving.cancel()
            await asyncio.gather(proving, interrupted, return_exceptions=True)  # the slots are released

    def _clients_need_it(self) -> bool:
        """A client's request is queued or in flight."""
        return bool(self.pool.queued) or any(b.snapshot().inflight for b in self.pool.backends)

    async def _prove(self, one: str, other: str) -> Proof:
        """Raises Interrupted, Refused, ExchangeError."""
        questions = [{"prompt": prompt} for prompt in PROMPTS] + [{"prompt": PROMPTS[0], "temperature": 0.8, "seed": 7}]
        first = [await self._ask(one, question) for question in questions]
        if first != [await self._ask(other, question) for question in questions]:
            return Proof.OFF
        if self._batch_size < 2:
            return Proof.VERIFIED
        batch = [{"prompt": prompt} for prompt in (*PROMPTS, *COMPANIONS)][: self._batch_size]
        tasks = [asyncio.ensure_future(self._ask(other, question, alone=False)) for question in batch]
        try:
            answers = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        return Proof.VERIFIED if answers[:2] == first[:2] else Proof.IDLE_ONLY

    async def _ask(self, backend: str, question: dict[str, Any], *, alone: bool = True) -> str:
        """The answer to ``question``; as a plain completion if chat is refused, e.g. for a model without a chat
        template. Raises Interrupted, Refused, ExchangeError."""
        try:
            return await self._answer(backend, Kind.CHAT, question, alone=alone)
        except Refused:
            return await self._answer(backend, Kind.COMPLETION, question, alone=alone)

    async def _answer(self, backend: str, kind: Kind, question: dict[str, Any], *, alone: bool) -> str:
        """The first choice of the answer, as JSON. Raises Interrupted, Refused, ExchangeError."""
        others = frozenset(b.id for b in self.pool.backends if b.id != backend)
        isolation = Isolation.ALONE if alone else Isolation.SHARED
        request = SlotRequest(exclude=Excluded(backends=others), within=1.0, isolation=isolation)
        lease = await self.pool.acquire(request)
        if not isinstance(lease, Lease):
            raise Interrupted
        lease.internal = True
        exchange = lease.open(_request(kind, question, lease.identity.model))
        alarm = asyncio.get_running_loop().call_later(
            ANSWER_TIMEOUT,
            exchange.abort,
            ExchangeError(Fault.DEADLINE, f"{backend} gave no answer within {ANSWER_TIMEOUT:g} s"),
        )
        aggregator = Aggregator(kind, self.name)
        try:
            head = await exchange.start()
            if head.status != 200:
                raise Refused(f"{backend} answered with status {head.status}")
            source: Source = UnstreamedAnswer(exchange, kind) if is_unstreamed(head) else exchange
            rest = Rest()
            while not aggregator.ended and (
                data := await (rest.read(source) if aggregator.finished else source.read())
            ):
                aggregator.feed(data)
        finally:
            alarm.cancel()
            exchange.close()
            lease.release()
        if aggregator.end().verdict is not Completeness.COMPLETE:
            raise ExchangeError(Fault.INCOMPLETE, f"{backend} gave an incomplete answer")
        (choice, *_) = aggregator.answer()["choices"]
        return json.dumps(choice)


def _request(kind: Kind, question: dict[str, Any], model: str) -> Request:
    options = {key: value for key, value in question.items() if key != "prompt"}
    body = {"model": model, "max_tokens": TOKENS, "temperature": 0, "stream": True, **options}
    body["stream_options"] = {"include_usage": True}
    if kind is Kind.CHAT:
        body["messages"] = [{"role": "user", "content": question["prompt"]}]
        return Request("POST", "/v1/chat/completions", json.dumps(body).encode(), HEADERS)
    body["prompt"] = question["prompt"]
    return Request("POST", "/v1/completions", json.dumps(body).encode(), HEADERS)

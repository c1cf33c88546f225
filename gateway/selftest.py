"""Is a model deterministic over its replicas? Asked once, when two of them are ready and nobody else wants them.

    two prompts and a seeded one, each alone on A and alone on B      equal?   else no resuming
    the two prompts on B, within a batch of four                      equal?   else resuming on an idle replica only

On Metal the same prompt may get another answer within a batch, since other kernels run then; then what was begun in a
batch diverges often, which costs time and nothing else.

It takes slots like everybody, and it steps back: with a request in flight or in line it waits.
"""

import asyncio
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from backends.admission import Lease
from backends.exchange import ExchangeError, Request
from backends.lifecycle import State
from backends.pool import Pool
from gateway.onepiece import read_whole
from gateway.resume import Proof

log = logging.getLogger(__name__)

LOOK_EVERY = 0.5  # seconds
AGAIN_AFTER = 5.0  # seconds after a test that did not come to its end
WITHIN = 120.0  # seconds for one answer
TOKENS = 32
PROMPTS = ("Tell me about a river and its bridge.", "Count the lamps of a small town, one by one, and name each.")
COMPANIONS = ("Why?", "Describe a long winter in the mountains, with snow, wind, wolves and a fire that will not burn.")
HEADERS = ((b"content-type", b"application/json"),)


class Interrupted(Exception):
    """Somebody else needed the replicas, or one of them failed."""


@dataclass(frozen=True, slots=True)
class SelfTest:
    """``model``: the name that the replicas know; ``settle`` is told the result."""

    name: str
    pool: Pool
    model: str
    width: int  # requests at a time, for each replica
    settle: Callable[[Proof], None]

    async def run(self) -> None:
        if len(self.pool.backends) < 2:
            self.settle(Proof.SINGLE)
            return
        self.settle(Proof.PENDING)
        while True:
            one, other = await self._free()
            try:
                proof = await self._prove(one, other)
            except (Interrupted, ExchangeError) as error:
                log.info("self-test interrupted", extra={"model": self.name, "reason": str(error)})
                await asyncio.sleep(AGAIN_AFTER)
                continue
            log.info("self-test", extra={"model": self.name, "resume": proof.value})
            self.settle(proof)
            return

    async def _free(self) -> tuple[str, str]:
        """Two replicas that are ready and idle, with nobody in line."""
        while True:
            free = [b.id for b in self.pool.backends if b.state is State.READY and b.responsive and not b.inflight]
            if len(free) >= 2 and not self.pool.queued:
                return free[0], free[1]
            await asyncio.sleep(LOOK_EVERY)

    async def _prove(self, one: str, other: str) -> Proof:
        """Raises Interrupted, ExchangeError."""
        questions = [{"prompt": prompt} for prompt in PROMPTS] + [{"prompt": PROMPTS[0], "temperature": 0.8, "seed": 7}]
        first = [await self._ask(one, question) for question in questions]
        if first != [await self._ask(other, question) for question in questions]:
            return Proof.OFF
        crowd = min(4, self.width)
        if crowd < 2:
            return Proof.VERIFIED
        together = [{"prompt": prompt} for prompt in (*PROMPTS, *COMPANIONS)][:crowd]
        tasks = [asyncio.ensure_future(self._ask(other, question, alone=False)) for question in together]
        try:
            answers = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        return Proof.VERIFIED if answers[:2] == first[:2] else Proof.IDLE_ONLY

    async def _ask(self, backend: str, question: dict[str, Any], *, alone: bool = True) -> str:
        others = frozenset(b.id for b in self.pool.backends if b.id != backend)
        lease = await self.pool.acquire(exclude=others, within=1.0, alone=alone)
        if not isinstance(lease, Lease):
            raise Interrupted(f"{backend} is not free")
        exchange = lease.open(self._request(question), mute=True)
        try:
            async with asyncio.timeout(WITHIN):
                head = await exchange.start()
                body = await read_whole(exchange)
        except TimeoutError:
            raise Interrupted(f"{backend} did not answer") from None
        finally:
            exchange.close()
            lease.release()
        if head.status != 200:
            raise Interrupted(f"{backend} answered with status {head.status}")
        try:
            message = json.loads(body)["choices"][0]["message"]
            return f"{message.get('reasoning')} {message['content']}"
        except (ValueError, KeyError, IndexError, TypeError):
            raise Interrupted(f"{backend} gave no answer") from None

    def _request(self, question: dict[str, Any]) -> Request:
        messages = [{"role": "user", "content": question["prompt"]}]
        body = {"model": self.model, "messages": messages, "max_tokens": TOKENS, "temperature": 0, "stream": False}
        body |= {key: value for key, value in question.items() if key != "prompt"}
        return Request("POST", "/v1/chat/completions", json.dumps(body).encode(), HEADERS)

"""Fan-out: one client request that becomes several upstream requests, for ``n`` choices and lists of prompts.

mlx_lm.server ignores ``n``, and a list of prompts kills its generation thread. So each choice of each prompt is a
request of its own, with its own slot, failover and verdict; all of them write to one client. A stream interleaves their
chunks under one id; a JSON answer is assembled when the last part is complete. If one part fails for good, all fail:
the client gets one error, not an incomplete answer.
"""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from gateway.api.errors import GatewayError
from gateway.api.json_codec import dumps, loads
from gateway.forward.responders import Responder
from gateway.forward.sink import Header, Sink
from gateway.forward.usage import usage_of
from gateway.request import ParsedRequest
from gateway.stream.relay import Identity, Part, usage_event

Json = dict[str, Any]
DONE = b"data: [DONE]\n\n"


class Branch:
    """The sink of one part: stores a whole answer, passes stream data on to the client."""

    def __init__(self, client: Sink, parsed: ParsedRequest, part: Part) -> None:
        self.parsed = parsed
        self.part = part
        self.request_id = client.request_id
        self.body: Json = {}
        self._client = client

    @property
    def headers_sent(self) -> bool:
        return self._client.headers_sent

    @property
    def extra(self) -> list[Header]:
        return self._client.extra

    @extra.setter
    def extra(self, headers: list[Header]) -> None:
        """The headers of the part that began last, until the head is sent."""
        self._client.extra = headers

    @property
    def ready(self) -> bool:
        return self._client.ready

    async def write(self, data: bytes) -> None:
        await self._client.write(data)

    def push(self, data: bytes) -> None:
        self._client.push(data)

    def waits(self, told: Callable[[], str]) -> Callable[[], None]:
        return self._client.waits(told)

    async def finish(self) -> None:
        """No-op: ``Fanout.run`` finishes the stream when all parts have ended."""

    async def answer(self, _status: int, body: bytes) -> None:
        self.body = loads(body)

    async def fail(self, error: GatewayError) -> None:
        """No-op: ``Fanout.run`` sends the error once."""


Run = Callable[[Branch], Coroutine[Any, Any, GatewayError | None]]
ResponderOf = Callable[[Branch], Responder]


class Fanout:
    """``width``: how many parts may be in flight at once; the others wait here, not in the model's queue."""

    def __init__(self, client: Sink, parsed: ParsedRequest, *, width: int) -> None:
        self._client = client
        self._parsed = parsed
        self._slots = asyncio.Semaphore(width)
        self._identity = Identity()
        self.branches = [self._branch(i, part) for i, part in enumerate(parsed.parts)]

    def first_of(self, branch: Branch) -> Branch:
        """The first branch with the same prompt."""
        return self.branches[branch.part.index - branch.part.index % self._parsed.copies]

    def _branch(self, index: int, changes: Any) -> Branch:
        params = {**self._parsed.params, **changes}
        chars = len(changes["prompt"]) if "prompt" in changes else self._parsed.prompt_chars
        parsed = replace(self._parsed, params=params, prompt_chars=chars, parts=(), copies=1)
        return Branch(self._client, parsed, Part(index, self._identity))

    async def run(self, run: Run, responder: ResponderOf, model: str) -> GatewayError | None:
        """``run`` answers one part; ``responder`` gives the responder of a part; ``model``: the name in the answer."""
        error = await self._all(run, responder)
        if error is not None:
            await self._client.fail(error)
            return error
        counted = self._counted([responder(branch).usage for branch in self.branches])
        if self._parsed.stream:
            await self._client.write(self._last(counted, model))
            await self._client.finish()
        else:
            await self._client.answer(200, dumps(self._merged(counted)))
        return None

    async def _all(self, run: Run, responder: ResponderOf) -> GatewayError | None:
        """The first error cancels the other parts; so does a cancellation."""
        loop = asyncio.get_running_loop()
        tasks: list[asyncio.Task[GatewayError | None]] = []
        begun: dict[Branch, asyncio.Event] = {}  # by the first branch of each prompt
        for branch in self.branches:
            first = self.first_of(branch)
            waits_for = begun.get(first)
            task = loop.create_task(self._in_turn(run, branch, waits_for))  # in ``tasks``, and cancelled below
            if waits_for is None:
                event = begun[branch] = asyncio.Event()
                responder(branch).on_first_content = event.set
                task.add_done_callback(partial(_let_copies_begin, event))
            tasks.append(task)
        waiting = set(tasks)
        try:
            while waiting:
                done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    if (error := task.result()) is not None:
                        return error
            return None
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)  # each releases its slot

    async def _in_turn(self, run: Run, branch: Branch, waits_for: asyncio.Event | None) -> GatewayError | None:
        """Copies of one prompt wait until the first of them has content, or was answered: a prompt that kills backends
        then kills no more of them than a single request would; any other prompt is then in the prompt cache."""
        if waits_for is not None:
            await waits_for.wait()
        async with self._slots:
            return await run(branch)

    def _merged(self, usage: Json | None) -> Json:
        answer = dict(self.branches[0].body)
        answer["choices"] = [
            {**choice, "index": branch.part.index} for branch in self.branches for choice in branch.body["choices"]
        ]
        if usage is not None:
            answer["usage"] = usage
        return answer

    def _last(self, usage: Json | None, model: str) -> bytes:
        if usage is None or not self._parsed.include_usage:
            return DONE
        return usage_event(self._parsed.kind, self._identity, model, usage) + DONE

    def _counted(self, each: Sequence[Json | None]) -> Json | None:
        """The sum of the usages; the tokens of a prompt count once, however many choices it has."""
        if any(usage is None for usage in each):
            return None
        usages = [usage_of(usage) for usage in each]
        prompt = sum(usage.prompt for usage in usages[:: self._parsed.copies])
        answer = sum(usage.answer for usage in usages)
        return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}


def _let_copies_begin(event: asyncio.Event, first: "asyncio.Task[GatewayError | None]") -> None:
    """Not after an error: it ends all parts, so the copies must not begin."""
    if not first.cancelled() and first.exception() is None and first.result() is None:
        event.set()

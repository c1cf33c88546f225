"""The three ways a client is answered. What the upstream sends goes in, what the client gets goes out.

    Streamed     the client asked for a stream
    Assembled    it did not: the upstream streams all the same, and the answer is put together here
    Whole        it wants log probabilities: mlx_lm.server leaves them out of streams, so this one is no stream upstream

All have the same shape: ``attempt`` begins anew, ``take`` reads one exchange to its end and says how it ended,
``deliver`` completes the answer, when the slot has been given back. Only ``Streamed`` sends anything before
``deliver``.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from gateway.api.json_codec import dumps, loads
from gateway.forward.sink import Sink
from gateway.request import ParsedRequest
from gateway.stream.aggregate import Aggregator, completeness, fix_json
from gateway.stream.interpreter import Completeness, End, Json, UpstreamError, find_error
from gateway.stream.relay import Part, Relay, Seen
from gateway.stream.whole_answer import Source, read_whole

MAX_UNPARSED = 64 << 10  # bytes of an answer that are kept until they are looked at together
END_OR_ERROR = re.compile(rb"\[DONE\]|error")
LONGEST_MARK = 6  # bytes; one may be cut in two

COMMENTS_AFTER = 0.5  # seconds of an attempt before the upstream's progress comments commit the client to a 200

Clock = Callable[[], float]


class Responder(Protocol):
    """``first_content_at``: the event loop's time of the first content sent to, or kept for, the client;
    ``on_first_content`` is called then.

    ``replay``: what can go on with an answer of which the client has a part; ``catch_up``: the seconds that it took to
    be generated so far, None = nothing can go on with it.
    """

    upstream_streams: bool
    first_content_at: float | None
    on_first_content: Callable[[], None] | None

    @property
    def replay(self) -> Relay | None: ...

    @property
    def catch_up(self) -> float | None: ...

    @property
    def seen(self) -> Seen: ...

    @property
    def usage(self) -> Json | None: ...

    @property
    def answered(self) -> bool:
        """This attempt has produced something."""
        ...

    @property
    def progress(self) -> tuple[int, int] | None:
        """Tokens of the prompt, processed and in all, as the backend reported last."""
        ...

    def attempt(self, model: str) -> None: ...

    async def take(self, source: Source) -> End:
        """Raises ExchangeError."""
        ...

    def end(self) -> End:
        """As far as it came: a stream that breaks after its finish_reason was whole."""
        ...

    async def deliver(self, rest: bytes, /) -> None:
        """``rest``: what a stream still lacks, ``End.data``."""
        ...


def responder_for(
    client: Sink, parsed: ParsedRequest, clock: Clock, part: Part | None = None, *, remember: bool = False
) -> Responder:
    """``part``: which of several answers of one request this is; None = the only one. ``remember``: what is delivered,
    so that another upstream can go on with it."""
    if parsed.stream:
        return Streamed(client, parsed, clock, part, remember=remember)
    return Whole(client, parsed, clock) if parsed.wants_logprobs else Assembled(client, parsed, clock)


class Streamed:
    """Nothing of an attempt reaches the client before its content does, but comments."""

    upstream_streams = True

    def __init__(
        self, client: Sink, parsed: ParsedRequest, clock: Clock, part: Part | None = None, *, remember: bool = False
    ) -> None:
        self._client = client
        self._clock = clock
        self._relay = Relay(parsed.kind, parsed.model, include_usage=parsed.include_usage, part=part, remember=remember)
        self.first_content_at: float | None = None
        self.on_first_content: Callable[[], None] | None = None
        self._asked = clock()
        self._took = 0.0  # seconds of waiting for what came
        self._timed = False

    @property
    def replay(self) -> Relay:
        return self._relay

    @property
    def catch_up(self) -> float | None:
        return self._took if self._relay.resumable else None

    @property
    def seen(self) -> Seen:
        return self._relay.state

    @property
    def usage(self) -> Json | None:
        return self._relay.usage

    @property
    def answered(self) -> bool:
        return self._relay.answered

    @property
    def progress(self) -> tuple[int, int] | None:
        return self._relay.progress

    def attempt(self, model: str) -> None:
        self._asked = self._clock()
        self._took = 0.0
        self._relay.attempt(model)

    async def take(self, source: Source) -> End:
        relay, client = self._relay, self._client
        comments_from = self._clock() + COMMENTS_AFTER
        self._timed = relay.resumable
        while not relay.ended and (data := await source.read(self._at_once)):
            if self._timed:
                self._took += self._clock() - self._asked
            out = relay.feed(data)
            if out.data:
                if self.first_content_at is None:
                    self.first_content_at = self._clock()
                    if self.on_first_content is not None:
                        self.on_first_content()
                if relay.state is Seen.DONE:
                    return replace(relay.end(), data=out.data)  # the slot is not held while the client takes it
                await client.write(out.data)
            elif out.comments and (client.headers_sent or self._clock() >= comments_from):
                relay.opened()
                await client.write(out.comments)
            if self._timed:
                self._asked = self._clock()  # the time that the client takes does not count
        return relay.end()

    def _at_once(self, data: bytes) -> bool:
        """More text, for a client that takes it: nearly all of a stream. It goes out from where it comes in."""
        if self.first_content_at is None or not self._client.ready or not (out := self._relay.again(data)):
            return False
        if self._timed:
            now = self._clock()
            self._took += now - self._asked
            self._asked = now
        self._client.push(out)
        return True

    def end(self) -> End:
        return self._relay.end()

    async def deliver(self, rest: bytes) -> None:
        if rest:
            await self._client.write(rest)
        await self._client.finish()


class Assembled:
    upstream_streams = True
    replay = catch_up = None  # the client has nothing: any attempt is as good as the first

    def __init__(self, client: Sink, parsed: ParsedRequest, clock: Clock) -> None:
        self._client = client
        self._clock = clock
        self._aggregator = Aggregator(parsed.kind, parsed.model)
        self._kept = bytearray()  # not looked at yet
        self.first_content_at: float | None = None
        self.on_first_content: Callable[[], None] | None = None

    @property
    def seen(self) -> Seen:
        return self._aggregator.state

    @property
    def usage(self) -> Json | None:
        self._look()
        return self._aggregator.usage

    @property
    def answered(self) -> bool:
        return self._aggregator.answered

    @property
    def progress(self) -> tuple[int, int] | None:
        return self._aggregator.progress

    def attempt(self, model: str) -> None:
        self.first_content_at = None
        self._kept.clear()
        self._aggregator.attempt(model)

    async def take(self, source: Source) -> End:
        while not self._aggregator.ended and (data := await source.read(self._keep)):
            self._kept += data
            self._look()
            if self.first_content_at is None and self._aggregator.answered:
                self.first_content_at = self._clock()
                if self.on_first_content is not None:
                    self.on_first_content()
        return self.end()

    def _keep(self, data: bytes) -> bool:
        """No client waits for a part of the answer: what follows its first text is kept until there is much of it, or
        what may be its end, or an error. It costs no task switch then, and most of it no parsing."""
        kept = self._kept
        if (
            self.first_content_at is None
            or len(kept) > MAX_UNPARSED
            or END_OR_ERROR.search(bytes(kept[1 - LONGEST_MARK :]) + data)
        ):
            return False
        kept += data
        return True

    def _look(self) -> None:
        if self._kept:
            data = bytes(self._kept)
            self._kept.clear()
            self._aggregator.feed(data)

    def end(self) -> End:
        self._look()
        return self._aggregator.end()

    async def deliver(self, _rest: bytes) -> None:
        await self._client.answer(200, dumps(self._aggregator.answer()))


class Whole:
    upstream_streams = False
    seen = Seen.WAITING
    replay = catch_up = None
    progress = None  # it says nothing before its end

    def __init__(self, client: Sink, parsed: ParsedRequest, clock: Clock) -> None:
        self._client = client
        self._kind = parsed.kind
        self._clock = clock
        self.first_content_at: float | None = None
        self.on_first_content: Callable[[], None] | None = None
        self.attempt(parsed.model)

    @property
    def answered(self) -> bool:
        return bool(self._answer)

    @property
    def usage(self) -> Json | None:
        usage = self._answer.get("usage")
        return usage if isinstance(usage, dict) else None

    def attempt(self, model: str) -> None:
        self._model = model
        self._answer: Json = {}
        self._error: UpstreamError | None = None
        self.first_content_at = None

    async def take(self, source: Source) -> End:
        body = await read_whole(source)
        self.first_content_at = self._clock()
        try:
            answer = loads(body)
        except ValueError:
            return self.end()
        if isinstance(answer, dict):
            self._error = find_error(answer)
            if completeness(answer):
                self._answer = fix_json(answer, self._kind, self._model)
        return self.end()

    def end(self) -> End:
        if self._error is not None:
            return End(Completeness.FAILED, error=self._error)
        return End(Completeness.COMPLETE if self._answer else Completeness.TRUNCATED)

    async def deliver(self, _rest: bytes) -> None:
        await self._client.answer(200, dumps(self._answer))

"""The three ways to answer a client: each reads what the upstream sends, and writes what the client gets.

    Streamed     the client asked for a stream
    Assembled    the client did not; the upstream streams nevertheless, and the answer is assembled here
    Whole        the client wants log probabilities: mlx_lm.server omits them from streams, so the upstream request is
                 no stream

All have the same interface: ``attempt`` starts over, ``take`` reads one exchange to its end and returns how it ended,
``deliver`` completes the answer after the slot was released. Only ``Streamed`` sends anything before ``deliver``.
"""

import asyncio
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Protocol

from gateway.api.json_codec import dumps, loads
from gateway.api.kinds import Kind
from gateway.forward.linger import Rest, until_json_ends
from gateway.forward.sink import Sink
from gateway.request import ParsedRequest
from gateway.request.size import LARGE
from gateway.stream.aggregate import Aggregator, fix_json, whole_answer
from gateway.stream.error_shapes import UpstreamError
from gateway.stream.interpreter import Completeness, End, Json
from gateway.stream.lost_calls import Ending
from gateway.stream.relay import Part, Relay, Seen
from gateway.stream.unstreamed import Source, read_whole

MAX_UNPARSED = 32 << 10  # bytes of an answer that are collected before they are parsed, in one go
FINISH = re.compile(rb'_reason"\s{0,2}:\s{0,2}"[^"]')
LONGEST_MARK = 15  # bytes of the longest mark of ``may_end``; a mark may be split over two pieces

COMMENTS_AFTER = 1.0  # seconds of a request until the upstream's comments are passed on, which commits to a 200

Clock = Callable[[], float]


class Responder(Protocol):
    """``first_content_at``: event loop's time of the first content sent to, or stored for, the client;
    ``on_first_content`` is called then.

    ``replay``: the relay that can resume an answer of which the client has a part; ``catch_up``: seconds that the
    delivered part took to generate, None = the answer cannot be resumed.
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
        """This attempt has produced content."""
        ...

    @property
    def finished(self) -> bool:
        """This attempt has its whole answer; what may follow is waited for briefly."""
        ...

    @property
    def progress(self) -> tuple[int, int] | None:
        """Prompt tokens processed, and in total, as the backend last reported."""
        ...

    def attempt(self, model: str, found: int | None = None) -> None:
        """``found``: tokens of the prompt that were cached when the request came; None = as the upstream counts."""
        ...

    async def take(self, source: Source) -> End:
        """Raises ExchangeError."""
        ...

    def end(self) -> End:
        """How the attempt ended, as far as it was read: a stream that breaks after its finish_reason is complete."""
        ...

    def retract(self) -> None:
        """What ``take`` returned last is not to be delivered: the answer was found to lack something."""
        ...

    async def deliver(self, rest: bytes, /) -> None:
        """``rest``: the end of a stream, ``End.data``."""
        ...


def responder_for(
    client: Sink, parsed: ParsedRequest, clock: Clock, part: Part | None = None, *, remember: bool = False
) -> Responder:
    """``part``: which of several answers of one request this is; None = the only one. ``remember``: store what is
    delivered, so that the answer can be resumed on another instance."""
    if parsed.stream:
        return Streamed(client, parsed, clock, part, remember=remember)
    return Whole(client, parsed, clock) if parsed.wants_logprobs else Assembled(client, parsed, clock)


def may_end(data: bytes) -> bool:
    """The end of an answer may be in it, or an error: an event that is no chunk, or tells of one."""
    return b"[DONE]" in data or b"error" in data or b'"choices"' not in data or FINISH.search(data) is not None


def asks_for_tools(parsed: ParsedRequest) -> bool:
    return bool(parsed.params.get("tools")) and parsed.params.get("tool_choice") != "none"


class Streamed:
    """Before the first content of an attempt the client gets only comments."""

    upstream_streams = True

    def __init__(
        self, client: Sink, parsed: ParsedRequest, clock: Clock, part: Part | None = None, *, remember: bool = False
    ) -> None:
        self._client = client
        self._clock = clock
        self._relay = Relay(
            parsed.kind,
            parsed.model,
            include_usage=parsed.include_usage,
            part=part,
            remember=remember,
            tools=asks_for_tools(parsed),
        )
        self._delivered = self._relay.state  # while the last bytes are given out and not written
        self.first_content_at: float | None = None
        self.on_first_content: Callable[[], None] | None = None
        self._waiting_since = clock()
        self._comments_from = self._waiting_since + COMMENTS_AFTER
        self._waited = 0.0  # seconds spent waiting for the upstream
        self._timed = False

    @property
    def replay(self) -> Relay:
        return self._relay

    @property
    def catch_up(self) -> float | None:
        return self._waited if self._relay.resumable else None

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
    def finished(self) -> bool:
        return self._relay.finished

    @property
    def progress(self) -> tuple[int, int] | None:
        return self._relay.progress

    def attempt(self, model: str, found: int | None = None) -> None:
        self._waiting_since = self._clock()
        self._waited = 0.0
        self._relay.attempt(model, found)

    async def take(self, source: Source) -> End:
        relay, client, rest = self._relay, self._client, Rest()
        self._timed = relay.resumable
        while not relay.ended and (data := await (rest.read(source) if relay.finished else source.read(self._at_once))):
            if self._timed:
                self._waited += self._clock() - self._waiting_since
            self._delivered = relay.state
            out = relay.feed(data)
            if out.data:
                if self.first_content_at is None:
                    self.first_content_at = self._clock()
                    if self.on_first_content is not None:
                        self.on_first_content()
                if relay.state is Seen.DONE:
                    return replace(relay.end(), data=out.data)  # release the slot before the client has read it
                await client.write(out.data)
            elif out.comments and (client.headers_sent or self._clock() >= self._comments_from):
                relay.opened()
                await client.write(out.comments)
            if self._timed:
                self._waiting_since = self._clock()  # the time that the client takes to read does not count
        return self.end()

    def _at_once(self, data: bytes) -> bool:
        """Pass on more text in the callback that received it, if the client connection is ready: nearly all of a
        stream. False: ``data`` was not taken."""
        if self.first_content_at is None or not self._client.ready or not (out := self._relay.again(data)):
            return False
        if self._timed:
            now = self._clock()
            self._waited += now - self._waiting_since
            self._waiting_since = now
        self._client.push(out)
        return True

    def end(self) -> End:
        if self._relay.state is not Seen.DONE:
            self._delivered = self._relay.state
        return self._relay.end()

    def retract(self) -> None:
        self._relay.retract(self._delivered)
        if self._delivered is not Seen.SPEAKING:
            self.first_content_at = None

    async def deliver(self, rest: bytes) -> None:
        if rest:
            await self._client.write(rest)
        await self._client.finish()


class Assembled:
    upstream_streams = True
    replay = catch_up = None  # the client has nothing yet: a new attempt can start over

    def __init__(self, client: Sink, parsed: ParsedRequest, clock: Clock) -> None:
        self._client = client
        self._clock = clock
        self._aggregator = Aggregator(parsed.kind, parsed.model, tools=asks_for_tools(parsed))
        self._unparsed = bytearray()
        self.first_content_at: float | None = None
        self.on_first_content: Callable[[], None] | None = None

    @property
    def seen(self) -> Seen:
        return self._aggregator.state

    @property
    def usage(self) -> Json | None:
        self._parse()
        return self._aggregator.usage

    @property
    def answered(self) -> bool:
        return self._aggregator.answered

    @property
    def finished(self) -> bool:
        return self._aggregator.finished

    @property
    def progress(self) -> tuple[int, int] | None:
        return self._aggregator.progress

    def attempt(self, model: str, found: int | None = None) -> None:
        self.first_content_at = None
        self._unparsed.clear()
        self._aggregator.attempt(model, found)

    async def take(self, source: Source) -> End:
        aggregator, rest = self._aggregator, Rest()
        while not aggregator.ended and (
            data := await (rest.read(source) if aggregator.finished else source.read(self._keep))
        ):
            self._unparsed += data
            self._parse()
            if self.first_content_at is None and aggregator.answered:
                self.first_content_at = self._clock()
                if self.on_first_content is not None:
                    self.on_first_content()
        return self.end()

    def _keep(self, data: bytes) -> bool:
        """Collect data after the first content unparsed, until there is much of it, or it may contain the end or an
        error: no client waits for a part of the answer. That saves task switches and most of the parsing."""
        unparsed = self._unparsed
        if (
            self.first_content_at is None
            or len(unparsed) + len(data) > MAX_UNPARSED
            or may_end(bytes(unparsed[1 - LONGEST_MARK :]) + data)
        ):
            return False
        unparsed += data
        return True

    def _parse(self) -> None:
        if self._unparsed:
            data = bytes(self._unparsed)
            self._unparsed.clear()
            self._aggregator.feed(data)

    def end(self) -> End:
        self._parse()
        return self._aggregator.end()

    def retract(self) -> None:
        pass  # nothing is delivered before the end

    async def deliver(self, _rest: bytes) -> None:
        await self._client.answer(200, dumps(self._aggregator.answer()))


def _judged(body: bytes, kind: Kind, model: str) -> tuple[bytes, Json | None, Ending | UpstreamError | None]:
    """A whole answer as the client gets it, and its usage; else b"", and the error in it, if it has one."""
    try:
        answer = loads(body)
    except ValueError:
        return b"", None, None
    judged = whole_answer(answer, kind)
    if not isinstance(judged, Ending):
        return b"", None, judged
    fixed = fix_json(answer, kind, model)
    usage = fixed.get("usage")
    return dumps(fixed), usage if isinstance(usage, dict) else None, judged


class Whole:
    upstream_streams = False
    seen = Seen.WAITING
    replay = catch_up = None
    progress = None  # a plain answer reports no progress
    finished = False

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
        return self._usage

    def attempt(self, model: str, _found: int | None = None) -> None:
        """Prompts of such answers are not read in slices."""
        self._model = model
        self._answer = b""
        self._usage: Json | None = None
        self._error: UpstreamError | None = None
        self._ending = Ending()
        self.first_content_at = None

    async def take(self, source: Source) -> End:
        body = await read_whole(source, more=until_json_ends)
        self.first_content_at = self._clock()
        judge = partial(_judged, body, self._kind, self._model)
        self._answer, self._usage, judged = await asyncio.to_thread(judge) if len(body) > LARGE else judge()
        if isinstance(judged, Ending):
            self._ending = judged
        self._error = judged if isinstance(judged, UpstreamError) else None
        return self.end()

    def end(self) -> End:
        if self._error is not None:
            return End(Completeness.FAILED, error=self._error)
        return End(Completeness.COMPLETE if self._answer else Completeness.TRUNCATED, ending=self._ending)

    def retract(self) -> None:
        pass

    async def deliver(self, _rest: bytes) -> None:
        await self._client.answer(200, self._answer)

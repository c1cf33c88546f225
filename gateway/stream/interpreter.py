"""What an upstream's stream has shown: the one place that interprets it, for the relay and for the aggregator.

One ``StreamInterpreter`` per attempt. It turns bytes into chunks (parsed, checked, with no error among them) and keeps
what is needed to say, when the body ends, whether the answer was whole. A clean end of the body says nothing about
that: mlx_lm.server's is close-delimited, so a killed server and a finished one look the same on the wire.

    COMPLETE   every choice had a finish_reason, or ``[DONE]`` came after content
    EMPTY      ``[DONE]``, but no content and no finish_reason
    FAILED     an error event, or something that is not this protocol
    TRUNCATED  none of these

A finish_reason is a text with something in it: there are servers that send ``""`` in every chunk. One that claims a
tool call where none came is a failure: mlx_lm.server drops a call that it cannot parse, with a warning in its log only.

Caveat: servers put errors into a 200 stream in many shapes (``error_shapes``), and SDKs take most of them for success.

Pure: no I/O, no clock.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

from gateway.api.json_codec import loads
from gateway.api.kinds import Kind
from gateway.stream.chunk_fields import (
    MAX_DEPTH,
    BadField,
    cached_at_most,
    named_calls,
    tidy_choice,
    tidy_usage,
    too_deep,
)
from gateway.stream.error_shapes import (
    UpstreamError,
    bare_error,
    event_error,
    failed_event,
    find_error,
    foreign,
    not_this_protocol,
    show,
)
from gateway.stream.lost_calls import CLAIMS_CALL, MAX_TEXT_CHARS, MAX_TEXTS, Ending, ends_in_markup
from gateway.stream.sse import END, MAX_EVENT, Event, EventTooLarge, Framer, read
from gateway.stream.template import ChunkTemplate, Repeats, template_of

Json = dict[str, Any]

_PROGRESS = re.compile(rb"keepalive (\d{1,15})/(\d{1,15})")  # mlx_lm.server, one for each prefill step
_MAX_TEMPLATES = 8  # tried in one stream: where each chunk is different it does not pay


class Completeness(StrEnum):
    COMPLETE = "complete"
    TRUNCATED = "truncated"
    EMPTY = "empty"
    FAILED = "failed"


class Output(NamedTuple):
    """What to send to the client now: data events, and apart from them comments. ``failure``: this attempt is over."""

    data: bytes = b""
    comments: bytes = b""
    failure: UpstreamError | None = None


@dataclass(frozen=True, slots=True)
class End:
    """``data`` is what the client still lacks; ``error`` is set where the verdict is FAILED."""

    verdict: Completeness
    data: bytes = b""
    error: UpstreamError | None = None
    ending: Ending = field(default=Ending(), compare=False)


class LostCall(Exception):
    """The answer claims a tool call that is not in it. ``str``: its finish_reason."""


class StreamInterpreter:
    """Of one attempt at one choice: ``n`` choices are as many requests (``forward.fanout``). ``tools``: the request
    asked for some, so that the text is kept to look for tool markup at its end. ``found``: tokens of its prompt that
    were in the prompt cache when it came, None = as the upstream counts; the rest of what the upstream found it has
    read for this request before (``policy.slicing``)."""

    def __init__(
        self, kind: Kind, max_event: int = MAX_EVENT, *, tools: bool = False, found: int | None = None
    ) -> None:
        self._kind = kind
        self._found = found
        self._text: list[str] | None = [] if tools else None
        self._text_chars = 0
        self._framer = Framer(max_event)
        self._seen: set[int] = set()
        self._open: set[int] = set()  # choices without a finish_reason yet
        self._called: set[int] = set()  # choices with a tool call
        self._finish_reason: str | None = None
        self._foreign: UpstreamError | None = None  # what a chunk may have reported that is not of this protocol
        self._hollow = False  # a chunk of a choice, not its first, said nothing
        self._comments: list[bytes] = []
        self._templates_left = _MAX_TEMPLATES
        self._template: ChunkTemplate | None = None  # what most chunks are like
        self.whole = False  # every chunk is wanted parsed
        self.spoken = 0  # chunks with text, about one for each token
        self.answered = False  # content, or a finish_reason: an empty answer is an answer
        self.done = False  # [DONE]
        self.error: UpstreamError | None = None
        self.usage: Json | None = None
        self.progress: tuple[int, int] | None = None  # tokens of the prompt: processed, total

    @property
    def ended(self) -> bool:
        """Nothing more is to be expected: whatever still comes is ignored."""
        return self.done or self.error is not None

    @property
    def finished(self) -> bool:
        """Every choice has its finish_reason: what may follow (usage, ``[DONE]``) is not needed."""
        return bool(self._seen) and not self._open

    @property
    def called(self) -> bool:
        """A tool call has come."""
        return bool(self._called)

    @property
    def ending(self) -> Ending:
        made = (self.usage or {}).get("completion_tokens")
        withheld = max(0, made - self.spoken) if isinstance(made, int) else None
        markup = self._text is not None and ends_in_markup("".join(self._text))
        return Ending(self._finish_reason, bool(self._called), withheld, self.spoken > 0, markup, self._hollow)

    def repeats(self, data: bytes) -> Repeats | None:
        """The chunks, where all of what came is like the last; else None, and ``chunks`` has to look."""
        if self._template is None or self.ended or not self._framer.between_events:
            return None
        raws = data.split(END)
        if raws.pop():
            return None  # its end is still to come
        found = self._template.run(raws)
        if found is None or len(found.texts) != len(raws):
            return None
        self._note_texts(found)
        return found

    def chunks(self, data: bytes) -> Iterator[Json | Repeats]:
        """To be exhausted. The attributes are up to date for each chunk when it is given out."""
        self._comments.clear()
        raws, overflow = self._frame(data)
        at = 0
        while at < len(raws):
            if self._template is not None and (found := self._template.run(raws, at)):
                self._note_texts(found)
                yield found
                at += len(found.texts)
                continue
            event = read(raws[at])
            at += 1
            if event.comment is not None:
                self._note(event.comment)
            if event.bare is not None and (error := bare_error(event.bare)) is not None:
                self.error = error
                return
            if event.data is None and not failed_event(event.event):
                continue
            chunk = self._interpret(event)
            if chunk is not None:
                yield chunk
            if self.ended:
                return
        if overflow is not None:
            self.error = overflow

    def _note_texts(self, found: Repeats) -> None:
        self.spoken += len(found.texts)
        if self._text is not None and found.template.field == "content":
            self._keep_text(found.texts)

    def _keep_text(self, texts: list[str]) -> None:
        if self._text is None:
            return
        self._text += texts
        self._text_chars += sum(map(len, texts))
        if self.spoken > MAX_TEXTS or self._text_chars > MAX_TEXT_CHARS:
            self._text = None

    def _learn(self, data: bytes, chunk: Json) -> None:
        """From a chunk that was found good, and is not one of the last."""
        if self.answered and self._open and self._templates_left and not self.whole and not chunk.get("usage"):
            self._templates_left -= 1
            self._template = template_of(data, self._kind) or self._template

    def comments(self) -> bytes:
        """The comments among the bytes given last, as events of their own."""
        if not self._comments:
            return b""
        return b"".join(b": " + text.replace(b"\n", b"\n: ") + b"\n\n" for text in self._comments)

    def verdict(self) -> Completeness:
        if self.error is not None:
            return Completeness.FAILED
        if self.done:
            if self._foreign is not None and not self.finished:
                self.error = self._foreign
                return Completeness.FAILED
            return Completeness.COMPLETE if self.answered else Completeness.EMPTY
        if self.finished:
            return Completeness.COMPLETE
        self.error = _last_words(self._framer.rest)
        return Completeness.FAILED if self.error is not None else Completeness.TRUNCATED

    def _frame(self, data: bytes) -> tuple[list[bytes], UpstreamError | None]:
        if self.ended:
            return [], self.error
        try:
            return self._framer.feed(data), None
        except EventTooLarge as exc:
            return exc.events, not_this_protocol(str(exc))

    def reject(self, what: str) -> None:
        """The reader of the chunks cannot make anything of one: the attempt has failed."""
        self.error = not_this_protocol(what)

    def _note(self, comment: bytes) -> None:
        self._comments.append(comment)
        if match := _PROGRESS.search(comment):
            self.progress = (int(match[1]), int(match[2]))

    def _interpret(self, event: Event) -> Json | None:
        data = event.data or b""
        if event.event and failed_event(event.event):
            self.error = event_error(data)
            return None
        if data.startswith(b"[DONE]"):
            self.done = True
            return None
        if not data or data.isspace():  # "data:" alone serves some as a heartbeat
            return None
        chunk = self._parsed(data)
        if chunk is None:
            return None
        self._foreign = foreign(chunk) or self._foreign
        self.error = self._absorb(chunk)
        if self.error is not None:
            return None
        self._learn(data, chunk)
        chunk.pop("error", None)  # null or empty; the Vercel SDK takes even a null for an error
        return chunk

    def _parsed(self, data: bytes) -> Json | None:
        """None: ``error`` says why."""
        try:
            chunk = loads(data)
        except ValueError:
            self.reject(f"an event that is not JSON: {show(data)}")
            return None
        if not isinstance(chunk, dict):
            self.reject(f"an event that is not an object: {show(data)}")
            return None
        if (error := find_error(chunk)) is not None:
            self.error = error
            return None
        if data.count(b"[") + data.count(b"{") > MAX_DEPTH and too_deep(chunk):
            self.reject("a chunk that is nested too deeply")
            return None
        return chunk

    def _absorb(self, chunk: Json) -> UpstreamError | None:
        if "usage" in chunk:
            usage = tidy_usage(chunk["usage"])
            usage = chunk["usage"] = usage if self._found is None else cached_at_most(usage, self._found)
            self.usage = usage or self.usage
        choices = chunk.get("choices")
        if not choices:
            choices = chunk["choices"] = []
        if not isinstance(choices, list):
            return not_this_protocol("a chunk whose choices are not a list")
        try:
            for choice in choices:
                tidy_choice(choice, self._kind, first=not self.answered)
                self._absorb_choice(choice)
        except BadField as exc:
            return not_this_protocol(str(exc))
        except LostCall as exc:
            return lost_call(str(exc))
        return None

    def _absorb_choice(self, choice: Json) -> None:
        """Raises BadField, LostCall."""
        index = choice["index"]
        opens = index not in self._seen
        if opens:
            self._seen.add(index)
            self._open.add(index)
        speaks = self.speaks(choice)
        if speaks and index not in self._open and self._goes_on(choice):
            raise BadField("more of an answer after its finish_reason")
        self.answered = self.answered or speaks
        self.spoken += speaks
        if speaks and self._kind is Kind.CHAT:
            self._keep_text([choice["delta"].get("content") or ""])
        if speaks and index not in self._called and named_calls(choice, self._kind):
            self._called.add(index)
        if (finish := choice.get("finish_reason")) is not None:
            self._finish(index, finish)
        elif not (speaks or opens) and index in self._open:  # many open with a chunk that has the role only
            self._hollow = True

    def _finish(self, index: int, reason: str) -> None:
        if reason in CLAIMS_CALL and index not in self._called:
            raise LostCall(reason)
        self._open.discard(index)
        self._finish_reason = reason
        self.answered = True
        self._template, self._templates_left = None, 0  # what follows is no text, or an error

    def _goes_on(self, choice: Json) -> bool:
        """There is text or a call in it: annotations and the like may follow a finish_reason."""
        holder = choice if self._kind is Kind.COMPLETION else choice["delta"]
        return any(holder.get(name) for name in (*self._kind.texts, "tool_calls", "function_call"))

    def speaks(self, choice: Json) -> bool:
        """There is something of the answer in it."""
        if self._kind is Kind.COMPLETION:
            return bool(choice.get("text"))
        for name, value in choice["delta"].items():  # noqa: SIM110 — a generator takes longer, and this is hot
            if value and name != "role":
                return True
        return False


def _last_words(rest: bytes) -> UpstreamError | None:
    """The event that a body ended in is none; but it may say why the body ended."""
    event = read(rest)
    if event.bare is not None and (error := bare_error(event.bare)) is not None:
        return error
    try:
        chunk = loads(event.data or b"")
    except ValueError:
        return None
    return find_error(chunk) if isinstance(chunk, dict) else None


def lost_call(finish_reason: str) -> UpstreamError:
    return UpstreamError(f'the answer ended with finish_reason "{finish_reason}" and has no tool call', lost_call=True)


def mirror_reasoning(message: Json) -> None:
    """mlx_lm.server says ``reasoning``, DeepSeek ``reasoning_content``; clients read one or the other. The one that is
    empty says nothing."""
    if text := message.get("reasoning") or message.get("reasoning_content"):
        for name in ("reasoning", "reasoning_content"):
            message[name] = message.get(name) or text

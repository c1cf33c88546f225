"""What an upstream's stream has shown: the one place that interprets it, for the relay and for the aggregator.

One ``StreamInterpreter`` per attempt. It turns bytes into chunks (parsed, checked, with no error among them) and keeps
what is needed to say, when the body ends, whether the answer was whole. A clean end of the body says nothing about
that: mlx_lm.server's is close-delimited, so a killed server and a finished one look the same on the wire.

    COMPLETE   every choice had a finish_reason, or ``[DONE]`` came after content
    EMPTY      ``[DONE]``, but no content and no finish_reason
    FAILED     an error event, or something that is not this protocol
    TRUNCATED  none of these

Caveat: servers put errors into a 200 stream in half a dozen shapes, and SDKs take most of them for success.

Pure: no I/O, no clock.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

from gateway.api.json_codec import dumps, loads
from gateway.api.kinds import Kind
from gateway.stream.sse import END, MAX_EVENT, Event, EventTooLarge, Framer, read
from gateway.stream.template import ChunkTemplate, Repeats, template_of

Json = dict[str, Any]

_PROGRESS = re.compile(rb"keepalive (\d{1,15})/(\d{1,15})")  # mlx_lm.server, one for each prefill step
_MAX_TEMPLATES = 8  # tried in one stream: where each chunk is different it does not pay
_MAX_MESSAGE = 2000  # characters of an upstream's text in our errors


class Completeness(StrEnum):
    COMPLETE = "complete"
    TRUNCATED = "truncated"
    EMPTY = "empty"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class UpstreamError:
    """``code`` as the upstream gave it; ``protocol``: it reported no error, what it sent is not this protocol."""

    message: str
    code: str | None = None
    protocol: bool = False


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


class StreamInterpreter:
    """Of one attempt at one choice: ``n`` choices are as many requests (``forward.fanout``)."""

    def __init__(self, kind: Kind, max_event: int = MAX_EVENT) -> None:
        self._kind = kind
        self._framer = Framer(max_event)
        self._seen: set[int] = set()
        self._open: set[int] = set()  # choices without a finish_reason yet
        self._comments: list[bytes] = []
        self._templates_left = _MAX_TEMPLATES
        self._template: ChunkTemplate | None = None  # what most chunks are like
        self.whole = False  # every chunk is wanted parsed
        self.answered = False  # content, or a finish_reason: an empty answer is an answer
        self.done = False  # [DONE]
        self.error: UpstreamError | None = None
        self.usage: Json | None = None
        self.progress: tuple[int, int] | None = None  # tokens of the prompt: processed, total

    @property
    def ended(self) -> bool:
        """Nothing more is to be expected: whatever still comes is ignored."""
        return self.done or self.error is not None

    def repeats(self, data: bytes) -> Repeats | None:
        """The chunks, where all of what came is like the last; else None, and ``chunks`` has to look."""
        if self._template is None or self.ended or not self._framer.between_events:
            return None
        raws = data.split(END)
        if raws.pop():
            return None  # its end is still to come
        found = self._template.run(raws)
        return found if found is not None and len(found.texts) == len(raws) else None

    def chunks(self, data: bytes) -> Iterator[Json | Repeats]:
        """To be exhausted. The attributes are up to date for each chunk when it is given out."""
        self._comments.clear()
        raws, overflow = self._frame(data)
        at = 0
        while at < len(raws):
            if self._template is not None and (found := self._template.run(raws, at)):
                yield found
                at += len(found.texts)
                continue
            event = read(raws[at])
            at += 1
            if event.comment is not None:
                self._note(event.comment)
            if event.data is None and event.event != b"error":
                continue
            chunk = self._interpret(event)
            if chunk is not None:
                yield chunk
            if self.ended:
                return
        if overflow is not None:
            self.error = overflow

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
            return Completeness.COMPLETE if self.answered else Completeness.EMPTY
        return Completeness.COMPLETE if self._seen and not self._open else Completeness.TRUNCATED

    def _frame(self, data: bytes) -> tuple[list[bytes], UpstreamError | None]:
        if self.ended:
            return [], self.error
        try:
            return self._framer.feed(data), None
        except EventTooLarge as exc:
            return exc.events, _nonsense(str(exc))

    def reject(self, what: str) -> None:
        """The reader of the chunks cannot make anything of one: the attempt has failed."""
        self.error = _nonsense(what)

    def _note(self, comment: bytes) -> None:
        self._comments.append(comment)
        if match := _PROGRESS.search(comment):
            self.progress = (int(match[1]), int(match[2]))

    def _interpret(self, event: Event) -> Json | None:
        data = event.data or b""
        if event.event == b"error":
            self.error = _error_event(data)
            return None
        if data.startswith(b"[DONE]"):
            self.done = True
            return None
        if not data or data.isspace():  # "data:" alone serves some as a heartbeat
            return None
        try:
            chunk = loads(data)
        except ValueError:
            self.error = _nonsense(f"an event that is not JSON: {_show(data)}")
            return None
        if not isinstance(chunk, dict):
            self.error = _nonsense(f"an event that is not an object: {_show(data)}")
            return None
        self.error = find_error(chunk) or self._absorb(chunk)
        if self.error is not None:
            return None
        self._learn(data, chunk)
        chunk.pop("error", None)  # null or empty; the Vercel SDK takes even a null for an error
        return chunk

    def _absorb(self, chunk: Json) -> UpstreamError | None:
        usage = chunk.get("usage")
        if isinstance(usage, dict) and usage:
            self.usage = usage
        choices = chunk.get("choices")
        if choices is None:
            choices = chunk["choices"] = []
        if not isinstance(choices, list):
            return _nonsense("a chunk whose choices are not a list")
        for choice in choices:
            if (problem := self._absorb_choice(choice)) is not None:
                return problem
        return None

    def _absorb_choice(self, choice: Any) -> UpstreamError | None:
        if not isinstance(choice, dict) or not isinstance(index := choice.setdefault("index", 0), int):
            return _nonsense("a choice that is not an object with an index")
        if self._kind is Kind.CHAT and not _has_delta(choice):
            return _nonsense("a delta that is not an object, or whose tool calls are not a list of objects")
        if index not in self._seen:
            self._seen.add(index)
            self._open.add(index)
        finish = choice.get("finish_reason")
        if finish is not None:
            self._open.discard(index)
        if finish is not None or (not self.answered and self._speaks(choice)):
            self.answered = True
        return None

    def _speaks(self, choice: Json) -> bool:
        if self._kind is Kind.COMPLETION:
            return bool(choice.get("text"))
        return any(value for key, value in choice["delta"].items() if key != "role")


def find_error(body: Json) -> UpstreamError | None:
    """The error in a chunk or in a JSON answer, in any of the shapes seen, or None."""
    error = body.get("error")
    if error:
        return _described(error)
    if body.get("object") == "error" or body.get("type") == "error":  # flat: old vLLM, the Responses API
        return _described(body)
    choices = body.get("choices")
    for choice in choices if isinstance(choices, list) else ():
        if isinstance(choice, dict) and choice.get("finish_reason") == "error":
            if choice.get("error"):  # OpenRouter
                return _described(choice["error"])
            return UpstreamError('the answer ended with finish_reason "error"')
    return None


def mirror_reasoning(message: Json) -> None:
    """mlx_lm.server says ``reasoning``, DeepSeek ``reasoning_content``; clients read one or the other."""
    if (text := message.get("reasoning")) is not None:
        if message.get("reasoning_content") is None:
            message["reasoning_content"] = text
    elif (text := message.get("reasoning_content")) is not None:
        message["reasoning"] = text


def _has_delta(choice: Json) -> bool:
    delta = choice.get("delta")
    if delta is None:
        delta = choice["delta"] = {}
    if not isinstance(delta, dict):
        return False
    calls = delta.get("tool_calls")
    return calls is None or (
        isinstance(calls, list)
        and all(isinstance(call, dict) and isinstance(call.get("function"), dict | None) for call in calls)
    )


def _error_event(data: bytes) -> UpstreamError:
    try:
        value = loads(data)
    except ValueError:
        return UpstreamError(_show(data) if data.strip() else "an error event without text")
    if isinstance(value, dict):
        return find_error(value) or _described(value)
    return _described(value)


def _described(value: Any) -> UpstreamError:
    if not isinstance(value, dict):
        return UpstreamError(_clip(value if isinstance(value, str) else _text(value)))
    message = value.get("message") or value.get("detail")
    if not isinstance(message, str):
        message = _text(value)
    code = value.get("code")
    return UpstreamError(_clip(message), code=None if code is None else str(code))


def _nonsense(what: str) -> UpstreamError:
    return UpstreamError(f"the backend sent {what}", protocol=True)


def _text(value: Any) -> str:
    try:
        return dumps(value).decode()
    except ValueError:
        return "an error that JSON cannot show"


def _show(data: bytes) -> str:
    return _clip(data[: 4 * _MAX_MESSAGE].decode("utf-8", "replace").strip())


def _clip(text: str) -> str:
    text = text.encode("utf-8", "replace").decode()  # lone surrogates would break logs
    return text if len(text) <= _MAX_MESSAGE else text[:_MAX_MESSAGE] + "…"

"""SSE events to one JSON answer, for a client that did not ask for a stream.

The upstream streams all the same: only then can it be cancelled, watched and found truncated. ``Aggregator`` has the
shape of ``relay.Relay``, and the same interpreter decides; as the client sees nothing before the end, any attempt may
be followed by another. ``fix_json`` does the same for answers that did come in one piece (log probabilities:
mlx_lm.server leaves them out of streams).

Caveat: the pieces of tool calls are told apart by ``index``, but some servers leave it out, or always say 0 and change
the id.

Pure: no I/O, no clock.
"""

from dataclasses import dataclass, field
from typing import Any

from gateway.api.kinds import Kind
from gateway.stream.chunk_fields import BadField, named_calls, tidy_choice, tidy_usage, too_deep
from gateway.stream.error_shapes import UpstreamError, find_error, not_this_protocol
from gateway.stream.interpreter import End, Json, StreamInterpreter, lost_call, mirror_reasoning
from gateway.stream.lost_calls import CLAIMS_CALL, Ending, ends_in_markup
from gateway.stream.relay import Seen
from gateway.stream.template import Repeats

MAX_ANSWER = 64 << 20  # bytes of an answer that is put together here, or comes in one piece: some 200,000 tokens
MAX_CALLS = 1024  # of one choice


@dataclass(slots=True)
class _ToolCall:
    id: str | None = None
    type: str = "function"
    name: str = ""
    arguments: list[str] = field(default_factory=list)

    def json(self) -> Json:
        function = {"name": self.name, "arguments": "".join(self.arguments)}
        return {"id": self.id, "type": self.type, "function": function}


@dataclass(slots=True)
class _Choice:
    text: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    refusal: list[str] = field(default_factory=list)
    calls: list[_ToolCall] = field(default_factory=list)
    slots: dict[int | None, _ToolCall] = field(default_factory=dict)  # by the index of the upstream
    logprobs: Json | None = None
    finish_reason: str | None = None


_KEPT_AS = {  # a text of a chunk -> the attribute of ``_Choice`` that it is added to
    "content": "text",
    "text": "text",
    "reasoning": "reasoning",
    "reasoning_content": "reasoning",
    "refusal": "refusal",
}


class Aggregator:
    """``model``: the name to write into the answer. ``tools``: the request asked for some."""

    __slots__ = ("_choices", "_envelope", "_interpreter", "_kind", "_model", "_size", "_tools", "state")

    def __init__(self, kind: Kind, model: str, *, tools: bool = False) -> None:
        self._kind = kind
        self._tools = tools
        self._model = model
        self.state = Seen.WAITING  # and stays: the client has nothing until the answer
        self.attempt()

    def attempt(self, model: str | None = None, found: int | None = None) -> None:
        """``found``: see the interpreter."""
        self._model = model or self._model
        self._interpreter = StreamInterpreter(self._kind, tools=self._tools, found=found)
        self._envelope: Json = {}  # id, created, system_fingerprint, … of the first chunk to have them
        self._choices: dict[int, _Choice] = {}
        self._size = 0  # bytes of the stream

    @property
    def usage(self) -> Json | None:
        return self._interpreter.usage

    @property
    def progress(self) -> tuple[int, int] | None:
        return self._interpreter.progress

    @property
    def answered(self) -> bool:
        """Some content, or a finish_reason, has come."""
        return self._interpreter.answered

    @property
    def ended(self) -> bool:
        return self._interpreter.ended

    @property
    def finished(self) -> bool:
        """Nothing of the answer itself is to be expected; usage and ``[DONE]`` may follow."""
        return self._interpreter.finished

    def feed(self, data: bytes) -> None:
        if self._interpreter.ended:
            return
        self._size += len(data)
        if self._size > MAX_ANSWER:
            self._interpreter.reject(f"an answer of more than {MAX_ANSWER} bytes, without an end")
            return
        for chunk in self._interpreter.chunks(data):
            if isinstance(chunk, Repeats):
                self._repeat(chunk)
                continue
            for choice in chunk.pop("choices"):
                into = self._choices.setdefault(choice["index"], _Choice())
                _add(into, choice, self._kind)
                if len(into.calls) > MAX_CALLS:
                    self._interpreter.reject(f"more than {MAX_CALLS} tool calls")
            for key, value in chunk.items():
                if not self._envelope.get(key):
                    self._envelope[key] = value

    def _repeat(self, repeats: Repeats) -> None:
        texts: list[str] = getattr(self._choices[0], _KEPT_AS[repeats.template.field])
        texts += repeats.texts

    def end(self) -> End:
        verdict = self._interpreter.verdict()
        return End(verdict, error=self._interpreter.error, ending=self._interpreter.ending)

    def answer(self) -> Json:
        """The answer as far as it came; whole only where ``end`` said COMPLETE."""
        envelope = self._envelope
        out: Json = {
            "id": envelope.get("id"),
            "object": self._kind.object,
            "created": envelope.get("created"),
            "model": self._model,
        }
        out.update((key, value) for key, value in envelope.items() if key not in out and key != "usage")
        out["choices"] = [self._choice(index, self._choices[index]) for index in sorted(self._choices)]
        if self.usage is not None:
            out["usage"] = self.usage
        return out

    def _choice(self, index: int, choice: _Choice) -> Json:
        out: Json = {"index": index}
        if self._kind is Kind.CHAT:
            out["message"] = _message(choice)
        else:
            out["text"] = "".join(choice.text)
        out["logprobs"] = choice.logprobs
        out["finish_reason"] = choice.finish_reason
        return out


def fix_json(body: Json, kind: Kind, model: str) -> Json:
    """Change ``body``, a whole answer that came in one piece, to the form of ``Aggregator.answer``; returns it.

    Only for a body of which ``whole_answer`` gave the ending.
    """
    body["model"] = model
    body["object"] = kind.object
    if "usage" in body:
        body["usage"] = tidy_usage(body["usage"])
    body.pop("error", None)  # null or empty
    if kind is Kind.CHAT:
        for choice in body["choices"]:
            message = choice["message"]
            mirror_reasoning(message)
            if message.get("content") is None:
                message["content"] = None if message.get("tool_calls") else ""
    return body


def whole_answer(body: Any, kind: Kind) -> Ending | UpstreamError | None:
    """How this JSON, an answer that came in one piece, ended; the error in it; or None, where it is not whole: no
    choices, or one without a finish_reason. Its fields are tidied."""
    if not isinstance(body, dict):
        return None
    if (error := find_error(body)) is not None:
        return error
    choices = body.get("choices")
    if not isinstance(choices, list) or not choices:
        return None
    if too_deep(body):
        return not_this_protocol("an answer that is nested too deeply")
    ending: Ending | None = None
    for place, choice in enumerate(choices):
        try:
            if isinstance(choice, dict) and choice.get("index") in (None, ""):
                choice["index"] = place
            ending = _ending(choice, kind, tidy_usage(body.get("usage")) or {})
        except BadField as exc:
            return not_this_protocol(str(exc))
        if ending.finish_reason is None:
            return None
        if ending.finish_reason in CLAIMS_CALL and not ending.calls:
            return lost_call(ending.finish_reason)
    return ending


def _ending(choice: Any, kind: Kind, usage: Json) -> Ending:
    """Of a choice that is tidied: ``message`` is an object afterwards. Raises BadField."""
    if isinstance(choice, dict) and kind is Kind.CHAT:
        choice["delta"] = choice.pop("message", None) or choice.get("delta")
    tidy_choice(choice, kind, first=True)
    calls, message = named_calls(choice, kind), choice.pop("delta", None) or {}
    if kind is Kind.CHAT:
        choice["message"] = message
        said = any(message.get(name) for name in kind.texts)
    else:
        said = bool(choice.get("text"))
    made = usage.get("completion_tokens")
    markup = kind is Kind.CHAT and ends_in_markup(message.get("content") or "")
    return Ending(choice.get("finish_reason"), calls, None if said else made, said, markup)


def _message(choice: _Choice) -> Json:
    text = "".join(choice.text)
    message: Json = {"role": "assistant", "content": None if choice.calls and not text else text}
    if choice.refusal:
        message["refusal"] = "".join(choice.refusal)
    if choice.reasoning:
        message["reasoning"] = "".join(choice.reasoning)
        mirror_reasoning(message)
    if choice.calls:
        message["tool_calls"] = [call.json() for call in choice.calls]
    return message


def _add(into: _Choice, choice: Json, kind: Kind) -> None:
    into.finish_reason = choice.get("finish_reason") or into.finish_reason
    if isinstance(logprobs := choice.get("logprobs"), dict):
        into.logprobs = _joined(into.logprobs, logprobs)
    if kind is Kind.COMPLETION:
        _append(into.text, choice.get("text"))
        return
    delta = choice["delta"]
    _append(into.text, delta.get("content"))
    _append(into.reasoning, delta.get("reasoning") or delta.get("reasoning_content"))
    _append(into.refusal, delta.get("refusal"))
    for piece in delta.get("tool_calls") or ():
        _add_call(into, piece)


def _append(parts: list[str], value: object) -> None:
    if isinstance(value, str) and value:
        parts.append(value)


def _add_call(into: _Choice, piece: Json) -> None:
    slot, call_id, function = piece.get("index"), piece.get("id"), piece.get("function") or {}
    slot = slot if isinstance(slot, int) else None
    call = into.slots.get(slot)
    if call is None or (call_id and call.id and call_id != call.id):
        call = into.slots[slot] = _ToolCall()
        into.calls.append(call)
    call.id = call.id or call_id
    call.type = piece.get("type") or call.type
    call.name = call.name or function.get("name") or ""
    _append(call.arguments, function.get("arguments"))


def _joined(first: Json | None, second: Json) -> Json:
    """Log probabilities are an object of lists, whatever the endpoint; the lists follow on each other. Changes
    ``first``: a copy for each chunk would take time that is quadratic in the answer."""
    if first is None:
        return second
    for key, value in second.items():
        old = first.get(key)
        if isinstance(old, list) and isinstance(value, list):
            old += value
        else:
            first[key] = value or old
    return first

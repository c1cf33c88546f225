"""What the client has seen, and which bytes to send it: one ``Relay`` for one streamed request, over all its attempts.

    WAITING   nothing                     a failure can be another attempt, or a real HTTP status
    OPEN      200 and comments            still another attempt, else an error event
    SPEAKING  at least one data event     an error event
    DONE      [DONE]                      nothing

Data leaves only as whole events, and none before the content commit: the first text, reasoning or tool delta, or a
finish_reason. Chunks that only open a choice wait for it, so an attempt that dies earlier leaves no trace.

Caveat: where tools were asked for, a finish of ``length`` without a call waits for the end of the answer: only there
can be told whether a call was cut off and withheld (``End.ending``), and until then the request may be sent again.

Caveat: no chunk passes as it came. ``model`` becomes the public name; ``role`` stays in the first delta
of a choice only (mlx_lm.server repeats it, and openai-python's ``.stream()`` then ends with role "assistantassistant");
the usage is taken out wherever it stands and sent once, last, to the client who asked (LangChain adds up all it sees);
finish_reason is never made up.

Pure: no I/O, no clock.
"""

from dataclasses import dataclass, field
from enum import StrEnum

from gateway.api.json_codec import dumps
from gateway.api.kinds import Kind
from gateway.stream.interpreter import Completeness, End, Json, Output, StreamInterpreter, mirror_reasoning
from gateway.stream.lost_calls import CUT
from gateway.stream.resume import Diverged, Matcher, Transcript
from gateway.stream.template import MARK, ChunkTemplate, Repeats

MAX_HELD = 1 << 20  # bytes that wait for the first content
_DONE = b"data: [DONE]\n\n"


class Seen(StrEnum):
    WAITING = "waiting"
    OPEN = "open"
    SPEAKING = "speaking"
    DONE = "done"


@dataclass(slots=True)
class Identity:
    """What all chunks of a stream have in common: those of the first that came, whichever attempt made them."""

    id: object = None
    created: object = None

    def mark(self, chunk: Json) -> None:
        if self.id is None:
            self.id, self.created = chunk.get("id") or None, chunk.get("created")
            return
        chunk["id"] = self.id
        if self.created is not None:
            chunk["created"] = self.created


@dataclass(frozen=True, slots=True)
class Part:
    """Where an answer belongs: one choice of several, or (``alone``) the only one. Others end the stream then."""

    index: int = 0
    identity: Identity = field(default_factory=Identity)
    alone: bool = False


class Relay:
    """``model``: the name to write into the chunks.

    feed(bytes) -> Output     what to send now; ``failure`` set = this attempt is over
    again(bytes) -> bytes     the same for nothing but more text; b"" = it was not looked at, and is for ``feed``
    end() -> End              the body ended, cleanly or not: what came decides, not how it ended
    attempt()                 begin anew with another upstream, perhaps of another model; the first needs no call
    resume()                  go on with another upstream in mid-answer: nothing goes out until it has said the same
    """

    __slots__ = (
        "_begun",
        "_delivered",
        "_held",
        "_held_size",
        "_include_usage",
        "_interpreter",
        "_kind",
        "_late",
        "_matcher",
        "_model",
        "_part",
        "_pieces",
        "_template",
        "_tools",
        "_transcript",
        "_usage",
        "diverged",
        "state",
    )

    def __init__(
        self,
        kind: Kind,
        model: str,
        *,
        include_usage: bool = False,
        part: Part | None = None,
        remember: bool = False,
        tools: bool = False,
    ) -> None:
        self._kind = kind
        self._tools = tools  # asked for
        self._part = part or Part(alone=True)
        self._model = model
        self._include_usage = include_usage
        self.state = Seen.WAITING
        self.diverged = False  # the upstream that was to go on says something else
        self._transcript = Transcript() if remember else None
        self._delivered: Transcript | None = None  # at the first resume
        self._matcher: Matcher | None = None
        self._begun: set[int] = set()  # choices whose first delta is out, or held
        self._reset()

    def _reset(self, found: int | None = None) -> None:
        self._interpreter = StreamInterpreter(self._kind, tools=self._tools, found=found)
        self._held: list[bytes] = []
        self._held_size = 0  # bytes
        self._late: list[bytes] = []  # the finish of a cut answer, which goes out with the end
        self._usage = b""  # the event that goes out last
        self._template: ChunkTemplate | None = None
        self._pieces: list[
            bytes
        ] = []  # of the event that goes out for a chunk like the template: its text goes between

    @property
    def usage(self) -> Json | None:
        """As the upstream counted, whether or not the client asked."""
        return self._interpreter.usage

    @property
    def answered(self) -> bool:
        """Some content, or a finish_reason, has come in this attempt."""
        return self._interpreter.answered

    @property
    def progress(self) -> tuple[int, int] | None:
        """Tokens of the prompt, processed and in all, as this attempt reported last."""
        return self._interpreter.progress

    @property
    def ended(self) -> bool:
        """The upstream has said its last word; the body need not be read to its end."""
        return self._interpreter.ended

    def opened(self) -> None:
        """The 200 went out."""
        if self.state is Seen.WAITING:
            self.state = Seen.OPEN

    @property
    def finished(self) -> bool:
        """Nothing of the answer itself is to be expected; usage and ``[DONE]`` may follow."""
        return self._interpreter.finished

    def retract(self, state: Seen) -> None:
        """What was given out last was not delivered, and is not to be. ``state``: as it was before."""
        self.state = state

    def attempt(self, model: str | None = None, found: int | None = None) -> None:
        """``found``: see the interpreter."""
        if self.state in {Seen.SPEAKING, Seen.DONE}:
            raise RuntimeError(f"no new attempt once the client has content (state {self.state.value})")
        self._model = model or self._model
        if self._part.alone:
            self._part = Part(alone=True)  # of the attempt that failed nothing is left, not even its id
        self._begun = set()
        if self._transcript is not None:
            self._transcript = Transcript()
        self._reset(found)

    @property
    def resumable(self) -> bool:
        """So far: until it was resumed, and again if that broke off before the client got more."""
        if self._matcher is not None:
            return self.replaying and not self.diverged
        return self._transcript is not None and not self._transcript.lost

    @property
    def replaying(self) -> bool:
        return self._matcher is not None and not self._matcher.done

    @property
    def matched(self) -> int:
        """Chunks that were generated again."""
        return self._matcher.matched if self._matcher is not None else 0

    def resume(self) -> None:
        delivered = self._transcript or self._delivered
        if self.state is not Seen.SPEAKING or not self.resumable or delivered is None:
            raise RuntimeError(f"nothing to go on with (state {self.state.value})")
        self._delivered, self._transcript = delivered, None
        self._matcher = Matcher(delivered, self._kind)
        self._reset()
        self._interpreter.whole = True

    def feed(self, data: bytes) -> Output:
        if again := self.again(data):  # nearly always
            return Output(again)
        interpreter = self._interpreter
        if interpreter.ended:
            return Output(failure=interpreter.error)
        out: list[bytes] = []
        try:
            for chunk in interpreter.chunks(data):
                if isinstance(chunk, Repeats):
                    out.append(self._repeat(chunk))
                elif interpreter.answered:
                    self._send(chunk, out)
                else:
                    self._hold(chunk)
        except ValueError as exc:  # from dumps
            interpreter.reject(f"a chunk that cannot be sent on: {exc}")
        except Diverged:
            self._diverge()
        if interpreter.done and interpreter.answered and not self._short():
            out.append(self._finish())
        return Output(b"".join(out), interpreter.comments(), interpreter.error)

    def again(self, data: bytes) -> bytes:
        repeats = self._interpreter.repeats(data)
        return b"" if repeats is None else self._repeat(repeats)

    def end(self) -> End:
        verdict = self._interpreter.verdict()
        if verdict is Completeness.COMPLETE and self._short():
            return End(Completeness.FAILED, error=self._interpreter.error)
        ending = self._interpreter.ending
        if verdict is Completeness.COMPLETE and self.state is not Seen.DONE:
            return End(verdict, self._finish(), ending=ending)
        return End(verdict, error=self._interpreter.error, ending=ending)

    def _short(self) -> bool:
        """It has ended before it had said what the client has."""
        if self.replaying and not self.diverged:
            self._diverge()
        return self.diverged

    def _diverge(self) -> None:
        self.diverged = True
        self._interpreter.reject("another answer than the one it was to go on with")

    def _send(self, chunk: Json, out: list[bytes]) -> None:
        if self._matcher is not None:
            matcher = self._matcher
            chunk["choices"] = [choice for choice in chunk["choices"] if matcher.trim(choice)]
            if not chunk["choices"] and not chunk.get("usage"):
                return
        else:
            self._note(chunk)
        cut = self._tools and self._matcher is None and self._is_cut(chunk)
        event = self._event(chunk)
        if event is None:
            return
        if cut or self._late:
            self._late += [*self._held, event]
            self._held.clear()
            return
        self.state = Seen.SPEAKING
        if self._held:
            out.extend(self._held)
            self._held.clear()
        out.append(event)

    def _is_cut(self, chunk: Json) -> bool:
        """It ends an answer without a tool call by ``length``, and has no text."""
        return not self._interpreter.called and any(
            choice.get("finish_reason") in CUT and not self._interpreter.speaks(choice) for choice in chunk["choices"]
        )

    def _repeat(self, repeats: Repeats) -> bytes:
        """The events for chunks that are like the last but for their texts."""
        template = repeats.template
        if template is not self._template:
            self._template = template
            self._pieces = (self._event(template.like(MARK)) or b"").split(MARK)
        if self._transcript is not None:
            self._transcript.add(template.field, repeats.texts)
        pieces = self._pieces
        return b"".join([escaped.join(pieces) for escaped in repeats.escaped])

    def _hold(self, chunk: Json) -> None:
        """Keep the first chunk of each choice, and log probabilities; a chunk that adds nothing to them is dropped."""
        news = any(choice["index"] not in self._begun or choice.get("logprobs") for choice in chunk["choices"])
        if news:
            self._note(chunk)
        event = self._event(chunk)
        if news and event is not None:
            self._held.append(event)
            self._held_size += len(event)
            if self._held_size > MAX_HELD:
                self._interpreter.reject(f"more than {MAX_HELD} bytes without any content")

    def _note(self, chunk: Json) -> None:
        """As the upstream sent it."""
        if self._transcript is not None:
            for choice in chunk["choices"]:
                self._transcript.note(choice, self._kind)

    def _finish(self) -> bytes:
        self.state = Seen.DONE
        late = b"".join(self._late)
        return late + self._usage + _DONE if self._part.alone else late

    def _event(self, chunk: Json) -> bytes | None:
        """None for a chunk that is there for its usage only."""
        self._rename(chunk)
        if chunk.pop("usage", None) and (usage := self._interpreter.usage) is not None:
            if self._include_usage:
                self._usage = _encode({**chunk, "choices": [], "usage": usage})
            if not chunk["choices"]:
                return None
        if self._kind is Kind.CHAT:
            for choice in chunk["choices"]:
                self._tidy(choice)
        else:
            self._begun.update(choice["index"] for choice in chunk["choices"])
        if self._part.index:
            for choice in chunk["choices"]:
                choice["index"] += self._part.index
        return _encode(chunk)

    def _rename(self, chunk: Json) -> None:
        chunk["model"] = self._model
        chunk["object"] = self._kind.chunk_object  # mlx_lm.server calls every usage chunk "chat.completion"
        self._part.identity.mark(chunk)

    def _tidy(self, choice: Json) -> None:
        delta = choice["delta"]
        if choice["index"] in self._begun:
            delta.pop("role", None)
        else:
            self._begun.add(choice["index"])
            delta["role"] = delta.get("role") or "assistant"
        mirror_reasoning(delta)


def usage_event(kind: Kind, identity: Identity, model: str, usage: Json) -> bytes:
    chunk: Json = {"id": None, "object": kind.chunk_object, "created": None, "model": model}
    identity.mark(chunk)
    return _encode({**chunk, "choices": [], "usage": usage})


def _encode(chunk: Json) -> bytes:
    return b"data: " + dumps(chunk) + b"\n\n"

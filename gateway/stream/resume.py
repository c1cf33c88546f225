"""Going on with an answer after its backend has failed: replay, and verify.

The same request goes to another replica, or to the next instance of the same one. Nothing of its answer reaches the
client until all that was delivered has come again, channel by channel (content, reasoning, the name and arguments of
each tool call); from there on it continues the answer, in mid-delta if need be. The first character that differs ends
it: the client then gets the error it would have got without.

What makes it sound: an answer is continued only by a run that has reproduced all of it. What makes it useful is
determinism, which is proved at the start (``forward.determinism``), not assumed.

Caveat: not all of an answer is text. An answer with anything in it that cannot be compared is not continued at all.

Pure: no I/O, no clock.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from gateway.api.kinds import Kind

Json = dict[str, Any]
Channel = tuple[str, object]  # the name of a text, and the index of the tool call that it belongs to, or None

MAX_CHARS = 1 << 20  # delivered; a chunk may be of any size
MAX_CHUNKS = 2048  # delivered, about one for each token: they all have to be generated again
CATCH_UP_LIMIT = 120.0  # seconds from the moment that a replica takes it until the client gets more
TEXTS = (*Kind.CHAT.texts, *Kind.COMPLETION.texts)
REPLICA_SPECIFIC = ("adapters", "draft_model", "role_mapping")  # what they name may differ between replicas


class Proof(StrEnum):
    """What the test at the start has shown of a model. Public: health and status show it."""

    PENDING = "pending"
    VERIFIED = "verified"
    IDLE_ONLY = "idle_only"  # equal alone, not within a batch
    OFF = "off"  # not equal, switched off, or not ours to test

    @property
    def allows_resume(self) -> bool:
        """Also before the test, which waits for an idle moment: a replay that fails costs time and nothing else."""
        return self is not Proof.OFF

    @property
    def needs_idle(self) -> bool:
        """Within a batch the text may be another, as far as is known."""
        return self is not Proof.VERIFIED


class Outcome(StrEnum):
    """Of one resume."""

    SPLICED = "spliced"
    DIVERGED = "diverged"
    FAILED = "failed"  # no replica was free or came back in time, or it took too long, or that one failed too


def outcome_of(*, replaying: bool, diverged: bool, asked: bool) -> Outcome:
    """``asked``: there was a replica to ask."""
    if diverged:
        return Outcome.DIVERGED
    return Outcome.SPLICED if asked and not replaying else Outcome.FAILED


@dataclass(slots=True)
class Tally:
    """Of one model since the start. ``wasted``: chunks generated again that the client had already."""

    tried: int = 0
    spliced: int = 0
    diverged: int = 0
    failed: int = 0
    wasted: int = 0

    def count(self, outcome: Outcome, wasted: int) -> None:
        self.tried += 1
        self.spliced += outcome is Outcome.SPLICED
        self.diverged += outcome is Outcome.DIVERGED
        self.failed += outcome is Outcome.FAILED
        self.wasted += wasted


def deterministic(sent: Callable[[str], Any], default_temperature: float) -> bool:
    """Whether the same request gives the same answer again, where the servers allow it. ``sent``: the value of a field,
    None = it has none."""
    if any(sent(name) is not None for name in REPLICA_SPECIFIC):
        return False
    temperature = sent("temperature")
    return (default_temperature if temperature is None else temperature) == 0 or sent("seed") is not None


class Diverged(Exception):
    """The replay is not what was delivered."""


class Transcript:
    """What the client has of its one choice.

    ``lost``: it is too long to be of use, or holds something that cannot be compared; nothing is kept then.
    """

    def __init__(self) -> None:
        self.lost = False
        self.calls: dict[object, object] = {}  # index -> id, of the tool calls that the client knows
        self._chunks = 0
        self._chars = 0
        self._parts: dict[Channel, list[str]] = {}

    def note(self, choice: Json, kind: Kind) -> None:
        if self.lost:
            return
        pieces = _pieces(choice, kind)
        fits = self._count(1, sum(len(text) for _, text in pieces or ()))
        if pieces is None or not fits or not self._same_calls(choice, kind):
            self._lose()
            return
        for channel, text in pieces:
            self._parts.setdefault(channel, []).append(text)

    def add(self, name: str, texts: list[str]) -> None:
        """The same, for chunks of which only these texts are new."""
        if self.lost:
            return
        if self._count(len(texts), sum(map(len, texts))):
            self._parts.setdefault((name, None), []).extend(texts)
        else:
            self._lose()

    def _count(self, chunks: int, chars: int) -> bool:
        """False: it is too long now."""
        self._chunks += chunks
        self._chars += chars
        return self._chunks <= MAX_CHUNKS and self._chars <= MAX_CHARS

    def _lose(self) -> None:
        self.lost = True
        self._parts.clear()

    def texts(self) -> dict[Channel, str]:
        return {channel: "".join(parts) for channel, parts in self._parts.items()}

    def _same_calls(self, choice: Json, kind: Kind) -> bool:
        """Calls are told apart by index; there are servers that say 0 always, and change the id."""
        for index, call in _calls(choice, kind):
            call_id = call.get("id") or None
            known = self.calls.setdefault(index, call_id)
            if call_id is not None and known is None:
                self.calls[index] = call_id
            elif call_id not in (None, known):
                return False
        return True


class Matcher:
    """Holds a replay against a transcript. ``matched``: chunks of it until the client had more."""

    def __init__(self, transcript: Transcript, kind: Kind) -> None:
        self._kind = kind
        self._left = transcript.texts()
        self._calls = dict.fromkeys(transcript.calls)  # index -> id, in the replay
        self.matched = 0

    @property
    def done(self) -> bool:
        return not self._left

    def trim(self, choice: Json) -> bool:
        """Take out of ``choice`` what the client has. False: that was all of it. Raises Diverged."""
        if self.done:
            self._drop_ids(choice)
            return True
        pieces = _pieces(choice, self._kind)
        if pieces is None:
            raise Diverged
        self.matched += 1
        new = {index for index, call in _calls(choice, self._kind) if not self._knows(index, call)}
        rest = {}
        for channel, text in pieces:
            if left := text if channel[1] in new else self._match(channel, text):
                rest[channel] = left
        more = bool(rest or new) or choice.get("finish_reason") is not None
        if self._left and more:
            raise Diverged
        if more:
            self._put(choice, rest, new)
        return more

    def _match(self, channel: Channel, text: str) -> str:
        """What of ``text`` goes beyond what was delivered."""
        left = self._left.get(channel, "")
        common = min(len(left), len(text))
        if left[:common] != text[:common]:
            raise Diverged
        if len(left) > common:
            self._left[channel] = left[common:]
        else:
            self._left.pop(channel, None)
        return text[common:]

    def _knows(self, index: object, call: Json) -> bool:
        """Whether the client knows this call, and so has an id for it, which it keeps."""
        if index not in self._calls:
            return False
        call_id = call.get("id") or None
        if call_id is not None and self._calls[index] is None:
            self._calls[index] = call_id
        return call_id in (None, self._calls[index])

    def _put(self, choice: Json, rest: dict[Channel, str], new: set[object]) -> None:
        """What is left of the chunk, and no empty texts: to some clients even an empty one begins a new part."""
        if self._kind is Kind.COMPLETION:
            choice["text"] = rest.get(("text", None), "")
            return
        calls = []
        for index, call in _calls(choice, self._kind):
            if index in new:
                calls.append(call)
            elif function := {name: text for (name, of), text in rest.items() if of == index}:
                calls.append({"index": index, "function": function})
        choice["delta"] = {name: text for (name, index), text in rest.items() if index is None}
        if calls:
            choice["delta"]["tool_calls"] = calls

    def _drop_ids(self, choice: Json) -> None:
        for index, call in _calls(choice, self._kind):
            if self._knows(index, call):
                call.pop("id", None)
                call.pop("type", None)


def _calls(choice: Json, kind: Kind) -> list[tuple[object, Json]]:
    """Its tool calls, with their indices; where a server leaves these out, their places stand for them."""
    if kind is Kind.COMPLETION:
        return []
    return [(call.get("index", place), call) for place, call in enumerate(choice["delta"].get("tool_calls") or ())]


def _pieces(choice: Json, kind: Kind) -> list[tuple[Channel, str]] | None:
    """The texts of a choice as the upstream sent it, by channel; None when there is more to it than texts."""
    known = ("index", "finish_reason", "text" if kind is Kind.COMPLETION else "delta")
    if choice["index"] != 0 or any(value for name, value in choice.items() if name not in known):
        return None
    if kind is Kind.COMPLETION:
        found: list[tuple[Channel, object]] = [(("text", None), choice.get("text"))]
    else:
        found = [((name, None), value) for name, value in choice["delta"].items() if name not in ("role", "tool_calls")]
        for index, call in _calls(choice, kind):
            found += [((name, index), value) for name, value in (call.get("function") or {}).items()]
    pieces = []
    for channel, value in found:
        if not value:
            continue
        if not isinstance(value, str) or channel[0] not in (TEXTS if channel[1] is None else ("name", "arguments")):
            return None
        pieces.append((channel, value))
    return pieces

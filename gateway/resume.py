"""Going on with an answer after its backend has failed: replay, and verify.

The same request goes to another replica. Nothing of its answer reaches the client until all that was delivered has come
again, channel by channel (content, reasoning, the name and arguments of each tool call); from there on it continues the
answer, in mid-delta if need be. The first character that differs ends it: the client then gets the error it would have
got without.

What makes it sound: an answer is continued only by a run that has reproduced all of it. What makes it useful is
determinism, which is proved at the start (see ``selftest``), not assumed.

Pure: no I/O, no clock.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from gateway.kinds import Kind

Json = dict[str, Any]
Channel = tuple[str, object]  # the name of a text, and the index of the tool call that it belongs to, or None

MAX_CHUNKS = 2048  # delivered, about one for each token: they all have to be generated again
WITHIN = 30.0  # seconds from the failure until the client gets more
TEXTS = ("content", "reasoning", "reasoning_content", "refusal")
SPOILERS = ("adapters", "draft_model", "role_mapping")  # what they name may differ between replicas


class Proof(StrEnum):
    """What the test at the start has shown of a model. Public: health and status show it."""

    PENDING = "pending"
    VERIFIED = "verified"
    IDLE_ONLY = "idle_only"  # equal alone, not within a batch
    OFF = "off"  # not equal, switched off, or not ours to test
    SINGLE = "single"  # one replica: nowhere to go on

    @property
    def holds(self) -> bool:
        return self in (Proof.VERIFIED, Proof.IDLE_ONLY)


class Outcome(StrEnum):
    """Of one resume."""

    SPLICED = "spliced"
    DIVERGED = "diverged"
    FAILED = "failed"  # there was nobody, or it took too long, or that one failed too


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
    if any(sent(name) is not None for name in SPOILERS):
        return False
    temperature = sent("temperature")
    return (default_temperature if temperature is None else temperature) == 0 or sent("seed") is not None


class Diverged(Exception):
    """The replay is not what was delivered."""


class Transcript:
    """What the client has of one choice."""

    def __init__(self) -> None:
        self.full = False  # too long to be of use: nothing more is kept
        self._chunks = 0
        self._parts: dict[Channel, list[str]] = {}

    def note(self, choice: Json, kind: Kind) -> None:
        if self._chunks >= MAX_CHUNKS:
            self.full = True
            self._parts.clear()
            return
        self._chunks += 1
        for channel, text in _pieces(choice, kind):
            self._parts.setdefault(channel, []).append(text)

    def texts(self) -> dict[Channel, str]:
        return {channel: "".join(parts) for channel, parts in self._parts.items()}


class Matcher:
    """Holds a replay against a transcript. ``matched``: chunks so far that held nothing new."""

    def __init__(self, transcript: Transcript, kind: Kind) -> None:
        self._kind = kind
        self._left = transcript.texts()
        self._calls = {index for _, index in self._left if index is not None}
        self.matched = 0

    @property
    def done(self) -> bool:
        return not self._left

    def trim(self, choice: Json) -> bool:
        """Take out of ``choice`` what the client has. False: that was all of it. Raises Diverged."""
        if not self._left and not self._calls:
            return True
        news = self._trim_calls(choice) if self._kind is Kind.CHAT else False
        holder = choice["delta"] if self._kind is Kind.CHAT else choice
        for channel, text in list(_texts(choice, self._kind)):
            holder[channel[0]] = rest = self._match(channel, text)
            news = news or bool(rest)
        ended = choice.get("finish_reason") is not None
        if self._left and (news or ended):
            raise Diverged
        self.matched += not news
        return news or ended

    def _trim_calls(self, choice: Json) -> bool:
        """A call that the client knows keeps the id it has there."""
        kept = []
        for place, call in enumerate(choice["delta"].get("tool_calls") or ()):
            index, function = call.get("index", place), call.get("function") or {}
            known = index in self._calls
            for name in ("name", "arguments"):
                if isinstance(text := function.get(name), str) and text:
                    function[name] = self._match((name, index), text)
            rest = {name: text for name, text in function.items() if text}
            if not known:
                kept.append(call)
            elif rest:
                kept.append({"index": index, "function": rest})
        if "tool_calls" in choice["delta"]:
            choice["delta"]["tool_calls"] = kept
            if not kept:
                del choice["delta"]["tool_calls"]
        return bool(kept)

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


def _texts(choice: Json, kind: Kind) -> Iterator[tuple[Channel, str]]:
    holder = choice["delta"] if kind is Kind.CHAT else choice
    for name in TEXTS if kind is Kind.CHAT else ("text",):
        if isinstance(text := holder.get(name), str) and text:
            yield (name, None), text


def _pieces(choice: Json, kind: Kind) -> Iterator[tuple[Channel, str]]:
    """The texts of a choice as the upstream sent it, by channel."""
    yield from _texts(choice, kind)
    for place, call in enumerate(choice["delta"].get("tool_calls") or () if kind is Kind.CHAT else ()):
        function = call.get("function") or {}
        for name in ("name", "arguments"):
            if isinstance(text := function.get(name), str) and text:
                yield (name, call.get("index", place)), text

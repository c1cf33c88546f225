"""Which prompts a replica may hold in its prompt cache whole: mlx_lm.server must not be asked for one of those.

A prompt that equals a cached key ends the generation thread ("Sequence 0 has an empty prompt."; mlx-lm 0.32.2,
``fetch_nearest_cache`` and ``insert_segments``), with every request on it. The keys, as seen on the real server:

    prompt + answer                    a completion that is continued: P, then P with the answer
    prompt without its last token      P, then P shortened by a token; until P is answered, for good if P is cancelled
    prompt without its thinking tail   a chat with thinking off, then on; for good where caches cannot be trimmed
    prompt + answer + end of turn      a chat, then the same with the answer as its last message (some templates)

An engine fix of the instrument (``exact_hit``) has such a prompt read: then nothing is to be avoided.

Keys are tokens, and only texts are known here: what may be equal counts as equal, so that a wrong guess costs some time
and no answer. Texts are compared without white space (the server strips the first space of an answer). Each comparison
takes constant time; the records are digests, and bounded.

Pure.
"""

import re
from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any

from backends.domain.report import EngineReport
from backends.domain.snapshot import Seat
from gateway.api.json_codec import dumps
from gateway.api.kinds import Kind
from gateway.request import ParsedRequest

MAX_TEXTS = 256  # completions on record, per replica
MAX_CHATS = 2048  # conversations on record, per replica
MAX_VARIANTS = 8  # settings of one conversation on record
SLICE = 64 << 10  # characters split at a time: the words of a long text take thirty times its memory
MARGIN = 64  # characters without white space: the longest last token, stop word or end of turn
SETTINGS = ("chat_template_kwargs", "role_mapping")  # they change the prompt of the same messages
END_OF_TURN = re.compile(r"<[^<>]{1,40}>")  # what ends an answer and is not shown, where a client writes it out


class Text:
    """A growing text without its white space: the digest of all but its last ``keep`` characters, and those."""

    __slots__ = ("_head", "_keep", "length", "tail")

    def __init__(self, text: str, keep: int) -> None:
        self._keep = keep
        self._head = blake2b(digest_size=16)
        self.length = 0
        self.tail = ""
        self.add(text)

    def add(self, text: str) -> None:
        text = "".join(["".join(text[at : at + SLICE].split()) for at in range(0, len(text), SLICE)])
        self.length += len(text)
        text = self.tail + text
        cut = max(0, len(text) - self._keep)
        self._head.update(text[:cut].encode("utf-8", "surrogatepass"))
        self.tail = text[cut:]

    @property
    def begin(self) -> int:
        """Where the tail begins."""
        return self.length - len(self.tail)

    def digest(self, length: int) -> bytes:
        """Of its first characters; ``length`` from ``begin`` on."""
        head = self._head.copy()
        head.update(self.tail[: length - self.begin].encode("utf-8", "surrogatepass"))
        return head.digest()

    def copy(self, keep: int) -> "Text":
        """A copy that keeps ``keep`` characters, not more than this one."""
        other = Text("", keep)
        other._head, other.length, other.tail = self._head.copy(), self.length, self.tail
        other.add("")
        return other


NO_TEXT = Text("", 0)  # is not added to


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is compared of one request. ``chat``: keys of its conversation, the whole first (``affinity.Path``);
    ``variant``: of its settings; ``exact``: digest of the prompt of a completion."""

    chat: tuple[int, ...] = ()
    ends_in_answer: bool = False
    variant: int = 0
    text: Text = NO_TEXT
    exact: bytes = b""
    stops: tuple[str, ...] = ()


NO_PROMPT = Prompt()


class Beginning:
    """The first ``at`` characters of the prompt of a completion, which grow without being read anew."""

    def __init__(self) -> None:
        self.at = 0
        self._text = Text("", 2 * MARGIN)
        self._digest = blake2b(digest_size=16)

    def until(self, at: int, text: str) -> "Beginning":
        """A longer one. ``text``: all of the prompt. Takes time linear in what is added."""
        longer, more = Beginning(), text[self.at : at]
        longer.at, longer._text, longer._digest = at, self._text.copy(2 * MARGIN), self._digest.copy()
        longer._text.add(more)
        longer._digest.update(more.encode("utf-8", "surrogatepass"))
        return longer

    @property
    def prompt(self) -> Prompt:
        return Prompt(text=self._text, exact=self._digest.digest())


def prompt_of(parsed: ParsedRequest, turns: tuple[int, ...]) -> Prompt:
    """``turns``: of a chat, see ``affinity.Path``. Takes time linear in the size of the request."""
    params = parsed.params
    if parsed.kind is Kind.CHAT:
        settings = hash(dumps([params.get(name) for name in SETTINGS]))
        last: Any = params["messages"][-1]
        return Prompt(chat=turns[:2], ends_in_answer=last["role"] == "assistant", variant=settings)
    prompt: str = params["prompt"]
    stops = ("".join(stop.split())[:MARGIN] for stop in _texts(params.get("stop")))
    return replace(Beginning().until(len(prompt), prompt).prompt, stops=tuple(stop for stop in stops if stop))


def _texts(stop: object) -> Sequence[str]:
    return [stop] if isinstance(stop, str) else stop if isinstance(stop, list) else ()


class Trace:
    """One completion that was sent: its prompt, and the prompt with what has come of the answer."""

    __slots__ = ("_answered", "_exact", "_prompt", "_stops", "_whole")

    def __init__(self, prompt: Prompt) -> None:
        self._exact = prompt.exact
        self._stops = prompt.stops
        self._prompt = prompt.text.copy(MARGIN)
        self._whole = prompt.text.copy(MARGIN)
        self._answered = False

    def add(self, answer: str) -> None:
        """A piece of the answer has come."""
        if answer:
            self._answered = True
            self._whole.add(answer)

    def may_equal(self, prompt: Prompt) -> bool:
        """Whether a key of this completion may be equal to ``prompt``."""
        shorter = prompt.exact != self._exact and _remainder(prompt.text, self._prompt) is not None
        if shorter or not self._answered:
            return shorter
        beyond = _remainder(self._whole, prompt.text)
        return beyond is not None and self._may_be_hidden(beyond)

    def _may_be_hidden(self, beyond: str) -> bool:
        """The text after an answer may be tokens that ended it, which the server does not show."""
        return not beyond or beyond in self._stops or END_OF_TURN.fullmatch(beyond) is not None


def _remainder(short: Text, long: Text) -> str | None:
    """What ``long`` has after ``short``, at most about ``MARGIN`` characters; None = it is no continuation of it."""
    at = max(short.begin, long.begin)
    if at > short.length or short.digest(at) != long.digest(at):
        return None
    end, rest = short.tail[at - short.begin :], long.tail[at - long.begin :]
    return rest[len(end) :] if rest.startswith(end) else None


@dataclass(slots=True)
class _Seen:
    """By one instance of a replica. ``chats``: settings with which each conversation was sent."""

    generation: int
    texts: deque[Trace] = field(default_factory=lambda: deque(maxlen=MAX_TEXTS))
    chats: OrderedDict[int, set[int]] = field(default_factory=OrderedDict)


class CachedPrompts:
    """Of all replicas. Nothing is on record of an instance that has ended: its cache has ended with it."""

    def __init__(self) -> None:
        self._seen: dict[str, _Seen] = {}

    def sent(self, seat: Seat, prompt: Prompt) -> Trace | None:
        """The request is sent to ``seat``. A completion's answer is added to what is returned as it comes."""
        seen = self._of(seat)
        if seen is None:
            seen = self._seen[seat.backend] = _Seen(seat.generation)
        if prompt.chat:
            _note_chat(seen.chats, prompt)
            return None
        trace = Trace(prompt)
        seen.texts.append(trace)
        return trace

    def forget(self, seat: Seat, trace: Trace) -> None:
        """A longer entry has taken the place of this one's."""
        seen = self._of(seat)
        if seen is not None and trace in seen.texts:
            seen.texts.remove(trace)

    def may_hold(self, seat: Seat, prompt: Prompt) -> bool:
        seen = self._of(seat)
        if seen is None:
            return False
        if not prompt.chat:
            return any(trace.may_equal(prompt) for trace in seen.texts)
        variants = seen.chats.get(prompt.chat[0])
        if variants is not None and (len(variants) > 1 or prompt.variant not in variants):
            return True
        return prompt.ends_in_answer and any(key in seen.chats for key in prompt.chat[1:])

    def risky(self, seats: Iterable[Seat], prompt: Prompt) -> frozenset[Seat]:
        """Those among ``seats`` that may hold the prompt."""
        return frozenset([seat for seat in seats if self.may_hold(seat, prompt)])

    def _of(self, seat: Seat) -> _Seen | None:
        seen = self._seen.get(seat.backend)
        return seen if seen is not None and seen.generation == seat.generation else None


def reads_cached_prompts(report: EngineReport | None) -> bool:
    """Whether the process that tells this reads a prompt that it has cached whole, instead of ending."""
    return report is not None and report.fixes.get("exact_hit") == "on"


def _note_chat(chats: OrderedDict[int, set[int]], prompt: Prompt) -> None:
    variants = chats.setdefault(prompt.chat[0], set())
    chats.move_to_end(prompt.chat[0])
    if len(variants) < MAX_VARIANTS:
        variants.add(prompt.variant)
    if len(chats) > MAX_CHATS:
        chats.popitem(last=False)

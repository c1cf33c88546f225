"""Prompt-cache affinity: how much of a prompt each replica has in its prompt cache, as far as it can be told from here.

A prompt is a chain of pieces: the tools, then each message, long ones in blocks. Each piece has a key, a hash of it and
of all before it, so that two prompts share a key exactly as far as they begin alike. That is what the server's cache
goes by too, so nothing else identifies a conversation: a subagent, or a job for a title, has the session of its parent
and another prompt, and shares with it what both begin with, such as tools and instructions. A line that changes (a
date) costs what comes after it, here as there.

What an instance has answered is taken to be in its cache until its answers say otherwise: ``cached_tokens`` that are
far fewer than expected mean that the conversation was evicted, and with it those that were used less recently.

A *hint* is the name that a client gives its session, or its ``prompt_cache_key``. It counts only where no beginning of
the prompt is known.

Caveat: only texts are known here, not tokens. A template may leave out a part of an earlier answer (its reasoning), so
that less is found than was expected; that share is learned, per instance.

Pure.
"""

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from backends.domain.snapshot import Seat
from gateway.api.json_codec import dumps
from gateway.api.kinds import Kind
from gateway.request import ParsedRequest

SESSION_HEADERS = (  # as opencode, Claude Code and Codex send them
    b"x-session-affinity",
    b"x-session-id",
    b"x-claude-code-session-id",
    b"thread-id",
    b"session-id",
)
MAX_HINTS = 4096
MAX_CONVERSATIONS = 1024  # of one replica
MAX_KEYS = 16_384  # of one replica
MAX_PIECES = 2048  # of one prompt; more are not told apart
BLOCK = 2048  # bytes of a long message that are told apart
FINE_BLOCK, FINE = 256, 8192  # bytes of the first ones of a completion, and how far these go
SHARED = 512  # tokens; fewer at the beginning of another conversation are no reason to go where they are
ALIKE = 64  # tokens; of two instances that differ by less neither is preferred
NOTICED = 256  # expected tokens from which on it is noticed that they were not found
LEARNED = 0.2  # weight of the latest answer in what is learned


class Path(NamedTuple):
    """The pieces of one prompt. ``keys``: of its beginnings, the shortest first; ``sizes``: bytes of these; ``turns``:
    the keys that end with its last messages, the whole first. ``hint``: 0 = none."""

    keys: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()
    turns: tuple[int, ...] = ()
    hint: int = 0


NO_PATH = Path()


def session_of(header: Callable[[bytes], bytes]) -> bytes:
    """``header``: name → value, b"" if absent."""
    return next((value for name in SESSION_HEADERS if (value := header(name))), b"")


def path_of(parsed: ParsedRequest, model: str, session: bytes = b"") -> Path:
    """``session``: as the client named it. Takes time linear in the size of the prompt."""
    hint = parsed.cache_key.encode("utf-8", "surrogatepass") or session
    keys: list[int] = []
    sizes: list[int] = []
    turns: list[int] = []
    key, size = hash((model, parsed.kind)), 0
    chat = parsed.kind is Kind.CHAT
    for message in _messages(parsed):
        for piece in (message,) if chat and len(message) <= 2 * BLOCK else _pieces(message, fine=0 if chat else FINE):
            key, size = hash((key, piece)), size + len(piece)
            if len(keys) < MAX_PIECES:
                keys.append(key)
                sizes.append(size)
        turns.append(key)
    return Path(tuple(keys), tuple(sizes), tuple(turns[:-3:-1]), hash((model, hint)) if hint else 0)


def _messages(parsed: ParsedRequest) -> Iterator[bytes]:
    """What the template puts into the prompt, in its order as far as it matters: the tools come with the instructions,
    and both seldom change."""
    if parsed.kind is Kind.COMPLETION:
        yield parsed.params["prompt"].encode("utf-8", "surrogatepass")
        return
    if "tools" in parsed.params:
        yield dumps(parsed.params["tools"])
    for message in parsed.params["messages"]:
        yield dumps(message)


def _pieces(message: bytes, fine: int) -> Iterator[bytes]:
    """A text that goes on is cut where it was before. ``fine``: bytes that are cut into smaller blocks."""
    fine = min(fine, len(message))
    for begin in range(0, fine, FINE_BLOCK):
        yield message[begin : begin + FINE_BLOCK]
    for begin in range(fine, len(message), BLOCK):
        yield message[begin : begin + BLOCK]


class Answered(NamedTuple):
    """What the usage of an answer says, in tokens. ``cached``: of the prompt, None = the backend does not report it."""

    prompt: int
    answer: int = 0
    cached: int | None = None


@dataclass(slots=True)
class _Beginning:
    """``tokens`` of it; ``used``: conversations that begin so."""

    tokens: int
    used: int = 0


@dataclass(slots=True)
class _Conversation:
    """``answer``: tokens of the answer to its last prompt."""

    keys: tuple[int, ...]
    answer: int


@dataclass(slots=True)
class _Cache:
    """What one instance has in its prompt cache. ``conversations``: by the key of the whole, the one used last at the
    end. ``found``: share of the expected tokens that is found; ``rate``: tokens per byte, 0.0 = not known."""

    generation: int
    conversations: OrderedDict[int, _Conversation] = field(default_factory=OrderedDict)
    beginnings: dict[int, _Beginning] = field(default_factory=dict)
    found: float = 1.0
    rate: float = 0.0

    def depth(self, keys: Sequence[int]) -> int:
        """How many of the pieces are there: who has a key has all before it."""
        if not keys or keys[0] not in self.beginnings:
            return 0
        if keys[-1] in self.beginnings:
            return len(keys)
        return bisect_left(range(len(keys)), True, key=lambda at: keys[at] not in self.beginnings)

    def held(self, path: Path, depth: int) -> int:
        """Tokens of the prompt that are probably found. ``depth``: of the path, at least 1."""
        last = path.keys[depth - 1]
        tokens = self.beginnings[last].tokens
        if depth < len(path.keys) and (goes_on := self.conversations.get(last)) is not None:
            tokens += goes_on.answer
        return tokens if self.found == 1.0 else round(tokens * self.found)

    def whole(self, path: Path, depth: int) -> float:
        """Tokens of the prompt, the part that is known as it was counted; 0.0 = not known."""
        rest = path.sizes[-1] - (path.sizes[depth - 1] if depth else 0)
        return rest * self.rate + (self.beginnings[path.keys[depth - 1]].tokens if depth else 0)

    def add(self, path: Path, answered: Answered) -> None:
        """The server keeps the longest conversation alone; the ones that it goes on from are a part of it."""
        rate = answered.prompt / path.sizes[-1]
        self.rate += (LEARNED if self.rate else 1.0) * (rate - self.rate)
        depth = self.depth(path.keys)
        goes_on = depth > 0 and self.conversations.pop(path.keys[depth - 1], None) is not None
        for key in path.keys[: max(0, depth - 1)]:
            if key in self.conversations:
                self.remove(key)
        for at in range(depth if goes_on else 0, len(path.keys)):  # the beginnings of what it goes on from are its own
            tokens = answered.prompt * path.sizes[at] // path.sizes[-1]
            self.beginnings.setdefault(path.keys[at], _Beginning(tokens)).used += 1
        self.conversations[path.keys[-1]] = _Conversation(path.keys, answered.answer)
        while len(self.conversations) > MAX_CONVERSATIONS or len(self.beginnings) > MAX_KEYS:
            self.remove(next(iter(self.conversations)))

    def remove(self, whole: int) -> None:
        for key in self.conversations.pop(whole).keys:
            beginning = self.beginnings[key]
            beginning.used -= 1
            if not beginning.used:
                del self.beginnings[key]

    def learn(self, path: Path, cached: int, expected: int) -> None:
        """An answer found ``cached`` tokens, where ``expected`` were."""
        share = min(1.0, cached / expected)
        if share < self.found / 2:
            self._evicted(path, cached)
        self.found += LEARNED * (share - self.found)

    def _evicted(self, path: Path, cached: int) -> None:
        """Of the beginnings of this prompt only those of so many tokens were left. The server evicts what was used
        least recently, so that what is older than the conversations that had more is gone as well."""
        known = path.keys[: self.depth(path.keys)]
        lost = next((at for at, key in enumerate(known) if self.beginnings[key].tokens > cached), len(known))
        if lost == len(known):
            return
        wholes = list(self.conversations)
        had = [at for at, whole in enumerate(wholes) if known[lost] in self.conversations[whole].keys[lost : lost + 1]]
        for whole in wholes[: max(had, default=-1) + 1]:
            self.remove(whole)


class Known(NamedTuple):
    """``held``: tokens of the beginning of a prompt that each instance probably has in its cache; those that have some.
    ``tokens``: of the whole prompt, as these backends probably count; 0 = not known."""

    held: Mapping[Seat, int]
    tokens: int


class Affinity:
    """Of the replicas of all models."""

    def __init__(self) -> None:
        self._caches: dict[str, _Cache] = {}  # by backend
        self._hints: OrderedDict[int, Seat] = OrderedDict()

    def known(self, path: Path, backends: Iterable[str]) -> Known:
        """What these backends have shown."""
        held: dict[Seat, int] = {}
        best, deepest = None, -1
        for backend in backends if path.keys else ():
            cache = self._caches.get(backend)
            if cache is None:
                continue
            depth = cache.depth(path.keys)
            if depth and (cached := cache.held(path, depth)):
                held[Seat(backend, cache.generation)] = cached
            if depth > deepest:
                best, deepest = cache, depth
        return Known(held, 0 if best is None else round(best.whole(path, deepest)))

    def hinted(self, path: Path) -> Seat | None:
        """The instance that answered last to the same hint."""
        return self._hints.get(path.hint)

    def note(self, path: Path, seat: Seat, answered: Answered, expected: int = 0) -> None:
        """``seat`` has answered. ``expected``: tokens that were ``held`` there as the request was sent there."""
        if path.hint:
            self._hints[path.hint] = seat
            self._hints.move_to_end(path.hint)
            if len(self._hints) > MAX_HINTS:
                self._hints.popitem(last=False)
        if not path.keys:
            return
        cache = self._caches.get(seat.backend)
        if cache is None or cache.generation < seat.generation:
            cache = self._caches[seat.backend] = _Cache(seat.generation)
        if cache.generation > seat.generation:
            return  # an answer of an instance that has ended
        if answered.cached is not None and expected >= NOTICED:
            cache.learn(path, answered.cached, round(expected / cache.found))
        cache.add(path, answered)


def preferred(held: Mapping[Seat, int], tokens: int) -> Seat | None:
    """The instance to prefer for a prompt of so many tokens: that which has the most of it, if that is most of the
    prompt, or much. None = none, or several have as much."""
    most = max(held.values(), default=0)
    if not most or most < min(SHARED, tokens // 2):
        return None
    as_much = [seat for seat, cached in held.items() if most - cached < ALIKE]
    return as_much[0] if len(as_much) == 1 else None

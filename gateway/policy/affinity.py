"""Prompt-cache affinity: which replica holds the beginning of a conversation in its prompt cache.

A request that names its session is routed to the replica that answered the last request of that session. Otherwise the
conversation is identified by its messages: each answered request stores a hash of all its messages, and the next turn
begins with the same ones. Only whole requests are stored, not their prefixes, so that conversations which share just a
system prompt do not match.

Pure.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

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
MAX_CONVERSATIONS = 4096


def session_of(header: Callable[[bytes], bytes]) -> bytes:
    """``header``: name → value, b"" if absent."""
    return next((value for name in SESSION_HEADERS if (value := header(name))), b"")


def turns_of(parsed: ParsedRequest) -> tuple[int, ...]:
    """A key for each beginning of a conversation, the longest first; () for a completion. Takes time linear in the size
    of its messages."""
    if parsed.kind is not Kind.CHAT:
        return ()
    key = hash(dumps(parsed.params.get("tools")))
    return tuple(key := hash((key, dumps(message))) for message in parsed.params.get("messages", ()))[::-1]


def keys_of(turns: tuple[int, ...], model: str, session: bytes) -> tuple[int, ...]:
    """Keys of the conversation: first the key under which this request will be stored, then those of earlier turns,
    longest first."""
    if session:
        return (hash((model, session)),)
    return tuple(hash((model, turn)) for turn in turns)


@dataclass(frozen=True, slots=True)
class Held:
    """What an instance has in its prompt cache since it answered. ``tokens``: of the prompt and the answer, 0 = not
    known; ``chars``: of the prompt."""

    seat: Seat
    tokens: int
    chars: int


class Affinity:
    def __init__(self, max_conversations: int = MAX_CONVERSATIONS) -> None:
        self._max = max_conversations
        self._held: OrderedDict[int, Held] = OrderedDict()

    def of(self, keys: Iterable[int]) -> Held | None:
        return next((self._held[key] for key in keys if key in self._held), None)

    def note(self, keys: tuple[int, ...], held: Held) -> None:
        """The request with these keys was answered."""
        if not keys:
            return
        self._held.pop(keys[0], None)
        self._held[keys[0]] = held
        if len(self._held) > self._max:
            self._held.popitem(last=False)

"""Prompt-cache affinity: which replica holds the beginning of a conversation in its prompt cache.

A request that names its session is routed to the replica that answered the last request of that session. Otherwise the
conversation is identified by its messages: each answered request stores a hash of all its messages, and the next turn
begins with the same ones. Only whole requests are stored, not their prefixes, so that conversations which share just a
system prompt do not match.

Pure.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable

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


class Affinity:
    def __init__(self, max_conversations: int = MAX_CONVERSATIONS) -> None:
        self._max = max_conversations
        self._seats: OrderedDict[int, Seat] = OrderedDict()

    def of(self, keys: Iterable[int]) -> Seat | None:
        return next((self._seats[key] for key in keys if key in self._seats), None)

    def note(self, keys: tuple[int, ...], seat: Seat) -> None:
        """The request with these keys was answered by ``seat``."""
        if not keys:
            return
        self._seats.pop(keys[0], None)
        self._seats[keys[0]] = seat
        if len(self._seats) > self._max:
            self._seats.popitem(last=False)

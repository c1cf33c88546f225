"""Which replica holds the beginning of a conversation in its prompt cache.

A client that names its session is sent where its last request was answered; else the conversation is known by its
messages: each request that was answered leaves a hash of all of them, and the next turn begins with the same ones. A
system prompt that many conversations share is not enough: only whole requests are remembered, not what they begin with.

Pure.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

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
MAX_CONVERSATIONS = 4096  # conversations


def session_of(header: Callable[[bytes], bytes]) -> bytes:
    """``header`` gives one by its name, b"" = there is none."""
    return next((value for name in SESSION_HEADERS if (value := header(name))), b"")


def keys_of(parsed: ParsedRequest, model: str, session: bytes) -> tuple[int, ...]:
    """What the conversation may be known by: first what this request will be remembered as, then what earlier ones
    were, the longest first."""
    if session:
        return (hash((model, session)),)
    if parsed.kind is not Kind.CHAT:
        return ()
    return tuple(reversed(list(_chain(parsed.params, model))))


def _chain(params: dict[str, Any], model: str) -> Iterable[int]:
    key = hash((model, dumps(params.get("tools"))))
    for message in params.get("messages", ()):
        key = hash((key, dumps(message)))
        yield key


class Affinity:
    def __init__(self, max_conversations: int = MAX_CONVERSATIONS) -> None:
        self._max = max_conversations
        self._seats: OrderedDict[int, Seat] = OrderedDict()

    def of(self, keys: Iterable[int]) -> Seat | None:
        return next((self._seats[key] for key in keys if key in self._seats), None)

    def note(self, keys: tuple[int, ...], seat: Seat) -> None:
        """The request with these keys was answered there."""
        if not keys:
            return
        self._seats.pop(keys[0], None)
        self._seats[keys[0]] = seat
        if len(self._seats) > self._max:
            self._seats.popitem(last=False)

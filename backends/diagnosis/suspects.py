"""Which of the requests in flight may have brought a backend down. (cause, what each was doing) -> the suspects.

    memory, GPU timeout     the largest prompt in prefill: that is where memory peaks, and a command buffer takes long
    a crash, a wedge        whoever has no token yet: what kills a generation thread does so before the first one
    a stall                 nobody, unless it was alone: it strikes whoever is there
    a SIGKILL               nobody: it comes from outside (where memory was short, the cause is memory)

Decoding requests are bystanders: what they ask for has been shown to work. With several suspects each is tried again
alone, which tells them apart.

Pure: no I/O, no clock.
"""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from backends.domain.failure import Blame, Cause, Failure

Key = TypeVar("Key", bound=Hashable)

MEMORY = frozenset({Cause.OOM, Cause.RESOURCE_LIMIT})
BY_SIZE = MEMORY | {Cause.GPU_TIMEOUT}


@dataclass(frozen=True, slots=True)
class RequestProgress:
    """What one request was doing. ``tokens``: of its prompt, as the backend counted, else as estimated.

    ``prefilling``: the backend has reported progress on the prompt; ``decoding``: a token has come.
    """

    tokens: int = 0
    prefilling: bool = False
    decoding: bool = False


def suspects(failure: Failure, sights: Mapping[Key, RequestProgress]) -> frozenset[Key]:
    """Of the requests that had been sent to the backend when it failed."""
    if failure.blame is not Blame.BACKEND or failure.cause is Cause.KILLED or failure.truncated or not sights:
        return frozenset()
    if len(sights) == 1:
        return frozenset(sights)
    if failure.cause is Cause.STALLED:
        return frozenset()
    undecided = {key: sight for key, sight in sights.items() if not sight.decoding}
    if failure.cause not in BY_SIZE:
        return frozenset(undecided)
    if not undecided:
        return _dominant(sights)
    in_prefill = {key: sight for key, sight in undecided.items() if sight.prefilling}
    return _largest(in_prefill or undecided)


def _largest(sights: Mapping[Key, RequestProgress]) -> frozenset[Key]:
    most = max(sight.tokens for sight in sights.values())
    return frozenset(key for key, sight in sights.items() if sight.tokens == most)


def _dominant(sights: Mapping[Key, RequestProgress]) -> frozenset[Key]:
    """All decode: one is to blame only if its context is most of what there was."""
    total = sum(sight.tokens for sight in sights.values())
    return frozenset(key for key, sight in sights.items() if 2 * sight.tokens > total)

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


def suspects(failure: Failure, progress_of: Mapping[Key, RequestProgress]) -> frozenset[Key]:
    """Of the requests that had been sent to the backend when it failed."""
    if failure.blame is not Blame.BACKEND or failure.cause is Cause.KILLED or not progress_of:
        return frozenset()
    if len(progress_of) == 1:
        return frozenset(progress_of)
    if failure.cause is Cause.STALLED:
        return frozenset()
    undecided = {key: progress_now for key, progress_now in progress_of.items() if not progress_now.decoding}
    if failure.cause not in BY_SIZE:
        return frozenset(undecided)
    if not undecided:
        return _dominant(progress_of)
    in_prefill = {key: progress_now for key, progress_now in undecided.items() if progress_now.prefilling}
    return _largest(in_prefill or undecided)


def _largest(progress_of: Mapping[Key, RequestProgress]) -> frozenset[Key]:
    most = max(progress_now.tokens for progress_now in progress_of.values())
    return frozenset(key for key, progress_now in progress_of.items() if progress_now.tokens == most)


def _dominant(progress_of: Mapping[Key, RequestProgress]) -> frozenset[Key]:
    """All decode: one is to blame only if its context is most of what there was."""
    total = sum(progress_now.tokens for progress_now in progress_of.values())
    return frozenset(key for key, progress_now in progress_of.items() if 2 * progress_now.tokens > total)

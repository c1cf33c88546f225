"""Which requests in flight may have caused a replica's failure: (cause, progress of each request) -> the suspects.

    memory, GPU timeout     the largest prompt in prefill: there memory peaks, and command buffers take longest
    a crash, a wedge        requests without a token: what kills a generation thread does so before the first token
    a stall                 no suspect, unless exactly one request was in flight: a stall hits any request
    a SIGKILL               no suspect: it comes from outside (if memory was short, the cause is memory)

Decoding requests are bystanders: the backend has already generated for them. With several suspects each is retried
alone, which tells them apart.

Pure: no I/O, no clock.
"""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from backends.domain.failure import Blame, Cause, Failure

Key = TypeVar("Key", bound=Hashable)

MEMORY = frozenset({Cause.OOM, Cause.RESOURCE_LIMIT})
LARGEST_PROMPT_CAUSES = MEMORY | {Cause.GPU_TIMEOUT}


@dataclass(frozen=True, slots=True)
class RequestProgress:
    """Progress of one request. ``tokens``: size of its prompt; ``counted``: by the backend, or as it counts, else
    estimated.

    ``prefilling``: the backend has reported progress on the prompt; ``decoding``: a token was received.
    ``prompt_read``: the backend has reported the whole prompt as processed; it may withhold the first tokens.
    """

    tokens: int = 0
    prefilling: bool = False
    decoding: bool = False
    counted: bool = False
    prompt_read: bool = False

    @property
    def begun(self) -> bool:
        """The backend generates the answer, as far as it has told."""
        return self.decoding or self.prompt_read


def suspects(failure: Failure, progress_of: Mapping[Key, RequestProgress]) -> frozenset[Key]:
    """``progress_of``: the requests that had been sent to the backend when it failed."""
    if failure.blame is not Blame.BACKEND or failure.cause is Cause.KILLED or not progress_of:
        return frozenset()
    if len(progress_of) == 1:
        return frozenset(progress_of)
    if failure.cause is Cause.STALLED:
        return frozenset()
    undecided = {key: progress for key, progress in progress_of.items() if not progress.decoding}
    if failure.cause not in LARGEST_PROMPT_CAUSES:
        return frozenset(undecided)
    if not undecided:
        return _dominant(progress_of)
    in_prefill = {key: progress for key, progress in undecided.items() if progress.prefilling}
    return _largest(in_prefill or undecided)


def _largest(progress_of: Mapping[Key, RequestProgress]) -> frozenset[Key]:
    most = max(progress.tokens for progress in progress_of.values())
    return frozenset(key for key, progress in progress_of.items() if progress.tokens == most)


def _dominant(progress_of: Mapping[Key, RequestProgress]) -> frozenset[Key]:
    """All are decoding: a request is a suspect only if it has more than half of all tokens."""
    total = sum(progress.tokens for progress in progress_of.values())
    return frozenset(key for key, progress in progress_of.items() if 2 * progress.tokens > total)

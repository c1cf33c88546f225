"""Which requests in flight may have caused a replica's failure: (cause, progress of each request) -> the suspects.

    memory, GPU timeout     the large prompts without a token: there memory peaks, and command buffers take longest;
                            where all decode, the largest of them
    a crash, a wedge        requests without a token: what kills a generation thread does so before the first token
    a stall                 no suspect, unless exactly one request was in flight: a stall hits any request
    a SIGKILL               no suspect: it comes from outside (if memory was short, the cause is memory)

Decoding requests are bystanders: the backend has already generated for them. With several suspects each is retried
alone, which tells them apart.

How large is large: mlx_lm.server pads a batch to its longest member, so its memory is members times the longest
(``BatchKVCache.merge``). How much fits is not known: the largest may be many times too large, or all a little. The
bystanders are tried again together, so they are the decoding ones, and of the others the short ones, an eighth of the
largest of all at most, as long as they make with them a batch of at most half of what was read when memory ran out.
Where all decode, half of the batch comes back at once.

Pure: no I/O, no clock.
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple, TypeVar

from backends.domain.failure import Blame, Cause, Failure
from backends.mlx_server import PREFILL_STEP, PROMPT_CONCURRENCY

Key = TypeVar("Key", bound=Hashable)

MEMORY = frozenset({Cause.OOM, Cause.RESOURCE_LIMIT})
LARGEST_PROMPT_CAUSES = MEMORY | {Cause.GPU_TIMEOUT}


class RequestProgress(NamedTuple):
    """Progress of one request. ``tokens``: size of its prompt; ``counted``: by the backend, or as it counts, else
    estimated.

    ``prefilling``: the backend has reported progress on the prompt; ``read``: tokens of it that it has read, as far as
    it has reported; ``decoding``: a token was received. ``prompt_read``: the backend has reported the whole prompt as
    processed; it may withhold the first tokens.
    """

    tokens: int = 0
    prefilling: bool = False
    decoding: bool = False
    counted: bool = False
    prompt_read: bool = False
    read: int = 0

    @property
    def begun(self) -> bool:
        """The backend generates the answer, as far as it has told."""
        return self.decoding or self.prompt_read

    @property
    def in_memory(self) -> int:
        """Tokens that it has in the batch, with the step that is being read."""
        return self.tokens if self.decoding else min(self.tokens, self.read + PREFILL_STEP)


NO_PROGRESS = RequestProgress()


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
        return _large(progress_of, room=_read(progress_of) / 2)
    decoding = [progress.tokens for key, progress in progress_of.items() if key not in undecided]
    short = max(progress.tokens for progress in progress_of.values()) / PROMPT_CONCURRENCY
    large = _large(undecided, room=_read(progress_of) / 2, beside=decoding)
    return large | {key for key, progress in undecided.items() if progress.tokens > short}


def _read(progress_of: Mapping[Key, RequestProgress]) -> int:
    """Tokens of the batch, with its padding."""
    decoding = sum(progress.decoding for progress in progress_of.values())
    members = decoding + min(len(progress_of) - decoding, PROMPT_CONCURRENCY)
    return members * max(progress.in_memory for progress in progress_of.values())


def _large(progress_of: Mapping[Key, RequestProgress], *, room: float, beside: Sequence[int] = ()) -> frozenset[Key]:
    """All but the smallest that make a batch of at most ``room`` tokens, with others of ``beside`` tokens."""
    longest = max(beside, default=0)
    by_size = sorted(progress_of, key=lambda key: progress_of[key].tokens)
    return frozenset(
        key
        for count, key in enumerate(by_size, 1)
        if (len(beside) + min(count, PROMPT_CONCURRENCY)) * max(progress_of[key].tokens, longest) > room
    )

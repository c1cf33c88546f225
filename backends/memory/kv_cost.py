"""What a batch costs inside mlx_lm.server, as a function of its members and their tokens; bytes.

The server pads a batch to its longest member: a batch is a rectangle, (members) x (the longest), per layer. Prompts
that are being read, and sequences that are being decoded, are two batches. Beside the rectangles there are, for a
moment:

    a rewrite   of a rectangle that grows, or that members join or leave: layers are evaluated one after the other, and
                each lets go of what it was made from
    alignment   of prompts that were read to different lengths
    masks       of a prefill step, one for each kind of attention
    scores      of that step, where attention is not fused
    activations of that step

Read in ``mlx_lm/generate.py`` and ``models/cache.py`` of 0.32 and in mlx 0.32, and measured:
``benchmarks/batch_memory.py``.

Pure.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from backends.mlx_server import PREFILL_STEP, PROMPT_CONCURRENCY

CACHE_STEP = 256  # tokens by which mlx_lm grows a KV cache
TOGETHER = 20  # arrays that mlx computes side by side, before it goes deeper (MLX_BFS_MAX_WIDTH in mlx/utils.h)
MASK = 1  # byte, for each token that is read and each that it may look at


def grown(tokens: int) -> int:
    """Tokens that a cache has room for, once it holds ``tokens``."""
    return -(-tokens // CACHE_STEP) * CACHE_STEP


@dataclass(frozen=True, slots=True)
class KvCost:
    """Of one model. ``per_token``: of the layers that keep every token; ``windowed``: of those that keep the last
    ``window`` tokens, per token; ``windows``: how many these are; ``fixed``: of the state of the ``linears`` linear
    layers, per sequence; ``layers``: that have a cache. ``step``: tokens of a prompt that are read at a time, of
    ``readers`` prompts together; ``scores``: per token that is read and token that it looks at, 0 = fused;
    ``activations``: per token that is read."""

    per_token: int
    windowed: int = 0
    window: int = 0
    windows: int = 0
    fixed: int = 0
    layers: int = 1
    step: int = PREFILL_STEP
    scores: int = 0
    activations: int = 0
    linears: int = 0
    readers: int = PROMPT_CONCURRENCY

    @property
    def fulls(self) -> int:
        """Layers that keep every token."""
        return self.layers - self.windows - self.linears

    def decoding(self, members: int, longest: int) -> int:
        """Of the rectangle of sequences that are being decoded."""
        return self.rectangle(members, grown(longest), min(grown(longest), self.window))

    def reading(self, members: int, longest: int) -> int:
        """Of the rectangle of prompts that are being read: a layer with a window also keeps the last step, and has no
        more room than it needs."""
        return self.rectangle(members, grown(longest), min(longest, self.window - 1 + self.step))

    def rectangle(self, rows: int, room: int, windowed: int) -> int:
        """``room``: tokens that a row of a layer has room for; ``windowed``: in a layer with a window."""
        return rows * (self.per_token * room + self.windowed * windowed + self.fixed)

    def layer(self, rows: int, room: int, windowed: int) -> int:
        """Of that, the largest layer."""
        largest = max(
            self.per_token * room // max(1, self.fulls),
            self.windowed * windowed // max(1, self.windows),
            self.fixed // max(1, self.linears),
        )
        return rows * largest

    def prefill(self, members: int, tokens: int, longest: int) -> int:
        """For a moment, while ``tokens`` tokens of each prompt are read, up to token ``longest``."""
        seen = longest if self.fulls else 0
        behind = min(longest, self.window - 1 + tokens) if self.windows else 0
        pairs = self.scores * max(seen, behind) + MASK * (seen + behind)
        return members * tokens * (pairs + self.activations)

    def aligned(self, rectangle: int) -> int:
        """For a moment, of prompts that were read to different lengths: keys and values are rolled, side by side with
        the two arrays of padding that each layer has."""
        return rectangle * min(TOGETHER // 4, self.layers) // self.layers

    def leaving(self, tokens: Sequence[int], passed: int) -> int:
        """Of sequences on their way from the batch to the prompt cache. ``passed``: tokens that have passed through the
        windows of the batch. Where these are full, the keys and values of one that does not fill them are brought into
        the order of time before they are cut out, side by side."""
        stored = sum(self.rectangle(1, each, min(each, self.window)) for each in tokens)
        if passed < self.window or min(tokens, default=self.window) >= self.window:
            return stored
        return stored + self.windowed * self.window * min(TOGETHER // 2, self.windows) // self.windows

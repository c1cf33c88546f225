"""What a batch costs inside mlx_lm.server, as a function of its members and their tokens; bytes.

The server pads a batch to its longest member: a batch is a rectangle, (members) x (the longest), per layer. Prompts
that are being read, and sequences that are being decoded, are two batches. Beside the rectangles there are, for a
moment:

    a copy      of one layer's part, while a rectangle grows, or members join and leave: layers are evaluated one after
                the other, and each lets go of what it was made from; of several layers where nothing else is evaluated
                between them, as when prompts of different lengths are aligned
    scores      of a prefill step, where attention is not fused
    activations of that step

Read in ``mlx_lm/generate.py`` and ``models/cache.py`` of 0.32, and measured: ``benchmarks/batch_memory.py``.

Pure.
"""

from dataclasses import dataclass

from backends.mlx_server import PREFILL_STEP

CACHE_STEP = 256  # tokens by which mlx_lm grows a KV cache
OPERATIONS = 10  # that mlx has in flight, with what they were made from (MAX_ACTIVE_TASKS in mlx/transforms.cpp)


@dataclass(frozen=True, slots=True)
class KvCost:
    """Of one model. ``per_token``: of the layers that keep every token; ``windowed``: of those that keep the last
    ``window`` tokens, per token; ``windows``: how many these are; ``fixed``: of the state of linear layers, per
    sequence; ``layers``: that have a cache. ``step``: tokens of a prompt that are read at a time; ``scores``: per token
    that is read and token that it looks at, 0 = fused; ``activations``: per token that is read."""

    per_token: int
    windowed: int = 0
    window: int = 0
    windows: int = 0
    fixed: int = 0
    layers: int = 1
    step: int = PREFILL_STEP
    scores: int = 0
    activations: int = 0

    def decoding(self, members: int, longest: int) -> int:
        """Of the rectangle of sequences that are being decoded."""
        return self._rectangle(members, longest, self.window)

    def reading(self, members: int, longest: int) -> int:
        """Of the rectangle of prompts that are being read: a layer with a window also keeps the last step."""
        return self._rectangle(members, longest, self.window - 1 + self.step)

    def _rectangle(self, members: int, longest: int, window: int) -> int:
        grown = -(-longest // CACHE_STEP) * CACHE_STEP
        return members * (self.per_token * grown + self.windowed * min(grown, window) + self.fixed)

    def prefill(self, members: int, tokens: int, longest: int) -> int:
        """For a moment, while ``tokens`` tokens of each prompt are read, up to token ``longest``."""
        return members * tokens * (self.scores * longest + self.activations)

    def copied(self, rectangle: int) -> int:
        """For a moment, of a rectangle that grows, or that members join or leave."""
        return rectangle // self.layers

    def turned(self, members: int, longest: int) -> int:
        """For a moment, of the windows of sequences that are being decoded, after some have joined: each layer is
        brought into the order of time, padded and written to, and the operations in flight hold what they read and
        write. Only where there are ``windows``."""
        windows = members * self.windowed * min(longest, self.window)
        return windows * min(OPERATIONS, self.windows) // self.windows

    def aligned(self, rectangle: int) -> int:
        """For a moment, of prompts that were read to different lengths: keys and values of all layers are rolled, one
        after the other."""
        return rectangle * min(OPERATIONS // 2, self.layers) // self.layers

    def kept(self, tokens: int) -> int:
        """Of one sequence on its way from the batch to the prompt cache."""
        return self.per_token * tokens + self.windowed * min(tokens, self.window) + self.fixed

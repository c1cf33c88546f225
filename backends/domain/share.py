"""What one replica may use of the memory (``memory.share`` decides). Pure."""

from dataclasses import dataclass
from enum import StrEnum

KEPT = 4  # a prompt cache is not made smaller than this part of it for the sake of a batch


class Source(StrEnum):
    DEFAULT = "default"  # the size of the model is not known
    FILES = "files"  # weights and config.json
    MEASURED = "measured"  # what a process has told of itself


@dataclass(frozen=True, slots=True)
class Share:
    """Of one replica, in bytes. ``total`` = ``base`` + ``batch`` + ``prompt_cache``, unless that is less than it needs.
    ``base``: weights and runtime; ``prompt_cache``: for cached prompts and the batch that is there; ``batch``: for what
    joins it. ``entries``: prompts in the cache. ``pool``, ``limit``: mlx's limits, None = mlx's default. ``source``: of
    the figures."""

    total: int
    base: int
    batch: int
    prompt_cache: int
    entries: int
    pool: int | None = None
    limit: int | None = None
    source: Source = Source.DEFAULT

    @property
    def flexible(self) -> int:
        """Bytes beside weights and runtime, for the batch and for what is cached."""
        return self.total - self.base

    @property
    def kept(self) -> int:
        """Bytes of the prompt cache that stay, whatever the batch needs."""
        return self.prompt_cache // KEPT

"""The longest prompt that the memory of a replica can take. Pure."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PromptBound:
    """``tokens``: of a prompt that fits alone, with one token of its answer, in ``room`` bytes."""

    tokens: int
    room: int

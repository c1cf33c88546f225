"""What the ``usage`` of an answer says, in tokens; 0 = the backend did not say. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass

from gateway.policy.affinity import Answered

Usage = Mapping[str, object]


def prompt_tokens(usage: Usage | None) -> int:
    return _number(usage, "prompt_tokens")


def completion_tokens(usage: Usage | None) -> int:
    return _number(usage, "completion_tokens")


def cached_tokens(usage: Usage | None) -> int:
    """Of the prompt, found in the prompt cache."""
    details = (usage or {}).get("prompt_tokens_details")
    return _number(details, "cached_tokens") if isinstance(details, dict) else 0


def found_beside_slices(usage: Usage | None, progress: tuple[int, int]) -> int:
    """Tokens of the prompt that were in the prompt cache when the request was sent, those that its slices had read
    included: ``cached_tokens`` is told without these. ``progress``: of its stream, (tokens read, tokens to read)."""
    return prompt_tokens(usage) - progress[1]


def answered(usage: Usage | None, prompt: int) -> Answered:
    """``prompt``: its tokens, for a backend that reports none."""
    reported = isinstance((usage or {}).get("prompt_tokens_details"), dict)
    return Answered(
        prompt_tokens(usage) or prompt, completion_tokens(usage), cached_tokens(usage) if reported else None
    )


@dataclass(slots=True)
class Cached:
    """Prompt tokens of one model, and how many of them were in its prompt caches."""

    prompt_tokens: int = 0
    cached_tokens: int = 0

    def count(self, usage: Usage) -> None:
        self.prompt_tokens += prompt_tokens(usage)
        self.cached_tokens += cached_tokens(usage)


def _number(fields: Usage | None, name: str) -> int:
    number = (fields or {}).get(name)
    return number if isinstance(number, int) else 0

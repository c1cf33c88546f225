"""What the ``usage`` of an answer says. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from gateway.policy.affinity import Answered


class Usage(NamedTuple):
    """In tokens; 0 = the backend did not say. ``cached``: of the prompt, found in the prompt cache, at most all of it;
    ``tells_cached``: the backend counts these."""

    prompt: int = 0
    answer: int = 0
    cached: int = 0
    tells_cached: bool = False

    def found_beside_slices(self, progress: tuple[int, int]) -> int:
        """Tokens of the prompt that were in the prompt cache when the request was sent, those that its slices had read
        included: ``cached`` is without these. ``progress``: of its stream, (tokens read, tokens to read)."""
        return self.prompt - progress[1]

    def answered(self, prompt: int) -> Answered:
        """``prompt``: its tokens, for a backend that reports none."""
        return Answered(self.prompt or prompt, self.answer, self.cached if self.tells_cached else None)


NOTHING = Usage()


def usage_of(fields: Mapping[str, object] | None) -> Usage:
    """``fields``: the ``usage`` of an answer, None = it has none."""
    if fields is None:
        return NOTHING
    prompt, details = _number(fields.get("prompt_tokens")) or 0, fields.get("prompt_tokens_details")
    cached = _number(details.get("cached_tokens")) if isinstance(details, dict) else None
    told = min(cached or 0, prompt)
    return Usage(prompt, _number(fields.get("completion_tokens")) or 0, told, tells_cached=cached is not None)


@dataclass(slots=True)
class Cached:
    """Prompt tokens of one model, and how many of them were in its prompt caches."""

    prompt_tokens: int = 0
    cached_tokens: int = 0

    def count(self, usage: Usage) -> None:
        self.prompt_tokens += usage.prompt
        self.cached_tokens += usage.cached


def _number(value: object) -> int | None:
    """None: it is no number of tokens."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None

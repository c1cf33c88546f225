"""The two kinds of request the gateway passes on.

Pure: no I/O, no clock.
"""

from enum import StrEnum


class Kind(StrEnum):
    """``chunk_object`` and ``object`` are what OpenAI calls the events of their streams, and their answers."""

    CHAT = "chat.completions"
    COMPLETION = "completions"

    @property
    def texts(self) -> tuple[str, ...]:
        """The names of the texts in a choice of a stream."""
        return ("content", "reasoning", "reasoning_content", "refusal") if self is Kind.CHAT else ("text",)

    @property
    def object(self) -> str:
        return "chat.completion" if self is Kind.CHAT else "text_completion"

    @property
    def chunk_object(self) -> str:
        return "chat.completion.chunk" if self is Kind.CHAT else "text_completion"

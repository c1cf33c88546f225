"""How much context a model can take: what the config allows, and what has been seen to be too much.

    max_context      the operator's bound; a request that leaves less room than it asks for is asked for less
    the ceiling      learned: a request of N tokens ran a backend out of memory while it was alone there, and the
                     largest that was answered had M < N. From then on N tokens and more are refused

Caveat: the memory is not the model's alone, so what did not fit may fit after another program has ended. So a
ceiling expires, and then the next large request is let in again, alone; each time it proves right it lasts longer.

Pure: time comes in as an argument.
"""

from dataclasses import dataclass

from backends.diagnosis.suspects import RequestProgress
from gateway.api.errors import Code, GatewayError

CHARS_PER_TOKEN = 4.0  # until answers have shown better
LEARNING = 0.2  # weight of one answer in that
MIN_CHARS_TO_LEARN = 1000  # characters; in shorter prompts most tokens may be the template's
MARGIN = 1.1  # an estimate has to be so much above the bound to refuse a request
TTL = 900.0  # seconds
TTL_MAX = 8 * TTL
TEMPLATE = 64  # tokens that a chat template may add, and for each message
PER_MESSAGE = 16


@dataclass(frozen=True, slots=True)
class Size:
    """Of a prompt. ``exact``: counted with the model's own tokenizer and template."""

    tokens: int
    chars: int
    exact: bool = False

    def __str__(self) -> str:
        return f"{self.tokens} tokens" if self.exact else f"about {self.tokens} tokens"


@dataclass(frozen=True, slots=True)
class Ceiling:
    """``failed`` ran out of memory alone; ``largest`` tokens were the most that was answered, 0 = none yet."""

    failed: Size
    largest: int
    until: float
    lasts: float


class ContextLimit:
    """Of one model. ``max_context``: tokens, None = no bound."""

    def __init__(self, model: str, max_context: int | None = None) -> None:
        self.max_context = max_context
        self._model = model
        self._ratio = CHARS_PER_TOKEN
        self.largest = 0  # tokens of the largest prompt that was answered
        self._ceiling: Ceiling | None = None
        self._failures = 0  # lone ones, while no ceiling could be told for want of an answer

    # -- sizes --------------------------------------------------------------------------------------------------------

    def estimate(self, chars: int) -> Size:
        return Size(max(1, round(chars / self._ratio)), chars)

    def in_question(self, chars: int, messages: int) -> bool:
        """Whether it is worth while to count: no tokenizer makes more tokens than there are bytes."""
        if self.max_context is None and self._ceiling is None:
            return False
        limits = [limit for limit in (self.max_context, self._ceiling and self._ceiling.failed.tokens) if limit]
        return 4 * chars + TEMPLATE + PER_MESSAGE * messages > min(limits)

    # -- what comes of them -------------------------------------------------------------------------------------------

    def refusal(self, size: Size, now: float) -> GatewayError | None:
        if self.max_context is not None and size.tokens >= self.max_context * (1 if size.exact else MARGIN):
            message = (
                f"the prompt has {size}; model {self._model!r} takes {self.max_context} with the answer (max_context): "
                "send a shorter prompt"
            )
            return self._too_long(message)
        ceiling = self._ceiling
        if ceiling is None or now >= ceiling.until or not _above(size, ceiling.failed):
            return None
        left = round(ceiling.until - now)
        known = f"the largest that was answered had {ceiling.largest}" if ceiling.largest else "none was answered yet"
        message = (
            f"the prompt has {size}; one of {ceiling.failed.tokens} ran model {self._model!r} out of memory, and "
            f"{known}: send a shorter prompt (this is tried again in {left} s)"
        )
        return self._too_long(message)

    def on_probation(self, size: Size) -> bool:
        """So large that it should be alone on a backend: the ceiling has expired, nothing has disproved it."""
        return self._ceiling is not None and _above(size, self._ceiling.failed)

    def room(self, size: Size) -> int | None:
        """Tokens left for the answer; None = no bound."""
        return None if self.max_context is None else max(1, self.max_context - size.tokens)

    def answered(self, chars: int, tokens: int) -> None:
        """A request was answered in full; ``tokens``: of its prompt, as the backend counted."""
        if tokens <= 0:
            return
        if chars >= MIN_CHARS_TO_LEARN:
            self._ratio += LEARNING * (chars / tokens - self._ratio)
        self.largest = max(self.largest, tokens)
        if self._ceiling is not None and tokens >= self._ceiling.failed.tokens:
            self.forget()

    def ran_out(self, progress_now: RequestProgress, chars: int, now: float) -> None:
        """A request was alone on a backend when it ran out of memory."""
        if progress_now.tokens <= self.largest:
            return  # larger ones have been answered: it was the machine's state, not the size
        self._failures += 1
        if not self.largest and self._failures < 2:
            return  # nothing has been answered yet: perhaps nothing can be
        before = self._ceiling
        lasts = TTL if before is None else min(TTL_MAX, 2 * before.lasts)
        failed = Size(progress_now.tokens, chars, exact=True)
        if before is not None and before.failed.tokens < progress_now.tokens and now < before.until:
            return  # a smaller one is known to be too much
        self._ceiling = Ceiling(failed, self.largest, now + lasts, lasts)

    def forget(self) -> None:
        self._ceiling = None
        self._failures = 0

    def ceiling(self, now: float) -> dict[str, object] | None:
        """For the operator; None when nothing was learned."""
        if self._ceiling is None:
            return None
        left = max(0, round(self._ceiling.until - now))
        return {"tokens": self._ceiling.failed.tokens, "largest_answered": self.largest, "expires_in": left}

    def _too_long(self, message: str) -> GatewayError:
        return GatewayError(Code.CONTEXT_LENGTH_EXCEEDED, message, param="messages", model=self._model)


def _above(size: Size, failed: Size) -> bool:
    """Characters are compared where the tokens are only estimated: then both are of the same kind."""
    return size.tokens >= failed.tokens if size.exact else size.chars >= failed.chars

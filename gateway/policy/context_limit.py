"""Context limits of a model: the configured bound, and a learned ceiling.

    max_context      the operator's bound, in tokens; an answer is cut to what the prompt leaves of it
    ceiling          learned: a request of N tokens ran a backend out of memory while no other was in flight, and the
                     largest answered one had M < N tokens. From then on requests of N tokens and more are refused

Caveat: other programs use the same memory, so a size that failed once may fit later. So a ceiling expires; then the
next large request is admitted, alone. Each time a ceiling is confirmed, it lasts longer.

Pure: time comes in as an argument.
"""

from dataclasses import dataclass

from backends.diagnosis.suspects import RequestProgress
from gateway.api.errors import Code, GatewayError

CHARS_PER_TOKEN = 4.0  # initial value, corrected by the usage of answers
LEARNING = 0.2  # weight of one answer in that correction
MIN_CHARS_TO_LEARN = 1000  # characters; in shorter prompts most tokens may be the template's
MARGIN = 1.1  # factor by which an estimated size must exceed the bound before a request is refused
TTL = 900.0  # seconds
TTL_MAX = 8 * TTL
TEMPLATE = 64  # tokens that a chat template may add per prompt
PER_MESSAGE = 16  # tokens that a chat template may add per message


@dataclass(frozen=True, slots=True)
class Size:
    """Size of a prompt. ``exact``: counted with the model's own tokenizer and template."""

    tokens: int
    chars: int
    exact: bool = False

    def __str__(self) -> str:
        return f"{self.tokens} tokens" if self.exact else f"about {self.tokens} tokens"


@dataclass(frozen=True, slots=True)
class Ceiling:
    """``failed``: size of the request that ran out of memory alone. ``largest``: tokens of the largest answered prompt,
    0 = none yet. ``until``: when it expires; ``lasts``: seconds that it was set for."""

    failed: Size
    largest: int
    until: float
    lasts: float


class ContextLimit:
    """Context limits of one model. ``max_context``: tokens, None = no bound."""

    def __init__(self, model: str, max_context: int | None = None) -> None:
        self.max_context = max_context
        self._model = model
        self._ratio = CHARS_PER_TOKEN
        self.largest = 0  # tokens of the largest answered prompt
        self._ceiling: Ceiling | None = None
        self._failures = 0  # requests that ran out of memory alone, since the last ``forget``

    # -- sizes --------------------------------------------------------------------------------------------------------

    def estimate(self, chars: int) -> Size:
        return Size(max(1, round(chars / self._ratio)), chars)

    def in_question(self, chars: int, messages: int) -> bool:
        """Whether the prompt could exceed a limit, so that an exact count is needed. No tokenizer gives more tokens
        than the text has bytes, and a character has at most 4."""
        if self.max_context is None and self._ceiling is None:
            return False
        limits = [limit for limit in (self.max_context, self._ceiling and self._ceiling.failed.tokens) if limit]
        return 4 * chars + TEMPLATE + PER_MESSAGE * messages > min(limits)

    # -- checks and updates -------------------------------------------------------------------------------------------

    def refusal(self, size: Size, now: float) -> GatewayError | None:
        if self.max_context is not None and size.tokens >= self.max_context * (1 if size.exact else MARGIN):
            message = (
                f"the prompt has {size}; model {self._model!r} takes {self.max_context} with the answer (max_context); "
                "send a shorter prompt"
            )
            return self._too_long(message)
        ceiling = self._ceiling
        if ceiling is None or now >= ceiling.until or not _above(size, ceiling.failed):
            return None
        left = round(ceiling.until - now)
        known = f"the largest answered one had {ceiling.largest}" if ceiling.largest else "none was answered yet"
        message = (
            f"the prompt has {size}; one of {ceiling.failed.tokens} ran model {self._model!r} out of memory, and "
            f"{known}; send a shorter prompt (this limit expires in {left} s)"
        )
        return self._too_long(message)

    def on_probation(self, size: Size) -> bool:
        """The prompt is as large as an expired ceiling that no answer has disproved: the request must run alone."""
        return self._ceiling is not None and _above(size, self._ceiling.failed)

    def room(self, size: Size) -> int | None:
        """Tokens left for the answer; None = no bound."""
        return None if self.max_context is None else max(1, self.max_context - size.tokens)

    def answered(self, chars: int, tokens: int) -> None:
        """A request was answered completely. ``chars`` and ``tokens``: of its prompt, tokens as the backend counted."""
        if tokens <= 0:
            return
        if chars >= MIN_CHARS_TO_LEARN:
            self._ratio += LEARNING * (chars / tokens - self._ratio)
        self.largest = max(self.largest, tokens)
        if self._ceiling is not None and tokens >= self._ceiling.failed.tokens:
            self.forget()

    def ran_out(self, progress: RequestProgress, chars: int, now: float) -> None:
        """A request was alone on a backend when the backend ran out of memory."""
        if progress.tokens <= self.largest:
            return  # larger prompts have been answered: the cause was the machine's state, not the size
        self._failures += 1
        if not self.largest and self._failures < 2:
            return  # no request has been answered yet: the cause may not be the size
        before = self._ceiling
        lasts = TTL if before is None else min(TTL_MAX, 2 * before.lasts)
        failed = Size(progress.tokens, chars, exact=True)
        if before is not None and before.failed.tokens < progress.tokens and now < before.until:
            return  # a lower ceiling is in force
        self._ceiling = Ceiling(failed, self.largest, now + lasts, lasts)

    def forget(self) -> None:
        self._ceiling = None
        self._failures = 0

    def ceiling(self, now: float) -> dict[str, object] | None:
        """The ceiling as ``/api/quarantine`` shows it; None if there is none."""
        if self._ceiling is None:
            return None
        left = max(0, round(self._ceiling.until - now))
        return {"tokens": self._ceiling.failed.tokens, "largest_answered": self.largest, "expires_in": left}

    def _too_long(self, message: str) -> GatewayError:
        return GatewayError(Code.CONTEXT_LENGTH_EXCEEDED, message, param="messages", model=self._model)


def _above(size: Size, failed: Size) -> bool:
    """Whether ``size`` is at least ``failed``; by characters where its tokens are only estimated."""
    return size.tokens >= failed.tokens if size.exact else size.chars >= failed.chars

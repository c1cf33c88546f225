"""Context limits of a model: the configured bound or the model's own, and a learned ceiling.

    max_context      the operator's bound, in tokens, for prompt and answer; an answer is cut to what the prompt leaves
    trained          without it: the longest text that the model was trained for; only prompts are held to it
    memory           of the prompt alone, in what the replica's share of the memory leaves after the weights
    ceiling          learned: a request of N tokens ran a backend out of memory while no other was in flight, and the
                     largest answered one had M < N tokens. From then on requests of N tokens and more are refused

Sizes are counted where they decide, with the model's own tokenizer; where they cannot be counted they are estimated. An
estimate refuses only what is far beyond the bound, and never shortens an answer: the characters of a token vary from
less than one to more than a hundred. A ceiling whose tokens could only be estimated holds by the characters.

Caveat: other programs use the same memory, so a size that failed once may fit later. So a ceiling expires; then the
next large request is admitted, alone. Each time a ceiling is confirmed, it lasts longer.

Pure: time comes in as an argument.
"""

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from backends.diagnosis.suspects import RequestProgress
from backends.domain.prompt_bound import PromptBound
from backends.memory import units
from gateway.api.errors import Code, GatewayError

CHARS_PER_TOKEN = 4.0  # at first; then the most that an answered prompt had
MOST_CHARS_PER_TOKEN = 16.0  # no text has more; a prompt of blanks must not let everything through
MIN_CHARS_TO_LEARN = 1000  # characters; in shorter prompts most tokens may be the template's
USUAL = 16  # latest answered prompts that show the usual characters of a token
MARGIN = 1.5  # factor by which an estimated size must exceed the bound before a request is refused
TTL = 900.0  # seconds
TTL_MAX = 8 * TTL
MAX_FACTOR = 1024  # of a scaling of positions; what is beyond is no number to go by
TEMPLATE = 64  # tokens that a chat template may add per prompt
PER_MESSAGE = 16  # tokens that a chat template may add per message


@dataclass(frozen=True, slots=True)
class Size:
    """Size of a prompt. ``exact``: counted with the model's own tokenizer and template; ``at_least``: counting stopped
    there, since that is too much already; neither: estimated."""

    tokens: int
    chars: int
    exact: bool = False
    at_least: bool = False

    @property
    def certain(self) -> bool:
        """The prompt has this many tokens, or more."""
        return self.exact or self.at_least

    def __str__(self) -> str:
        kind = "" if self.exact else "at least " if self.at_least else "about "
        return f"{kind}{self.tokens} tokens"


@dataclass(frozen=True, slots=True)
class Ceiling:
    """``failed``: size of the request that ran out of memory alone. ``largest``: tokens of the largest answered prompt,
    0 = none yet. ``until``: when it expires; ``lasts``: seconds that it was set for."""

    failed: Size
    largest: int
    until: float
    lasts: float


class ContextLimit:
    """Context limits of one model. ``max_context``: tokens, None = no bound. ``trained``: tokens, None = not known; set
    when the model's files have been read. ``in_memory``: what the memory of the model's replicas can take."""

    def __init__(self, model: str, max_context: int | None = None) -> None:
        self.max_context = max_context
        self.trained: int | None = None
        self.in_memory: Callable[[], PromptBound | None] = lambda: None
        self._model = model
        self._ratio = CHARS_PER_TOKEN
        self._ratios: deque[float] = deque(maxlen=USUAL)  # of the latest answered prompts
        self.largest = 0  # tokens of the largest answered prompt
        self._most_chars = 0  # of an answered prompt
        self._ceiling: Ceiling | None = None
        self._failures = 0  # requests that ran out of memory alone, since the last ``forget``

    # -- sizes --------------------------------------------------------------------------------------------------------

    @property
    def bound(self) -> int | None:
        """Tokens from which a prompt is refused."""
        return self.trained if self.max_context is None else self.max_context

    @property
    def enough(self) -> int | None:
        """Tokens at which the rest of a prompt need not be counted; None = no limit is known."""
        return max(self._limits(), default=None)

    def _limits(self) -> list[int]:
        failed = None if self._ceiling is None or not self._ceiling.failed.certain else self._ceiling.failed.tokens
        memory = self.in_memory()
        fits = None if memory is None else memory.tokens + 1
        return [limit for limit in (self.bound, failed, fits) if limit is not None]

    def estimate(self, chars: int) -> Size:
        return Size(max(1, round(chars / self._ratio)), chars)

    def usual(self, chars: int) -> int:
        """Tokens that a prompt has if it is like the latest ones, to tell what it costs; 0 = not known. ``estimate``
        tells what it has at least."""
        return round(chars / median(self._ratios)) if self._ratios else 0

    def in_question(self, prompt: int, answer: int) -> bool:
        """Whether the prompt could exceed a limit, or its answer the context, so that an exact count is needed.
        ``prompt``: tokens that it has at most (``most_tokens``); ``answer``: that may be generated."""
        if self.max_context is not None and prompt + answer > self.max_context:
            return True
        return any(prompt >= limit for limit in self._limits())

    # -- checks and updates -------------------------------------------------------------------------------------------

    def refusal(self, size: Size, now: float) -> GatewayError | None:
        if self.bound is not None and size.tokens >= self.bound * (1 if size.certain else MARGIN):
            return self._too_long(f"the prompt has {size}; {self._why()}")
        memory = self.in_memory()
        if memory is not None and size.certain and size.tokens > max(memory.tokens, self.largest):
            return self._too_long(
                f"the prompt has {size}; alone about {memory.tokens} fit the {units.memory(memory.room)} that the "
                f"weights leave of the memory of a replica of model {self._model!r} (memory.budget, replicas, its own "
                "memory:); send a shorter prompt"
            )
        ceiling = self._ceiling
        if ceiling is None or now >= ceiling.until or not _above(size, ceiling.failed):
            return None
        left = round(ceiling.until - now)
        known = f"the largest answered one had {ceiling.largest}" if ceiling.largest else "none was answered yet"
        message = (
            f"the prompt has {size}; one of {_number(ceiling.failed)} ran model {self._model!r} out of memory, and "
            f"{known}; send a shorter prompt (this limit expires in {left} s)"
        )
        return self._too_long(message)

    def on_probation(self, size: Size) -> bool:
        """The prompt is as large as an expired ceiling that no answer has disproved: the request must run alone."""
        return self._ceiling is not None and _above(size, self._ceiling.failed)

    def room(self, size: Size) -> int | None:
        """Tokens left for the answer; None = no bound. Of a prompt that could not be counted, one token is certain."""
        if self.max_context is None:
            return None
        return max(1, self.max_context - (size.tokens if size.certain else 1))

    def answered(self, chars: int, tokens: int) -> None:
        """A request was answered completely. ``chars`` and ``tokens``: of its prompt, tokens as the backend counted."""
        if tokens <= 0:
            return
        if chars >= MIN_CHARS_TO_LEARN:
            self._ratio = max(self._ratio, min(chars / tokens, MOST_CHARS_PER_TOKEN))
            self._ratios.append(chars / tokens)
        self.largest, self._most_chars = max(self.largest, tokens), max(self._most_chars, chars)
        if self._ceiling is not None and _above(Size(tokens, chars, exact=True), self._ceiling.failed):
            self.forget()

    def ran_out(self, progress: RequestProgress, chars: int, now: float) -> None:
        """A request was alone on a backend when the backend ran out of memory."""
        if progress.tokens <= self.largest if progress.counted else chars <= self._most_chars:
            return  # larger prompts have been answered: the cause was the machine's state, not the size
        self._failures += 1
        if not self.largest and self._failures < 2:
            return  # no request has been answered yet: the cause may not be the size
        before = self._ceiling
        lasts = TTL if before is None else min(TTL_MAX, 2 * before.lasts)
        failed = Size(progress.tokens, chars, exact=progress.counted)
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

    def _why(self) -> str:
        if self.max_context is not None:
            takes = f"model {self._model!r} takes {self.max_context} with the answer (max_context)"
            return f"{takes}; send a shorter prompt"
        return (
            f"model {self._model!r} was trained for {self.trained} (max_position_embeddings in its config.json); send "
            "a shorter prompt, or set max_context to let longer ones through"
        )

    def _too_long(self, message: str) -> GatewayError:
        return GatewayError(Code.CONTEXT_LENGTH_EXCEEDED, message, param="messages", model=self._model)


def _above(size: Size, failed: Size) -> bool:
    """Whether ``size`` is at least ``failed``; by characters where tokens are only estimated."""
    return size.tokens >= failed.tokens if size.certain and failed.certain else size.chars >= failed.chars


def _number(failed: Size) -> str:
    return f"{'' if failed.certain else 'about '}{failed.tokens}"


def most_tokens(chars: int, body: int, messages: int) -> int:
    """Tokens that a prompt has at most: no tokenizer gives more than the text has bytes. ``chars``: of the prompt;
    ``body``: bytes of the request, 0 = not known, which a template may write with blanks between; ``messages``: of
    the chat."""
    return min(4 * chars, 2 * body or 4 * chars) + TEMPLATE + PER_MESSAGE * messages


def trained_context(config: Mapping[str, Any]) -> int | None:
    """Tokens of the longest text that a model was trained for; ``config``: its config.json. None: it does not say.

    ``max_position_embeddings`` is the number before or after the positions were scaled: Llama 3.1 and DeepSeek write
    the scaled one, the recipe of Qwen 2.5 for long texts leaves the unscaled one. ``original_max_position_embeddings``
    times the factor is the scaled one always; without an original, the plain number is taken to be unscaled, except for
    Gemma 3 (rules of vLLM 0.11, ``_get_and_verify_max_len``). Where two numbers are possible the larger one counts: the
    bound is there to refuse what the model cannot read.
    """
    text = config.get("text_config")
    if isinstance(text, Mapping) and _positive(text.get("max_position_embeddings")):
        return trained_context(text)
    longest = _positive(config.get("max_position_embeddings"))
    if longest is None:
        return None
    scalings = _scalings(config.get("rope_scaling")) + _scalings(config.get("rope_parameters"))
    return max([longest, *(_scaled(longest, each, str(config.get("model_type"))) for each in scalings)])


def _scalings(value: object) -> list[Mapping[str, Any]]:
    """Of all layers, or of each kind of layer."""
    if not isinstance(value, Mapping):
        return []
    return [each for each in (value, *value.values()) if isinstance(each, Mapping) and "factor" in each]


def _scaled(longest: int, scaling: Mapping[str, Any], model_type: str) -> int:
    kind, factor = scaling.get("rope_type", scaling.get("type")), scaling["factor"]
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 1 <= factor <= MAX_FACTOR:
        return longest
    if (original := _positive(scaling.get("original_max_position_embeddings"))) is not None:
        return round(original * factor)
    plain = kind in ("linear", "dynamic", "yarn") and not model_type.startswith("gemma3")
    return round(longest * factor) if plain else longest


def _positive(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None

"""The table of sampling fields: name → check. A check gives the value to send, or ``UNSET``, or raises RequestError.

The limits are those of mlx_lm.server 0.32.2 (``validate_model_parameters``) narrowed by what its samplers and the
bindings of mlx survive: an exception there ends the generation thread, and with it the server, for good.

Caveat: JSON has one kind of number, mlx_lm.server two. 40.0 becomes 40 where it wants an int, 0 becomes 0.0
where it wants a float (``xtc_*``); a bool is an int to Python, so it is refused by name.
"""

import re
from collections.abc import Callable
from typing import Any, Final

from gateway.request.values import Notes, bad, prose, refuse

Check = Callable[[str, Any, Notes], Any]


class _Unset:
    """The type of UNSET: the field is to be left out."""


UNSET: Final = _Unset()

MAX_STOPS = 128  # OpenAI allows 4; editors send dozens
MAX_STOP_CHARS = 4096
MAX_BIASES = 1024
MAX_TOP_LOGPROBS = 11  # mlx_lm.server's own limit
INT32 = 2**31 - 1
CONTEXT_SIZE = 1_000_000  # penalties look back so far; from 2**31 on, mlx's slices raise
COLDEST = 1e-4  # 1/temperature overflows float32 near 1e-39, and below this sampling is greedy anyway


def whole(param: str, value: Any, expected: str, notes: Notes) -> int:
    """An int of at most 64 bits, also when written 40.0."""
    plain = int(value) if isinstance(value, float) and value.is_integer() else value
    if isinstance(plain, bool) or not isinstance(plain, int) or abs(plain) >= 2**64:
        raise bad(param, expected, value, _unquote(value))
    if plain is not value:
        notes.changed(param)
    return plain


def integer(low: int, high: int, *, clamp: bool = False, unset: tuple[int, ...] = ()) -> Check:
    """``clamp``: what is above ``high`` is lowered to it; ``unset``: ways to say "no value"."""
    expected = f"an integer of at least {low}" if clamp else f"an integer from {low} to {high}"

    def check(param: str, value: Any, notes: Notes) -> Any:
        number = whole(param, value, expected, notes)
        if number in unset:
            notes.changed(param)
            return UNSET
        if clamp and number > high:
            notes.changed(param)
            return high
        if not low <= number <= high:
            raise bad(param, expected, value)
        return number

    return check


def number(low: float, high: float, *, clamp: float | None = None, always_float: bool = False) -> Check:
    def check(param: str, value: Any, notes: Notes) -> Any:
        expected = f"a number from {low:g} to {high:g}"
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise bad(param, expected, value, _unquote(value))
        if not low <= value <= high:  # NaN fails too
            raise bad(param, expected, value)
        if clamp is not None and value > clamp:
            notes.changed(param)
            return clamp
        if always_float and isinstance(value, int):
            notes.changed(param)
            return float(value)
        return value

    return check


def _unquote(value: Any) -> str:
    return "send it without quotes" if isinstance(value, str) and re.fullmatch(r"-?[0-9.]+", value) else ""


def boolean(param: str, value: Any, notes: Notes) -> bool:  # noqa: ARG001 - all checks look alike
    if not isinstance(value, bool):
        raise bad(param, "true or false", value)
    return value


def temperature(param: str, value: Any, notes: Notes) -> Any:
    degrees = number(0, 100)(param, value, notes)
    if 0 < degrees < COLDEST:
        notes.changed(param)
        return 0
    return degrees


def repetition_penalty(param: str, value: Any, notes: Notes) -> Any:
    factor = number(0, 100)(param, value, notes)
    if 0 < factor < 0.01:  # logits are divided by it
        raise bad(param, "0 (off) or a number from 0.01 to 100", value)
    return factor


def seed(param: str, value: Any, notes: Notes) -> Any:
    """-1 is how llama.cpp and others say "random"; what mlx cannot take (it wants 64 bits, unsigned) is folded in, so
    that equal seeds stay equal."""
    number = whole(param, value, "an integer", notes)
    if number == -1:
        notes.changed(param)
        return UNSET
    folded = number % 2**64
    if folded != number:
        notes.changed(param)
    return folded


def stop(param: str, value: Any, notes: Notes) -> Any:
    words = [value] if isinstance(value, str) else value
    if not isinstance(words, list):
        raise bad(param, "a string or a list of strings", value)
    if len(words) > MAX_STOPS:
        raise bad(param, f"at most {MAX_STOPS} strings", value)
    kept = [prose(f"{param}[{i}]" if words is value else param, word, notes) for i, word in enumerate(words)]
    kept = list(dict.fromkeys(word for word in kept if word))
    if any(len(word) > MAX_STOP_CHARS for word in kept):
        raise refuse(param, f"{param}: expected strings of at most {MAX_STOP_CHARS} characters; shorten them")
    if len(kept) < len(words):
        notes.changed(param)
    return kept or UNSET


_ID = re.compile(r"[0-9]{1,10}")


def logit_bias(param: str, value: Any, notes: Notes) -> Any:
    """Token ids → bias. Whether an id is in the vocabulary is settled in ``fit_vocab``."""
    if not isinstance(value, dict):
        raise bad(param, 'an object of token ids and numbers, such as {"50256": -100}', value)
    if len(value) > MAX_BIASES:
        raise bad(param, f"at most {MAX_BIASES} token ids", value)
    biases = {}
    for key, bias in value.items():
        if not _ID.fullmatch(key) or int(key) > INT32:
            raise bad(param, "token ids (whole numbers from 0) as keys", key)
        biases[str(int(key))] = number(-100, 100)(f"{param}.{key}", bias, notes)
    if biases.keys() != value.keys():
        notes.changed(param)
    return biases or UNSET


CHECKS: dict[str, Check] = {
    "temperature": temperature,
    "top_p": number(0, 1),
    "top_k": integer(0, INT32, clamp=True, unset=(-1,)),
    "min_p": number(0, 1),
    "xtc_probability": number(0, 1, always_float=True),
    # Above 0.5 the sampler raises, though the server lets it pass; at most one token is likelier than that, so XTC has
    # nothing to cut and 0.5 means the same.
    "xtc_threshold": number(0, 1, clamp=0.5, always_float=True),
    "repetition_penalty": repetition_penalty,
    "presence_penalty": number(-100, 100),
    "frequency_penalty": number(-100, 100),
    "repetition_context_size": integer(0, CONTEXT_SIZE, clamp=True),
    "presence_context_size": integer(0, CONTEXT_SIZE, clamp=True),
    "frequency_context_size": integer(0, CONTEXT_SIZE, clamp=True),
    "num_draft_tokens": integer(0, 64, clamp=True),
    "max_tokens": integer(1, INT32, clamp=True, unset=(-1,)),
    "logprobs": boolean,
    "top_logprobs": integer(0, MAX_TOP_LOGPROBS, clamp=True, unset=(-1,)),
    "seed": seed,
    "stop": stop,
    "logit_bias": logit_bias,
}

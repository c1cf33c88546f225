"""Fewer different values for the samplers of mlx_lm.server: it compiles a kernel for each new one.

``sample_utils`` of mlx-lm 0.32.2 bakes the number into a compiled function. As measured (CPU): 0.6 to 1.0 s for a value
that is new, on the thread that generates, where it holds up every stream; 0.2 ms for one that was seen. So a value is
rounded to two decimals, and to two significant digits where it, or for a share its distance from 1, is below 0.1. None
is changed by more than a twentieth, and none becomes 0 or 1: those switch a sampler off, or make it greedy.

Pure.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import floor, log10

from gateway.request.values import ParsedRequest


def rounded(value: float) -> float:
    """``value`` >= 0."""
    if not 0 < value < 0.1:
        return round(value, 2)
    return round(value, 1 - floor(log10(value)))


def rounded_share(value: float) -> float:
    """``value`` from 0 to 1, where values near 1 differ as those near 0 do: by what they leave out."""
    return rounded(value) if value < 0.9 else round(1 - rounded(1 - value), 15)


ROUNDINGS: Mapping[str, Callable[[float], float]] = {
    "temperature": rounded,
    "top_p": rounded_share,
    "min_p": rounded_share,
    "xtc_probability": rounded_share,
    "xtc_threshold": rounded,
}


def fit_samplers(parsed: ParsedRequest) -> ParsedRequest:
    """The same request with these values, and a note of those that have changed."""
    given = parsed.params
    changed = {
        name: value for name, to in ROUNDINGS.items() if name in given and (value := to(given[name])) != given[name]
    }
    if not changed:
        return parsed
    normalized = tuple(dict.fromkeys((*parsed.normalized, *changed)))
    return replace(parsed, params={**given, **changed}, normalized=normalized)

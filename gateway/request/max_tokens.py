"""Bounds on the length of an answer: what the context leaves after the prompt, what one request may hold up. Pure."""

from dataclasses import replace

from gateway.request.values import ParsedRequest


def fit_room(parsed: ParsedRequest, room: int, default: int | None, *, certain: bool = True) -> ParsedRequest:
    """Asks for no more than ``room`` tokens, and says so. ``default``: what the server generates when nothing is asked
    for, None = not known. ``certain``: ``room`` is what the prompt leaves, not just what no answer can exceed."""
    asked = parsed.max_tokens or default
    if asked is None and not certain:
        return parsed  # the server's own default may be far less
    if asked is not None and asked <= room:
        return parsed
    return _shortened(parsed, room, f"{room}, which is all that the context leaves for the answer (max_context)")


def fit_engine(parsed: ParsedRequest, bound: int, default: int | None, why: str) -> ParsedRequest:
    """Asks for no more than ``bound`` tokens, and tells the client if that is less than it would have got. ``default``
    as above; if it is not known, the server's own bound is left to it."""
    asked = parsed.max_tokens or default
    if asked is None or asked <= bound:
        return parsed
    return _shortened(parsed, bound, f"at most {bound} tokens {why}")


def _shortened(parsed: ParsedRequest, tokens: int, told: str) -> ParsedRequest:
    return replace(
        parsed,
        params={**parsed.params, "max_tokens": tokens},
        max_tokens=tokens,
        normalized=tuple(dict.fromkeys((*parsed.normalized, "max_tokens"))),
        warnings=(*parsed.warnings, f"max_tokens: {told}"),
    )

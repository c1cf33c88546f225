"""The bound on an answer where the context has one: what is left of it after the prompt. Pure."""

from dataclasses import replace

from gateway.request.values import ParsedRequest


def fit_room(parsed: ParsedRequest, room: int, default: int | None) -> ParsedRequest:
    """Asks for no more than ``room`` tokens; ``default``: what the server generates when nothing is asked for,
    None = not known."""
    asked = parsed.max_tokens or default
    if asked is not None and asked <= room:
        return parsed
    params = {**parsed.params, "max_tokens": room}
    if parsed.max_tokens is None:
        return replace(parsed, params=params, max_tokens=room)  # nothing that the client had said was changed
    normalized = tuple(dict.fromkeys((*parsed.normalized, "max_tokens")))
    return replace(parsed, params=params, max_tokens=room, normalized=normalized)

"""From the bytes a client sent to a request that cannot hurt a backend, or to a 400 that says how to mend it.

    decoded(body, encoding, …)   -> the body, where it came compressed
    parse(body, kind)            -> ParsedRequest, or RequestError
    fit_vocab(parsed, size)      -> ParsedRequest: the bounds that need the size of the vocabulary
    fit_samplers(parsed)         -> ParsedRequest: fewer different values for the samplers
    fit_room(parsed, room, …)    -> ParsedRequest: an answer no longer than the context has room for
    longer, unbatched            -> ParsedRequest: where the whole prompt may be in the backend's prompt cache
    fit_engine(parsed, bound, …) -> ParsedRequest: an answer no longer than may be generated for a client that left
    upstream_body(parsed, ...)   -> bytes for the backend
    slice_body(text, …)          -> the same, for a beginning of a long prompt

One bad body can kill the generation thread of mlx_lm.server for good, so this is an allow-list: whatever is sent on has
been checked for type, range, length and encodability, and what is not known is dropped. Pure: no I/O, no clock.
"""

from gateway.request.cached import longer, unbatched
from gateway.request.encoding import BodyTooLarge, decoded
from gateway.request.max_tokens import fit_engine, fit_room
from gateway.request.parse import fit_allowed, fit_vocab, operator_problems, parse
from gateway.request.sampler_values import fit_samplers
from gateway.request.tools import RESERVED
from gateway.request.upstream_body import RequestRules, params_sent, sent, slice_body, upstream_body
from gateway.request.values import ALLOWABLE, DEFAULT_RULES, ParsedRequest, Rules

__all__ = [
    "ALLOWABLE",
    "DEFAULT_RULES",
    "RESERVED",
    "BodyTooLarge",
    "ParsedRequest",
    "RequestRules",
    "Rules",
    "decoded",
    "fit_allowed",
    "fit_engine",
    "fit_room",
    "fit_samplers",
    "fit_vocab",
    "longer",
    "operator_problems",
    "params_sent",
    "parse",
    "sent",
    "slice_body",
    "unbatched",
    "upstream_body",
]

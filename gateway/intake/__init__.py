"""From the bytes a client sent to a request that cannot hurt a backend, or to a 400 that says how to mend it.

    parse(body, kind)            -> Intake, or RequestError
    fit_vocab(intake, size)      -> Intake: the bounds that need the size of the vocabulary
    fit_room(intake, room, …)    -> Intake: an answer no longer than the context has room for
    upstream_body(intake, ...)   -> bytes for the backend

One bad body can kill the generation thread of mlx_lm.server for good, so this is an allow-list: whatever is sent on has
been checked for type, range, length and encodability, and what is not known is dropped. Pure: no I/O, no clock.
"""

from gateway.intake.body import RequestRules, upstream_body
from gateway.intake.parse import fit_vocab, operator_problems, parse
from gateway.intake.room import fit_room
from gateway.intake.values import DEFAULT_RULES, Intake, Rules

__all__ = [
    "DEFAULT_RULES",
    "Intake",
    "RequestRules",
    "Rules",
    "fit_room",
    "fit_vocab",
    "operator_problems",
    "parse",
    "upstream_body",
]

"""ParsedRequest → the bytes for one backend, with what the operator adds and takes away for its model."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from gateway.api import json_codec
from gateway.request.fields import CHECKS, UNSET
from gateway.request.values import Notes, ParsedRequest

ESSENTIAL = frozenset({"messages", "prompt", "model", "stream", "stream_options"})
# Without include_usage, mlx_lm.server 0.32.2 raises KeyError at the end and sends no [DONE].
USAGE = {"include_usage": True}
BIAS = 1000  # of a token that is to be generated: far above what any model gives one, and a number in any format
ALIASES = {"max_completion_tokens": "max_tokens"}


class RequestRules(Protocol):
    """``request:`` of a model in the config. See ``operator_problems`` for what makes a bad one."""

    @property
    def defaults(self) -> Mapping[str, Any]: ...  # where the client said nothing

    @property
    def force(self) -> Mapping[str, Any]: ...  # whatever the client said

    @property
    def drop(self) -> Sequence[str]: ...


def upstream_body(
    parsed: ParsedRequest,
    *,
    model: str,
    stream: bool,
    request_rules: RequestRules,
    kept: frozenset[str] = frozenset(),
) -> bytes:
    """``model``: the one name this backend is always called by; ``stream``: what the gateway wants, not the client.
    ``kept``: fields that the operator's ``drop`` leaves alone.

    Raises RequestError only for a value of the operator's that ``operator_problems`` reports.
    """
    params = params_sent(parsed, request_rules, kept=kept) | {"model": model, "stream": stream}
    if stream:
        params["stream_options"] = USAGE
    return json_codec.dumps(params)


def params_sent(
    parsed: ParsedRequest, request_rules: RequestRules, *, kept: frozenset[str] = frozenset()
) -> dict[str, Any]:
    """All that will be sent but model, stream and stream_options. Raises RequestError, as above."""
    params = _over(_plain(request_rules.defaults), parsed.params)
    params = _over(params, _plain(request_rules.force))
    for name in request_rules.drop:
        if name not in ESSENTIAL | kept:
            params.pop(ALIASES.get(name, name), None)
    return params


def slice_body(text: str, *, model: str, token: int) -> bytes:
    """A plain completion of the beginning of a prompt (``policy.slicing``). ``token``: the id of the one token that is
    to be generated."""
    params = {"prompt": text, "max_tokens": 1, "temperature": 0, "logit_bias": {str(token): BIAS}}
    return json_codec.dumps({"model": model, **params, "stream": True, "stream_options": USAGE})


def sent(parsed: ParsedRequest, request_rules: RequestRules) -> Callable[[str], Any]:
    """What will be sent for a field, None where it will not be: without putting the whole body together."""
    force, defaults, drop = _plain(request_rules.force), _plain(request_rules.defaults), request_rules.drop

    def field(name: str) -> Any:
        return None if name in drop else force.get(name, parsed.params.get(name, defaults.get(name)))

    return field


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Under the names used here, checked like a client's, and without what is not the operator's to change."""
    if not values:
        return {}
    plain = {}
    for given, value in values.items():
        name = ALIASES.get(given, given)
        if name in ESSENTIAL or value is None:
            continue
        sent = CHECKS[name](name, value, Notes()) if name in CHECKS else value
        if sent is not UNSET:
            plain[name] = sent
    return plain


def _over(under: dict[str, Any], upper: dict[str, Any]) -> dict[str, Any]:
    """``upper`` wins; template variables one by one: a default of one outlives a client that sets another."""
    merged = under | upper
    both = (under.get("chat_template_kwargs"), upper.get("chat_template_kwargs"))
    if isinstance(both[0], Mapping) and isinstance(both[1], Mapping):
        merged["chat_template_kwargs"] = {**both[0], **both[1]}
    return merged

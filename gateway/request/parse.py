"""Bytes → ParsedRequest. Reads top to bottom: decode, split off what the gateway uses itself, check the rest by field.

A null means that the field is not set, so nulls go first. What is left is in ``CHECKS``, has a rule of its own here, or
is dropped: with a note, and with a warning where the answer will differ from what was asked for.

Caveat: two bounds need the size of the vocabulary, which depends on the model, whose name is in the body. See
``fit_vocab``.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from gateway.api import json_codec
from gateway.api.errors import Code, GatewayError, RequestError
from gateway.api.kinds import Kind
from gateway.request.fields import CHECKS, UNSET, boolean, whole
from gateway.request.messages import messages
from gateway.request.size import MAX_VALUES, count_values
from gateway.request.tools import template_kwargs, tools
from gateway.request.unsupported import warn_unsupported
from gateway.request.values import ALLOWABLE, DEFAULT_RULES, Notes, ParsedRequest, Rules, bad, prose, refuse, show, text

# For a model whose vocabulary is not known: the smallest there is (bytes) has 256, and further down the tail than this
# sampling hardly changes.
SAFE_TOP_K = 128

MAX_CACHE_KEY = 1024  # characters
MAX_FIELDS = 1024  # of the body; most unknown ones are dropped
MAX_PARTS = 16  # requests that one of a client may become: prompts times choices
BOM = b"\xef\xbb\xbf"


RulesOf = Callable[[str], Rules]  # by the name of the model, as the client wrote it


def parse(body: bytes, kind: Kind, *, rules: Rules | RulesOf = DEFAULT_RULES) -> ParsedRequest:
    """Raises RequestError (``invalid_request``; ``param`` names the field, None when the body is no JSON object)."""
    notes = Notes()
    said = {key: value for key, value in _decode(body, notes).items() if value is not None}
    if len(said) > MAX_FIELDS:
        raise _not_json(f"the body has {len(said)} fields; send at most {MAX_FIELDS}")
    stream = boolean("stream", said.pop("stream", False), notes)
    model = text("model", said.pop("model", ""))
    rules = rules if isinstance(rules, Rules) else rules(model)
    choices = _choices(said.pop("n", 1), notes)
    include_usage = _include_usage(said.pop("stream_options", None), notes)
    cache_key = _cache_key(said.get("prompt_cache_key"))
    prompts: list[str] = []
    params = _chat(said, rules, notes) if kind is Kind.CHAT else _completion(said, notes, prompts)
    params |= _sampling(said, rules, notes)
    warn_unsupported(said, notes)
    parsed = ParsedRequest(
        kind=kind,
        model=model,
        stream=stream,
        include_usage=include_usage,
        wants_logprobs=bool(params.get("logprobs")) or params.get("top_logprobs", 0) > 0,
        params=params,
        normalized=tuple(notes.normalized),
        warnings=tuple(notes.warnings),
        max_tokens=params.get("max_tokens"),
        prompt_chars=_chars(params),
        cache_key=cache_key,
        parts=_parts(prompts, choices, params.get("seed")),
        copies=choices,
        body_size=len(body),
        values=notes.values,
    )
    return parsed if rules.defer_vocab and rules.vocab_size is None else fit_vocab(parsed, rules.vocab_size)


def fit_vocab(parsed: ParsedRequest, vocab_size: int | None) -> ParsedRequest:
    """Holds token ids and ``top_k`` inside the vocabulary (the width of the logits) of the model that will answer.

    An id beyond it is a SIGSEGV of mlx_lm.server 0.32.2, a ``top_k`` of its size ends the generation thread. With None,
    not known, ``top_k`` is held to what fits every model, and biases are refused: no id can be trusted.
    """
    params = dict(parsed.params)
    if "logit_bias" in params:
        if vocab_size is None:
            remedy = "leave it out; the gateway could not read the size of this model's vocabulary to check the ids"
            raise refuse("logit_bias", f"logit_bias: not available for this model; {remedy}")
        largest = max(map(int, params["logit_bias"]))
        if largest >= vocab_size:
            raise bad("logit_bias", f"token ids below {vocab_size}, the vocabulary of this model", largest)
    limit = SAFE_TOP_K if vocab_size is None else max(vocab_size - 1, 0)
    if params.get("top_k", 0) <= limit:
        return parsed
    params["top_k"] = limit
    return replace(parsed, params=params, normalized=tuple(dict.fromkeys((*parsed.normalized, "top_k"))))


def fit_allowed(parsed: ParsedRequest, allow: frozenset[str]) -> ParsedRequest:
    """For a model that allows less than the one the client asked for: what that alone allowed is left out."""
    params = {name: value for name, value in parsed.params.items() if name not in ALLOWABLE or name in allow}
    variables = params.get("chat_template_kwargs", {})
    if "chat_template" in variables and "chat_template" not in allow:
        params["chat_template_kwargs"] = {key: value for key, value in variables.items() if key != "chat_template"}
    return parsed if params == parsed.params else replace(parsed, params=params)


def operator_problems(params: Mapping[str, Any], rules: Rules = DEFAULT_RULES) -> tuple[str, ...]:
    """What is wrong with what the operator adds to requests (``request.defaults``, ``force``), one sentence each."""
    problems = []
    for name, value in params.items():
        try:
            _sampling({name: value}, rules, Notes())
            if name == "chat_template_kwargs":
                template_kwargs(value, rules, Notes())
            elif name == "tools":
                tools(value)
            elif name == "role_mapping":
                _role_mapping(value)
        except RequestError as exc:
            problems.append(exc.error.message)
    return tuple(problems)


def _decode(body: bytes, notes: Notes) -> dict[str, Any]:
    notes.values += count_values(body)
    if notes.values > MAX_VALUES:
        raise _not_json(f"the body has more than {MAX_VALUES} values; send fewer messages, or fewer parts in them")
    try:
        value = json_codec.loads(body.removeprefix(BOM))
    except UnicodeDecodeError as exc:
        raise _not_json(f"the body is not UTF-8 (byte {exc.start}); encode it as UTF-8") from None
    except RecursionError:
        raise _not_json("the body is nested too deeply; flatten it") from None
    except ValueError as exc:
        raise _not_json(f"the body is not valid JSON: {exc}"[:300]) from None
    if not isinstance(value, dict):
        raise _not_json(f"the body: expected a JSON object, got {show(value)}")
    return value


def _not_json(message: str) -> RequestError:
    return RequestError(GatewayError(code=Code.INVALID_REQUEST, message=message))


def _cache_key(value: Any) -> str:
    """A hint, so that one of another kind, or too long, is none."""
    return value if isinstance(value, str) and len(value) <= MAX_CACHE_KEY else ""


def _include_usage(options: Any, notes: Notes) -> bool:
    if options is None:
        return False
    if not isinstance(options, dict):
        raise bad("stream_options", 'an object such as {"include_usage": true}', options)
    wanted = options.get("include_usage")
    return wanted is not None and boolean("stream_options.include_usage", wanted, notes)


def _chat(said: dict[str, Any], rules: Rules, notes: Notes) -> dict[str, Any]:
    params: dict[str, Any] = {"messages": messages(said.pop("messages", None), notes)}
    if said.pop("functions", None):
        raise refuse("functions", 'functions: not supported; send tools, [{"type": "function", "function": {…}}]')
    offered = tools(said.pop("tools", []))
    choice = said.pop("tool_choice", "auto")
    if choice == "none" and offered:
        # mlx_lm.server ignores tool_choice: only without tools will there be no call.
        notes.changed("tools")
    elif offered:
        params["tools"] = offered
    if offered and choice not in ("none", "auto"):
        notes.warn("tool_choice", "ignored: the model decides whether it calls a tool, as with auto")
    variables = template_kwargs(said.pop("chat_template_kwargs", {}), rules, notes)
    if "reasoning_effort" in rules.allow and "reasoning_effort" in said:
        variables.setdefault("reasoning_effort", text("reasoning_effort", said.pop("reasoning_effort")))
        notes.changed("reasoning_effort")
    if variables:
        params["chat_template_kwargs"] = variables
    if "role_mapping" in rules.allow and (roles := said.pop("role_mapping", None)) is not None:
        params["role_mapping"] = _role_mapping(roles)
    return params


def _role_mapping(roles: Any) -> dict[str, str]:
    if not isinstance(roles, dict):
        raise bad("role_mapping", "an object of role names and prefixes", roles)
    return {text("role_mapping", key): text("role_mapping", value) for key, value in roles.items()}


def _completion(said: dict[str, Any], notes: Notes, prompts: list[str]) -> dict[str, Any]:
    """The legacy differences: a list as prompt, a number as logprobs. Of several prompts the first is given, and all
    are added to ``prompts``."""
    count = said.get("logprobs")
    if isinstance(count, int | float) and not isinstance(count, bool):
        said["logprobs"] = True
        alternatives = whole("logprobs", count, "true, false or a count from 0", notes)
        if alternatives < 0:
            raise bad("logprobs", "true, false or a count from 0", count)
        said.setdefault("top_logprobs", alternatives)
        notes.changed("logprobs")
    prompt = said.pop("prompt", None)
    if not isinstance(prompt, list):
        return {"prompt": _prompt("prompt", prompt, notes)}
    if prompt and all(isinstance(item, int | list) for item in prompt):
        raise bad("prompt", "text", prompt, "token ids are not supported: send the text, or a list of texts")
    if not 0 < len(prompt) <= MAX_PARTS:
        raise bad("prompt", f"a string or a list of 1 to {MAX_PARTS} strings", prompt)
    notes.changed("prompt")
    prompts += [_prompt(f"prompt[{i}]", item, notes) for i, item in enumerate(prompt)]
    return {"prompt": prompts[0]}


def _prompt(where: str, prompt: Any, notes: Notes) -> str:
    """An empty one ends the generation thread."""
    plain = prose(where, prompt, notes)
    if not plain:
        raise bad(where, "at least one character", prompt)
    return plain


def _parts(prompts: list[str], choices: int, seed: int | None) -> tuple[Mapping[str, Any], ...]:
    """One for each choice of each prompt, in OpenAI's order; none where there is but one. With one seed for all of
    them, the choices of a prompt would all be the same."""
    if max(1, len(prompts)) * choices > MAX_PARTS:
        raise bad("n", f"at most {MAX_PARTS} choices in all", max(1, len(prompts)) * choices)
    if len(prompts) <= 1 and choices == 1:
        return ()
    seeds = [{} if seed is None else {"seed": (seed + i) % 2**64} for i in range(choices)]
    return tuple({**one, **own} for one in ([{"prompt": p} for p in prompts] or [{}]) for own in seeds)


def _sampling(said: dict[str, Any], rules: Rules, notes: Notes) -> dict[str, Any]:
    """Takes what it knows out of ``said``."""
    params: dict[str, Any] = {}
    _max_tokens(said, rules, params, notes)
    for name in [name for name in CHECKS if name in said]:
        value = CHECKS[name](name, said.pop(name), notes)
        if value is not UNSET:
            params[name] = value
    for name in ("adapters", "draft_model"):
        if name in rules.allow and name in said:
            params[name] = text(name, said.pop(name), "a path or a name")
    return params


def _choices(n: Any, notes: Notes) -> int:
    expected = f"an integer from 1 to {MAX_PARTS}"
    choices = whole("n", n, expected, notes)
    if not 1 <= choices <= MAX_PARTS:
        raise bad("n", expected, n, "send several requests for more choices")
    return choices


def _max_tokens(said: dict[str, Any], rules: Rules, params: dict[str, Any], notes: Notes) -> None:
    """``max_completion_tokens`` is the newer name, and wins, as in mlx_lm.server. Both are checked."""
    for name in ("max_tokens", "max_completion_tokens"):
        if name not in said:
            continue
        limit = CHECKS["max_tokens"](name, said.pop(name), notes)
        if limit is UNSET:
            continue
        if limit > rules.max_tokens or name != "max_tokens":
            notes.changed(name)
        params["max_tokens"] = min(limit, rules.max_tokens)


def _chars(params: dict[str, Any]) -> int:
    """The length of everything that will be tokenized, roughly: JSON punctuation stands in for the template's own."""
    if "prompt" in params:
        return len(params["prompt"])
    total = len(json_codec.dumps(params["tools"])) if "tools" in params else 0
    total += sum(len(value) for value in params.get("chat_template_kwargs", {}).values() if isinstance(value, str))
    for message in params["messages"]:
        total += sum(len(value) for value in message.values() if isinstance(value, str))
        for call in message.get("tool_calls", ()):
            total += len(call["function"]["name"]) + len(call["function"]["arguments"])
    return total

"""The shape of a request whose prompt its backend may have in its prompt cache whole (``policy.cached_prompts``).

mlx_lm.server 0.32.2, as seen on the real server:

    with ``seed`` it generates apart from the batch; a prompt that is cached whole then fails for itself alone, where in
    a batch it ends the generation thread
    a longer prompt, once answered, takes the place of the entries that are its beginning (where caches can be trimmed)

So the longer prompt goes first, for one token, and then the request itself; both with a seed. A seed changes no answer:
at temperature 0 it has no effect, else the answer is a random one in any case.

Pure: no I/O, no clock.
"""

from dataclasses import replace
from typing import Any

from gateway.api.kinds import Kind
from gateway.request.values import ParsedRequest

# A space, then punctuation: both are tokens of their own in all usual tokenizers, so that the tokens of the longer
# prompt begin with those of the shorter one.
CONTINUATION = " ."


def unbatched(parsed: ParsedRequest, seed: int) -> ParsedRequest:
    """The same request, apart from the batch; with the client's own seed, if it has one."""
    if "seed" in parsed.params:
        return parsed
    return replace(parsed, params={**parsed.params, "seed": seed}, normalized=(*parsed.normalized, "seed"))


def longer(parsed: ParsedRequest) -> ParsedRequest:
    """A request for one token whose prompt goes on from that of ``parsed``."""
    kept = ("messages", "tools", "chat_template_kwargs", "role_mapping", "prompt", "seed", "adapters", "draft_model")
    params: dict[str, Any] = {name: parsed.params[name] for name in kept if name in parsed.params}
    if parsed.kind is Kind.CHAT:
        messages = params["messages"]
        said = [] if messages[-1]["role"] == "assistant" else [{"role": "assistant", "content": "."}]
        params["messages"] = [*messages, *said, {"role": "user", "content": "."}]
    else:
        params["prompt"] += CONTINUATION
    return replace(parsed, params={**params, "max_tokens": 1})

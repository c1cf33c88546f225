"""The shape of requests whose prompt may be cached whole."""

import json
from typing import Any

from gateway.api.kinds import Kind
from gateway.request import ParsedRequest, longer, parse, unbatched, upstream_body


class NoRules:
    defaults: dict[str, Any] = {}  # noqa: RUF012 read only
    force: dict[str, Any] = {}  # noqa: RUF012
    drop = ("seed", "temperature")


def parsed(kind: Kind, **body: Any) -> ParsedRequest:
    return parse(json.dumps(body).encode(), kind)


def test_a_seed_is_added_and_told() -> None:
    shaped = unbatched(parsed(Kind.COMPLETION, prompt="P", temperature=0.5), seed=7)
    assert shaped.params == {"prompt": "P", "temperature": 0.5, "seed": 7}
    assert shaped.normalized == ("seed",)


def test_the_seed_of_the_client_stays() -> None:
    before = parsed(Kind.COMPLETION, prompt="P", seed=3)
    assert unbatched(before, seed=7) is before


def test_the_operator_does_not_drop_it() -> None:
    shaped = unbatched(parsed(Kind.COMPLETION, prompt="P", temperature=1), seed=7)
    body = json.loads(upstream_body(shaped, model="m", stream=False, request_rules=NoRules(), kept=frozenset({"seed"})))
    assert body == {"prompt": "P", "seed": 7, "model": "m", "stream": False}


def test_a_longer_completion() -> None:
    shaped = longer(unbatched(parsed(Kind.COMPLETION, prompt="P", stop="x", max_tokens=90, logprobs=1), seed=7))
    assert shaped.params == {"prompt": "P .", "seed": 7, "max_tokens": 1}


def test_a_longer_chat() -> None:
    asked = [{"role": "user", "content": "Why?"}]
    more = {"tools": [{"type": "function", "function": {"name": "f"}}], "chat_template_kwargs": {"thinking": True}}
    before = parsed(Kind.CHAT, messages=asked, **more)
    shaped = longer(before).params
    assert [(m["role"], m["content"]) for m in shaped["messages"]] == [
        ("user", "Why?"),
        ("assistant", "."),
        ("user", "."),
    ]
    assert {name: shaped[name] for name in more} == {name: before.params[name] for name in more}
    assert len(before.params["messages"]) == 1
    answered = parsed(Kind.CHAT, messages=[*asked, {"role": "assistant", "content": "So."}])
    assert [m["role"] for m in longer(answered).params["messages"]] == ["user", "assistant", "user"]

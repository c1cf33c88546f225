"""Bounds on the length of an answer: the client is told of each cut."""

import json
from typing import Any

import pytest

from gateway.api.kinds import Kind
from gateway.request import ParsedRequest, fit_engine, fit_room, parse


def asks(limit: int | None) -> ParsedRequest:
    return parse(json.dumps({"prompt": "hi", "max_tokens": limit}).encode(), Kind.COMPLETION)


@pytest.mark.parametrize(
    ("asked", "default", "certain", "sent"),
    [
        (10, None, True, 10),
        (11, None, True, 10),
        (11, 5, False, 10),
        (None, 10, True, None),
        (None, 11, True, 10),
        (None, 11, False, 10),
        (None, None, True, 10),
        (None, None, False, None),
    ],
)
def test_every_cut_is_told(asked: int | None, default: int | None, certain: bool, sent: int | None) -> None:
    parsed = asks(asked)
    fitted = fit_room(parsed, 10, default, certain=certain)
    assert (fitted.max_tokens, fitted.params.get("max_tokens")) == (sent, sent)
    cut = sent != asked
    assert ("max_tokens" in fitted.normalized) == cut
    assert any(warning.startswith("max_tokens: 10,") for warning in fitted.warnings) == cut
    assert parsed.params.get("max_tokens") == asked


WHY = "of something"


def parsed(**fields: Any) -> ParsedRequest:
    return parse(json.dumps({"messages": [{"role": "user", "content": "hi"}], **fields}).encode(), Kind.CHAT)


@pytest.mark.parametrize(
    ("asked", "default", "sent"),
    [(99, 8192, 99), (100, 8192, 100), (101, 8192, 100), (None, 8192, 100), (None, 50, None), (None, None, None)],
)
def test_a_longer_answer_is_bounded_and_the_client_is_told(asked: int | None, default: int | None, sent: int) -> None:
    request = parsed(**({} if asked is None else {"max_tokens": asked}))
    fitted = fit_engine(request, 100, default, WHY)
    assert (fitted.params.get("max_tokens"), fitted.max_tokens) == (sent, sent)
    told = sent == 100 and asked != 100
    assert fitted.warnings == (("max_tokens: at most 100 tokens of something",) if told else ())
    assert ("max_tokens" in fitted.normalized) is told

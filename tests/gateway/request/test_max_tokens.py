"""An answer no longer than the context has room for: and the client is told."""

import json

import pytest

from gateway.api.kinds import Kind
from gateway.request import ParsedRequest, fit_room, parse


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

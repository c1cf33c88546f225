"""What the usage of an answer says."""

import pytest

from gateway.forward.usage import NOTHING, Cached, Usage, usage_of
from gateway.policy.affinity import Answered

DETAILS = {"prompt_tokens": 10, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 7}}


@pytest.mark.parametrize(
    ("fields", "usage"),
    [
        (None, NOTHING),
        (DETAILS, Usage(10, 3, 7, tells_cached=True)),
        ({"prompt_tokens": 5}, Usage(5)),
        ({"prompt_tokens": None, "completion_tokens": "x", "prompt_tokens_details": None}, NOTHING),
        ({"prompt_tokens_details": {"cached_tokens": "x"}}, NOTHING),
        ({"prompt_tokens": 9, "prompt_tokens_details": {"audio_tokens": 0}}, Usage(9)),
        ({"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 0}}, Usage(9, tells_cached=True)),
        ({"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 10}}, Usage(9, 0, 9, tells_cached=True)),
        ({"prompt_tokens": -9, "prompt_tokens_details": {"cached_tokens": -1}}, NOTHING),
        ({"prompt_tokens": True, "completion_tokens": 1.5, "prompt_tokens_details": [7]}, NOTHING),
    ],
)
def test_usage(fields: dict[str, object] | None, usage: Usage) -> None:
    assert usage_of(fields) == usage


def test_a_backend_that_does_not_count() -> None:
    assert NOTHING.answered(12) == Answered(12, 0, None)
    assert usage_of(DETAILS).answered(12) == Answered(10, 3, 7)


def test_tokens_of_a_model_are_counted() -> None:
    cached = Cached()
    for usage in (usage_of(DETAILS), Usage(5), NOTHING):
        cached.count(usage)
    assert (cached.prompt_tokens, cached.cached_tokens) == (15, 7)

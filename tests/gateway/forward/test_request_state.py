"""The size of a prompt, as far as it is known at each moment."""

from types import SimpleNamespace
from typing import Any

from gateway.forward.request_state import RequestState
from gateway.policy.context_limit import Size

ESTIMATED = Size(15_224, 108_000)


def state(size: Size = ESTIMATED) -> Any:
    """At its first attempt; what it reports is set by the test."""
    responder: Any = SimpleNamespace(progress=None, answered=False)
    nothing: Any = None
    one = RequestState(nothing, nothing, "m", size, None, responder, nothing)
    one.progress.model = "m"
    return one


def test_it_is_estimated_until_the_backend_tells() -> None:
    one = state()
    assert (one.progress_now().tokens, one.progress_now().counted, one.progress_now().prefilling) == (
        15_224,
        False,
        False,
    )
    one.responder.progress = (2048, 58_469)
    assert (one.progress_now().tokens, one.progress_now().counted, one.progress_now().prefilling) == (
        58_469,
        True,
        True,
    )


def test_what_a_backend_has_told_counts_also_at_an_attempt_that_comes_less_far() -> None:
    one = state()
    one.responder.progress = (4096, 58_469)
    one.keep_reported()
    one.responder.progress = None
    assert (one.progress_now().tokens, one.progress_now().counted, one.progress_now().prefilling) == (
        58_469,
        True,
        False,
    )
    one.responder.progress = (2048, 8000)
    assert one.progress_now().tokens == 58_469, "the rest was in the prompt cache"
    assert one.progress_now().read == 58_469 - (8000 - 2048)
    one.keep_reported()
    assert one.progress_now().tokens == 58_469


def test_what_is_in_the_prompt_cache_is_not_reported_but_counted() -> None:
    one = state(Size(58_469, 108_000, exact=True))
    one.responder.progress = (2048, 8000)
    assert one.progress_now().tokens == 58_469


def test_another_model_has_other_tokens() -> None:
    one = state()
    one.responder.progress = (2048, 58_469)
    one.keep_reported()
    one.responder.progress = None
    one.progress.model = "fallback"
    assert (one.progress_now().tokens, one.progress_now().counted) == (15_224, False)
    one.sizes["fallback"] = Size(30_000, 108_000, exact=True)
    assert (one.progress_now().tokens, one.progress_now().counted) == (30_000, True)

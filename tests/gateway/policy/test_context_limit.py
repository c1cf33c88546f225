"""What is too long: by the config, and by what was seen."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.diagnosis.suspects import RequestProgress
from backends.domain.prompt_bound import PromptBound
from gateway.api.errors import Code
from gateway.policy.context_limit import (
    CHARS_PER_TOKEN,
    MOST_CHARS_PER_TOKEN,
    PER_MESSAGE,
    TEMPLATE,
    TTL,
    TTL_MAX,
    USUAL,
    ContextLimit,
    Size,
    most_tokens,
    trained_context,
)

NO_NUMBERS: tuple[object, ...] = (None, 0, -1, "9", True, 1.5, [])
NO_SCALINGS: tuple[object, ...] = (None, [], "x", {"factor": "x"}, {})


def long(tokens: int, **scaling: Any) -> dict[str, Any]:
    return {"max_position_embeddings": tokens, "rope_scaling": scaling}


def exact(tokens: int) -> Size:
    return Size(tokens, 4 * tokens, exact=True)


def refused(context: ContextLimit, size: Size, now: float = 0.0) -> bool:
    return context.refusal(size, now) is not None


# -- max_context -------------------------------------------------------------------------------------------------------


def test_a_prompt_has_to_leave_room_for_an_answer() -> None:
    context = ContextLimit("m", 100)
    assert not refused(context, exact(99))
    error = context.refusal(exact(100), 0.0)
    assert error is not None
    assert (error.code, error.status, error.param, error.model) == (
        Code.CONTEXT_LENGTH_EXCEEDED,
        400,
        "messages",
        "m",
    )
    assert "100 tokens" in error.message
    assert context.room(exact(60)) == 40
    assert ContextLimit("m").room(exact(60)) is None


def test_an_estimate_gets_the_benefit_of_the_doubt() -> None:
    context = ContextLimit("m", 100)
    assert not refused(context, Size(149, 596))
    assert refused(context, Size(151, 604))


def test_an_estimate_leaves_the_answer_what_is_certain() -> None:
    context = ContextLimit("m", 100)
    assert context.room(Size(95, 380)) == 99
    assert context.room(Size(95, 380, exact=True)) == 5
    assert context.room(Size(95, 380, at_least=True)) == 5


def test_counting_is_for_those_that_may_be_too_long_or_leave_too_little() -> None:
    assert not ContextLimit("m").in_question(10**9, 10**9)
    context = ContextLimit("m", 10_000)
    assert not context.in_question(1000, 9000)
    assert context.in_question(1000, 9001)
    own = ContextLimit("m")
    own.trained = 10_000
    assert not own.in_question(9999, 10**9)
    assert own.in_question(10_000, 0)
    learned = ContextLimit("m")
    learned.ran_out(RequestProgress(20, counted=True), 80, 0.0)
    learned.ran_out(RequestProgress(30, counted=True), 120, 2.0)
    assert not learned.in_question(29, 10**9)
    assert learned.in_question(30, 0)


def test_a_prompt_has_no_more_tokens_than_bytes() -> None:
    assert most_tokens(1000, 0, 0) == 4000 + TEMPLATE
    assert most_tokens(1000, 1100, 0) == 2200 + TEMPLATE
    assert most_tokens(1000, 10**6, 2) == 4000 + TEMPLATE + 2 * PER_MESSAGE


def test_the_largest_characters_of_a_token_count_whatever_others_send() -> None:
    context = ContextLimit("m")
    assert context.estimate(400).tokens == round(400 / CHARS_PER_TOKEN)
    context.answered(8000, 1000)
    assert context.estimate(400).tokens == 50
    for _ in range(60):
        context.answered(2000, 2000)  # one client that sends what has a token for each character
    assert context.estimate(400).tokens == 50
    context.answered(999, 1)  # too short to tell anything
    context.answered(5000, 0)
    assert context.estimate(400).tokens == 50
    context.answered(10**6, 1)  # a prompt of blanks, or a server that counts wrong
    assert context.estimate(400).tokens == round(400 / MOST_CHARS_PER_TOKEN)


def test_the_usual_characters_of_a_token_are_those_of_the_latest_prompts() -> None:
    context = ContextLimit("m")
    assert context.usual(4000) == 0
    context.answered(8000, 1000)
    for _ in range(USUAL):
        context.answered(3000, 2000)
    context.answered(9000, 1000)
    context.answered(999, 1)
    assert context.usual(3000) == 2000


# -- the model's own bound ---------------------------------------------------------------------------------------------


def test_without_a_bound_of_the_operator_the_models_own_counts_for_prompts() -> None:
    context = ContextLimit("m")
    context.trained = 100
    assert not refused(context, exact(99))
    assert context.room(exact(99)) is None, "only prompts are held to it"
    error = context.refusal(Size(120, 10**6, at_least=True), 0.0)
    assert error is not None
    assert error.code is Code.CONTEXT_LENGTH_EXCEEDED
    assert "at least 120 tokens" in error.message
    assert "max_position_embeddings" in error.message
    more = ContextLimit("m", 200)
    more.trained = 100
    assert not refused(more, exact(150)), "the operator knows better"


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        ({"max_position_embeddings": 32768}, 32768),
        ({"text_config": {"max_position_embeddings": 4096}, "max_position_embeddings": 77}, 4096),
        ({"text_config": {"vocab_size": 9}, "max_position_embeddings": 77}, 77),
        ({}, None),
        *[({"max_position_embeddings": bad}, None) for bad in NO_NUMBERS],
        *[({"max_position_embeddings": 9, "rope_scaling": bad}, 9) for bad in NO_SCALINGS],
        *[({"max_position_embeddings": 9, "rope_scaling": {"factor": bad}}, 9) for bad in (0, -4, 1e300, True, None)],
        # Qwen 2.5 with the recipe for long texts: the number of the file is that before scaling
        (long(32768, type="yarn", factor=4.0, original_max_position_embeddings=32768), 131072),
        (long(32768, type="yarn", factor=4.0), 131072),
        # Llama 3.1, DeepSeek V3, Phi 3: that after it
        (long(131072, rope_type="llama3", factor=8.0, original_max_position_embeddings=8192), 131072),
        (long(163840, type="yarn", factor=40, original_max_position_embeddings=4096), 163840),
        (long(131072, type="longrope", long_factor=[1.0], original_max_position_embeddings=4096), 131072),
        (long(4096, type="linear", factor=4.0), 16384),
        ({**long(131072, rope_type="linear", factor=8.0), "model_type": "gemma3_text"}, 131072),
        # transformers 5: under another name, and for each kind of layer
        ({"max_position_embeddings": 9, "rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, 18),
        ({"max_position_embeddings": 9, "rope_parameters": {"full_attention": {"type": "yarn", "factor": 2}}}, 18),
    ],
)
def test_the_context_that_a_model_was_trained_for(config: dict[str, Any], tokens: int | None) -> None:
    assert trained_context(config) == tokens


# -- the ceiling -------------------------------------------------------------------------------------------------------


def test_what_never_fits_the_memory_is_refused_with_the_numbers_once_it_is_counted() -> None:
    context = ContextLimit("m")
    context.in_memory = lambda: PromptBound(4096, 3 << 30)
    assert not refused(context, exact(4096))
    assert not refused(context, Size(100_000, 400_000)), "only estimated"
    assert context.in_question(5000, 10), "so it is counted"
    assert not context.in_question(4000, 10)
    error = context.refusal(exact(5000), 0.0)
    assert error is not None
    assert error.code is Code.CONTEXT_LENGTH_EXCEEDED
    assert all(part in error.message for part in ("5000 tokens", "4096", "3.0 GiB", "send a shorter prompt"))
    context.answered(20_000, 6000)
    assert not refused(context, exact(6000)), "such a one was answered"


def learned(largest: int = 500, failed: int = 1000) -> ContextLimit:
    context = ContextLimit("m")
    context.answered(4 * largest, largest)
    context.ran_out(RequestProgress(failed, counted=True), 4 * failed, 0.0)
    return context


def test_both_numbers_are_told() -> None:
    context = learned()
    error = context.refusal(exact(1000), 1.0)
    assert error is not None
    assert error.code is Code.CONTEXT_LENGTH_EXCEEDED
    assert "500" in error.message
    assert "1000" in error.message
    assert not refused(context, exact(999), 1.0), "nobody knows"
    assert context.ceiling(100.0) == {"tokens": 1000, "largest_answered": 500, "expires_in": round(TTL - 100)}


def test_an_estimate_is_compared_by_characters() -> None:
    context = learned()
    assert refused(context, Size(1, 4000), 1.0)
    assert not refused(context, Size(10**6, 3999), 1.0)


def test_a_failure_whose_tokens_were_estimated_is_compared_by_characters() -> None:
    """15 224 were estimated where there were 58 469: prompts of 20 000, a third of it, would have been refused."""
    context = ContextLimit("m")
    context.answered(4000, 1000)
    context.ran_out(RequestProgress(15_224), 108_000, 0.0)
    assert not refused(context, Size(20_000, 37_000, exact=True), 1.0)
    error = context.refusal(Size(58_469, 108_000, exact=True), 1.0)
    assert error is not None
    assert "one of about 15224 ran model" in error.message
    assert not context.in_question(20_000, 0), "counting decides nothing"
    context.answered(30_000, 16_000)
    assert refused(context, Size(58_469, 108_000, exact=True), 2.0), "a third of it was answered"
    context.answered(108_000, 58_469)
    assert not refused(context, Size(58_469, 108_000, exact=True), 3.0)
    context.ran_out(RequestProgress(90_000), 100_000, 4.0)
    assert context.ceiling(5.0) is None, "a longer one was answered"


def test_a_size_that_was_answered_is_not_too_much() -> None:
    context = learned(largest=2000, failed=1000)
    assert not refused(context, exact(1500), 1.0)
    again = learned()
    again.answered(4000, 1000)
    assert not refused(again, exact(5000), 1.0)
    assert again.ceiling(1.0) is None


def test_before_anything_was_answered_one_failure_says_little() -> None:
    context = ContextLimit("m")
    context.ran_out(RequestProgress(20, counted=True), 80, 0.0)
    assert not refused(context, exact(20), 1.0)
    context.ran_out(RequestProgress(30, counted=True), 120, 2.0)
    assert refused(context, exact(30), 3.0)


def test_it_is_tried_again_alone_and_then_lasts_longer() -> None:
    context = learned()
    assert context.on_probation(exact(1000))
    assert not context.on_probation(exact(999))
    assert refused(context, exact(1000), TTL - 1)
    assert not refused(context, exact(1000), TTL)
    assert context.on_probation(exact(1000)), "nothing has disproved it"
    now = TTL
    for _ in range(9):
        context.ran_out(RequestProgress(1000, counted=True), 4000, now)
        assert refused(context, exact(1000), now + 1)
        now += TTL_MAX
    told = context.ceiling(now - TTL_MAX)
    assert told is not None
    assert told["expires_in"] == TTL_MAX


def test_the_lowest_counts() -> None:
    context = learned(failed=1000)
    context.ran_out(RequestProgress(4000, counted=True), 16_000, 1.0)
    assert refused(context, exact(1000), 2.0)
    context.ran_out(RequestProgress(800, counted=True), 3200, 3.0)
    assert refused(context, exact(800), 4.0)


def test_an_operator_can_have_it_forgotten() -> None:
    context = learned()
    context.forget()
    assert not refused(context, exact(10**6), 1.0)


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 1000), st.floats(0, 5000)), max_size=30))
def test_what_was_answered_is_never_refused_as_too_large(history: list[tuple[bool, int, float]]) -> None:
    context = ContextLimit("m")
    now = 0.0
    for answered, tokens, wait in history:
        now += wait
        if answered:
            context.answered(4 * tokens, tokens)
        else:
            context.ran_out(RequestProgress(tokens, counted=True), 4 * tokens, now)
        if context.largest:
            assert not refused(context, exact(context.largest), now)

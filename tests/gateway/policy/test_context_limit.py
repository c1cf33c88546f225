"""What is too long: by the config, and by what was seen."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.diagnosis.suspects import RequestProgress
from gateway.api.errors import Code
from gateway.policy.context_limit import CHARS_PER_TOKEN, TTL, TTL_MAX, ContextLimit, Size


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
    assert not refused(context, Size(105, 420))
    assert refused(context, Size(111, 444))


def test_counting_is_for_those_that_may_be_too_long() -> None:
    assert not ContextLimit("m").in_question(10**9, 1)
    context = ContextLimit("m", 10_000)
    assert not context.in_question(1000, 2)
    assert context.in_question(2500, 2)


def test_answers_teach_how_many_characters_a_token_has() -> None:
    context = ContextLimit("m")
    assert context.estimate(400).tokens == round(400 / CHARS_PER_TOKEN)
    for _ in range(60):
        context.answered(2000, 1000)
    assert context.estimate(400).tokens == pytest.approx(200, abs=2)
    context.answered(6, 36)  # too short to tell anything: that was the template
    context.answered(5, 0)
    assert context.estimate(400).tokens == pytest.approx(200, abs=2)


# -- the ceiling -------------------------------------------------------------------------------------------------------


def learned(largest: int = 500, failed: int = 1000) -> ContextLimit:
    context = ContextLimit("m")
    context.answered(4 * largest, largest)
    context.ran_out(RequestProgress(failed), 4 * failed, 0.0)
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


def test_a_size_that_was_answered_is_not_too_much() -> None:
    context = learned(largest=2000, failed=1000)
    assert not refused(context, exact(1500), 1.0)
    again = learned()
    again.answered(4000, 1000)
    assert not refused(again, exact(5000), 1.0)
    assert again.ceiling(1.0) is None


def test_before_anything_was_answered_one_failure_says_little() -> None:
    context = ContextLimit("m")
    context.ran_out(RequestProgress(20), 80, 0.0)
    assert not refused(context, exact(20), 1.0)
    context.ran_out(RequestProgress(30), 120, 2.0)
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
        context.ran_out(RequestProgress(1000), 4000, now)
        assert refused(context, exact(1000), now + 1)
        now += TTL_MAX
    told = context.ceiling(now - TTL_MAX)
    assert told is not None
    assert told["expires_in"] == TTL_MAX


def test_the_lowest_counts() -> None:
    context = learned(failed=1000)
    context.ran_out(RequestProgress(4000), 16_000, 1.0)
    assert refused(context, exact(1000), 2.0)
    context.ran_out(RequestProgress(800), 3200, 3.0)
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
            context.ran_out(RequestProgress(tokens), 4 * tokens, now)
        if context.largest:
            assert not refused(context, exact(context.largest), now)

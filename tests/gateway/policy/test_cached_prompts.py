"""Which prompts may be keys of a replica's prompt cache: near misses on both sides, and the bounds."""

import json
import time
from typing import Any

import pytest

from backends.domain.snapshot import Seat
from gateway.api.kinds import Kind
from gateway.policy import cached_prompts
from gateway.policy.affinity import path_of
from gateway.policy.cached_prompts import CachedPrompts, Prompt, prompt_of
from gateway.request import ALLOWABLE, Rules, parse

SEAT = Seat("tiny:0", 1)
RULES = Rules(allow=frozenset(ALLOWABLE), defer_vocab=True)


def of_text(prompt: str, **more: Any) -> Prompt:
    return prompt_of(parse(json.dumps({"prompt": prompt, **more}).encode(), Kind.COMPLETION, rules=RULES), ())


def of_chat(*said: str, **more: Any) -> Prompt:
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
    parsed = parse(json.dumps({"messages": messages, **more}).encode(), Kind.CHAT, rules=RULES)
    return prompt_of(parsed, path_of(parsed, "m").turns)


def after(prompt: str, *answer: str, **more: Any) -> CachedPrompts:
    """A replica that was sent ``prompt``, and has answered in these pieces."""
    cached = CachedPrompts()
    trace = cached.sent(SEAT, of_text(prompt, **more))
    assert trace is not None
    for piece in answer:
        trace.add(piece)
    return cached


LONG = "It rains in the valley. " * 40


@pytest.mark.parametrize("begin", ["", LONG])
@pytest.mark.parametrize(
    ("prompt", "risky"),
    [
        ("The river runs past the mill", True),  # prompt and answer
        ("The river  runs past the mill ", True),  # the server strips the first space of an answer
        ("The river runs past the mill<|im_end|>", True),  # a token that ends it, written out
        ("The river runs past the mill\n\nQ:", True),  # a stop word
        ("The river", False),  # the prompt itself: keys are longer or shorter
        ("The riv", True),  # without its last token
        ("The ", True),
        ("The river\n", True),  # the last token may be white space
        ("The river runs past", False),  # a part of the answer
        ("The river runs past the mill and", False),
        ("The river runs past the mill<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>", False),  # the next turn
        ("The lake runs past the mill", False),
        ("A river", False),
    ],
)
def test_completions(begin: str, prompt: str, risky: bool) -> None:
    cached = after(begin + "The river", "runs past", " the", "", " mill", stop=["\n\nQ:"])
    assert cached.may_hold(SEAT, of_text(begin + prompt)) is risky


def test_a_prompt_that_grows_by_a_key_is_no_risk_until_there_is_an_answer() -> None:
    """An editor asks at each key, and drops the last request."""
    cached = after("def f")
    assert not cached.may_hold(SEAT, of_text("def fo"))
    assert not cached.may_hold(SEAT, of_text("def f"))
    assert cached.may_hold(SEAT, of_text("def "))


def test_every_prefix_within_the_longest_token_is_a_risk_and_no_other() -> None:
    cached = after(text := "".join(chr(0x4E00 + i) for i in range(500)))
    risky = [n for n in range(1, 500) if cached.may_hold(SEAT, of_text(text[:n]))]
    assert risky == list(range(500 - cached_prompts.MARGIN, 500))


@pytest.mark.parametrize("cut", [1, 7, 63, 64, 65, 127, 128, 129, 300])
def test_an_answer_is_recognised_however_it_came(cut: int) -> None:
    answer = LONG[:400]
    pieces = [answer[at : at + cut] for at in range(0, len(answer), cut)]
    cached = after("Say: ", *pieces)
    assert cached.may_hold(SEAT, of_text("Say: " + answer))
    assert not cached.may_hold(SEAT, of_text("Say: " + answer[:-9]))


def test_chats_with_other_template_settings() -> None:
    cached = CachedPrompts()
    off = {"chat_template_kwargs": {"enable_thinking": False}}
    cached.sent(SEAT, of_chat("Why?", **off))
    assert cached.may_hold(SEAT, of_chat("Why?"))
    assert not cached.may_hold(SEAT, of_chat("Why?", **off)), "the same again"
    assert not cached.may_hold(SEAT, of_chat("Why?", temperature=1, max_tokens=5, **off))
    assert not cached.may_hold(SEAT, of_chat("Why?", "So.", "Why?")), "the next turn"
    cached.sent(SEAT, of_chat("Why?"))
    assert cached.may_hold(SEAT, of_chat("Why?", **off))


def test_a_chat_that_ends_in_the_answer() -> None:
    cached = CachedPrompts()
    cached.sent(SEAT, of_chat("Why?"))
    assert cached.may_hold(SEAT, of_chat("Why?", "So."))
    assert not cached.may_hold(SEAT, of_chat("Who?", "So."))


def test_records_are_of_one_instance() -> None:
    cached = after("P", "A")
    again = of_text("PA")
    assert cached.risky([SEAT, Seat("tiny:1", 1)], again) == {SEAT}
    assert not cached.may_hold(Seat("tiny:0", 2), again), "its cache has ended with its process"
    cached.sent(Seat("tiny:0", 2), of_text("Q"))
    assert not cached.may_hold(SEAT, again)


def test_records_are_bounded() -> None:
    cached = CachedPrompts()
    for i in range(3000):
        cached.sent(SEAT, of_text(f"{i:05}"))
        cached.sent(SEAT, of_chat(f"{i:05}"))
        cached.sent(SEAT, of_chat("one", chat_template_kwargs={"x": i}))
    seen = cached._seen["tiny:0"]
    assert len(seen.texts) == cached_prompts.MAX_TEXTS
    assert len(seen.chats) == cached_prompts.MAX_CHATS
    assert max(map(len, seen.chats.values())) == cached_prompts.MAX_VARIANTS
    assert cached.may_hold(SEAT, of_text("0299"))
    assert not cached.may_hold(SEAT, of_text("0000"))


def test_the_cost_does_not_grow_with_the_length_of_what_is_on_record() -> None:
    """No record is ruled out by its length. 0.1 s is a hundred times what it takes."""
    cached = CachedPrompts()
    long = "x" * 100_000
    for i in range(cached_prompts.MAX_TEXTS):
        trace = cached.sent(SEAT, of_text(f"{long}{i:05}"))
        assert trace is not None
        trace.add("y")
    prompt = of_text(f"{long}zzzz")
    began = time.perf_counter()
    assert not cached.may_hold(SEAT, prompt)
    assert time.perf_counter() - began < 0.1

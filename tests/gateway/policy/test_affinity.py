"""A conversation goes where its beginning is cached."""

from collections.abc import Mapping
from typing import Any

import pytest

from backends.domain.snapshot import Seat
from gateway.api.json_codec import dumps
from gateway.api.kinds import Kind
from gateway.forward.request_state import Cached, cached_tokens
from gateway.policy.affinity import Affinity, Held, keys_of, session_of, turns_of
from gateway.request import ParsedRequest, parse

HERE, THERE = Held(Seat("m:0", 1), 10, 30), Held(Seat("m:1", 3), 20, 60)


def say(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


SYSTEM, FIRST, ANSWER, SECOND = say("system", "be kind"), say("user", "hi"), say("assistant", "hello"), say("user", "?")


def chat(*messages: Mapping[str, Any], **more: Any) -> ParsedRequest:
    return parse(dumps({"model": "m", "messages": list(messages), **more}), Kind.CHAT)


def keys(*messages: Mapping[str, Any], model: str = "m", **more: Any) -> tuple[int, ...]:
    return keys_of(turns_of(chat(*messages, **more)), model, b"")


def test_the_next_turn_goes_where_the_last_one_was_answered() -> None:
    known = Affinity()
    known.note(keys(SYSTEM, FIRST), HERE)
    assert known.of(keys(SYSTEM, FIRST, ANSWER, SECOND)) == HERE
    assert known.of(keys(SYSTEM, FIRST)) == HERE, "and so does the same again"


def test_the_longest_beginning_wins() -> None:
    known = Affinity()
    known.note(keys(SYSTEM, FIRST), HERE)
    known.note(keys(SYSTEM, FIRST, ANSWER, SECOND), THERE)
    assert known.of(keys(SYSTEM, FIRST, ANSWER, SECOND, ANSWER, FIRST)) == THERE
    assert known.of(keys(SYSTEM, FIRST, say("assistant", "another"), SECOND)) == HERE


@pytest.mark.parametrize(
    "other",
    [
        keys(SYSTEM, SECOND),
        keys(say("system", "be rude"), FIRST, ANSWER, SECOND),
        keys(SYSTEM, FIRST, ANSWER, SECOND, model="other"),
        keys(SYSTEM, FIRST, ANSWER, SECOND, tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}]),
        (),
    ],
)
def test_what_only_looks_alike_is_another_conversation(other: tuple[int, ...]) -> None:
    """A system prompt that all share would send all to one replica."""
    known = Affinity()
    known.note(keys(SYSTEM, FIRST), HERE)
    assert known.of(other) is None


def test_a_session_is_known_by_its_name_whatever_it_says() -> None:
    known = Affinity()
    known.note(keys_of(turns_of(chat(FIRST)), "m", b"s1"), HERE)
    assert known.of(keys_of(turns_of(chat(SECOND)), "m", b"s1")) == HERE
    assert known.of(keys_of(turns_of(chat(FIRST)), "m", b"s2")) is None
    assert known.of(keys_of(turns_of(chat(FIRST)), "other", b"s1")) is None


def test_completions_are_known_by_their_session_only() -> None:
    parsed = parse(b'{"model": "m", "prompt": "x"}', Kind.COMPLETION)
    assert keys_of(turns_of(parsed), "m", b"") == ()
    assert keys_of(turns_of(parsed), "m", b"s") != ()


def test_sessions_are_read_from_the_headers_that_clients_send() -> None:
    assert session_of({b"x-session-id": b"a", b"x-session-affinity": b"b"}.get) == b"b"  # type: ignore[arg-type]
    assert session_of(lambda name: b"c" if name == b"x-claude-code-session-id" else b"") == b"c"
    assert session_of(lambda _: b"") == b""


def test_the_oldest_are_forgotten() -> None:
    known = Affinity(max_conversations=2)
    for key in (1, 2, 1, 3):
        known.note((key,), HERE)
    assert known.of((2,)) is None
    assert known.of((1,)) == known.of((3,)) == HERE
    known.note((), HERE)


def test_tokens_are_counted() -> None:
    cached = Cached()
    cached.count({"prompt_tokens": 10, "prompt_tokens_details": {"cached_tokens": 7}})
    cached.count({"prompt_tokens": 5})
    cached.count({"prompt_tokens": None, "prompt_tokens_details": None})
    assert (cached.prompt_tokens, cached.cached_tokens) == (15, 7)
    assert cached_tokens({"prompt_tokens_details": {"cached_tokens": "x"}}) == 0

"""A prompt goes where its beginning is cached."""

import random
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.domain.snapshot import Seat
from gateway.api.json_codec import dumps
from gateway.api.kinds import Kind
from gateway.policy import affinity
from gateway.policy.affinity import Affinity, Answered, Path, path_of, preferred, session_of
from gateway.request import ParsedRequest, parse

HERE, THERE = Seat("m:0", 1), Seat("m:1", 3)
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}, "description": "what it does " * 50}}]


def say(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


def words(name: str, count: int) -> str:
    draw = random.Random(name)
    return " ".join(str(draw.randrange(100, 999)) for _ in range(count))


SYSTEM = say("system", words("system", 3000))  # 12 kB
FIRST, ANSWER, SECOND = say("user", words("first", 500)), say("assistant", "hello"), say("user", "and then?")
SUBAGENT, TITLE = say("system", words("subagent", 1000)), say("system", "Write a title.")


def chat(*messages: Mapping[str, Any], **more: Any) -> ParsedRequest:
    return parse(dumps({"model": "m", "messages": list(messages), **more}), Kind.CHAT)


def path(*messages: Mapping[str, Any], model: str = "m", session: bytes = b"", **more: Any) -> Path:
    return path_of(chat(*messages, **more), model, session)


def completion(prompt: str) -> Path:
    return path_of(parse(dumps({"model": "m", "prompt": prompt}), Kind.COMPLETION), "m")


def tokens(of: Path) -> int:
    return of.sizes[-1] // 4


def answered(of: Path, cached: int | None = None) -> Answered:
    return Answered(tokens(of), 10, cached)


def in_caches(known: Affinity, of: Path) -> Mapping[Seat, int]:
    return known.known(of, (HERE.backend, THERE.backend)).held


def note(known: Affinity, of: Path, seat: Seat = HERE, cached: int | None = None) -> None:
    known.note(of, seat, answered(of, cached), in_caches(known, of).get(seat, 0))


# -- what is held where ------------------------------------------------------------------------------------------------


def test_the_next_turn_goes_where_the_last_one_was_answered() -> None:
    known = Affinity()
    first, second = path(SYSTEM, FIRST), path(SYSTEM, FIRST, ANSWER, SECOND)
    note(known, first)
    assert in_caches(known, second) == {HERE: tokens(first) + 10}, "its prompt and its answer"
    assert in_caches(known, first) == {HERE: tokens(first)}, "and so does the same again"


def test_each_replica_has_what_it_has_seen() -> None:
    known = Affinity()
    note(known, path(SYSTEM, FIRST))
    note(known, path(SYSTEM, FIRST, ANSWER, SECOND), THERE)
    other = in_caches(known, path(SYSTEM, FIRST, ANSWER, say("user", "something else")))
    longest = tokens(path(SYSTEM, FIRST, ANSWER))
    assert abs(other[THERE] - longest) <= 1
    assert other[HERE] == tokens(path(SYSTEM, FIRST)) + 10


def test_a_new_conversation_shares_the_tools_and_instructions() -> None:
    known = Affinity()
    note(known, path(SYSTEM, FIRST, tools=TOOLS))
    held = in_caches(known, path(SYSTEM, SECOND, tools=TOOLS))
    assert abs(held[HERE] - tokens(path(SYSTEM, tools=TOOLS))) <= 1


def test_a_line_that_changes_costs_what_comes_after_it() -> None:
    """The server's cache is no longer than that either."""
    known = Affinity()
    text = SYSTEM["content"]
    note(known, path(SYSTEM, FIRST))
    late = in_caches(known, path(say("system", text[:10_000] + "Today is Monday" + text[10_000:]), FIRST))
    assert 8_000 / 4 < late[HERE] <= 10_000 / 4
    assert in_caches(known, path(say("system", "Today is Monday. " + text), FIRST)) == {}


def test_a_subagent_is_not_pulled_to_its_parent_by_the_name_of_the_session() -> None:
    known = Affinity()
    note(known, path(SYSTEM, FIRST, session=b"s"), HERE)
    note(known, path(SUBAGENT, FIRST, session=b"s"), THERE)
    child = path(SUBAGENT, FIRST, ANSWER, SECOND, session=b"s")
    parent = path(SYSTEM, FIRST, ANSWER, SECOND, session=b"s")
    assert preferred(in_caches(known, child), tokens(child)) == THERE
    assert preferred(in_caches(known, parent), tokens(parent)) == HERE


@pytest.mark.parametrize(
    "other",
    [
        path(say("system", "be rude"), FIRST, ANSWER, SECOND),
        path(SYSTEM, FIRST, model="other"),
        path(SYSTEM, FIRST, tools=TOOLS),
        completion(SYSTEM["content"]),
        path(TITLE, FIRST),
    ],
)
def test_what_only_looks_alike_shares_nothing(other: Path) -> None:
    known = Affinity()
    note(known, path(SYSTEM, FIRST))
    assert in_caches(known, other) == {}


@pytest.mark.parametrize("length", [300, 5_000, 100_000])
def test_the_text_of_a_completion_that_goes_on(length: int) -> None:
    known = Affinity()
    text = words("text", length // 4)
    note(known, completion(text))
    held = in_caches(known, completion(text + " and so on"))[HERE]
    assert 0 <= len(text) / 4 + 10 - held < affinity.BLOCK / 4 + 11


def test_how_many_tokens_a_prompt_has_is_learned_from_what_it_begins_with() -> None:
    known = Affinity()
    first, second = path(SYSTEM, FIRST), path(SYSTEM, FIRST, ANSWER, SECOND)
    assert known.known(first, ["m:0"]).tokens == 0
    known.note(first, HERE, Answered(7_000))
    assert known.known(first, ["m:0", "m:1"]).tokens == 7_000
    assert known.known(first, ["m:1"]) == ({}, 0), "of other replicas"
    rest = 7_000 * (second.sizes[-1] - first.sizes[-1]) / first.sizes[-1]
    assert abs(known.known(second, ["m:0"]).tokens - 7_000 - rest) <= 1
    known.note(path(SUBAGENT), HERE, Answered(path(SUBAGENT).sizes[-1]))
    assert known.known(first, ["m:0"]).tokens == 7_000, "of other texts it may be another number"
    assert known.known(Path(), ["m:0"]).tokens == 0


def test_a_new_instance_has_nothing() -> None:
    known = Affinity()
    note(known, path(SYSTEM, FIRST), HERE)
    note(known, path(TITLE, SECOND), Seat("m:0", 2))
    note(known, path(SYSTEM, FIRST), HERE)
    assert in_caches(known, path(SYSTEM, FIRST)) == {}


# -- which is preferred ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("held", "prompt", "seat"),
    [
        ({}, 5000, None),
        ({HERE: 4000}, 5000, HERE),
        ({HERE: 4000, THERE: 3000}, 5000, HERE),
        ({HERE: 4000, THERE: 3990}, 5000, None),
        ({HERE: 100}, 5000, None),
        ({HERE: 100}, 150, HERE),
        ({HERE: 600}, 5000, HERE),
    ],
)
def test_preference(held: dict[Seat, int], prompt: int, seat: Seat | None) -> None:
    assert preferred(held, prompt) == seat


def test_hints_are_for_what_shares_no_beginning() -> None:
    known = Affinity()
    note(known, path(FIRST, session=b"s1"))
    assert known.hinted(path(SECOND, session=b"s1")) == HERE
    assert known.hinted(path(SECOND, session=b"s2")) is None
    assert known.hinted(path(SECOND)) is None
    note(known, path(FIRST, session=b"s1", prompt_cache_key="k"), THERE)
    assert known.hinted(path(SECOND, session=b"s2", prompt_cache_key="k")) == THERE
    assert known.hinted(path(SECOND, session=b"s1")) == HERE


def test_sessions_are_read_from_the_headers_that_clients_send() -> None:
    assert session_of({b"x-session-id": b"a", b"x-session-affinity": b"b"}.get) == b"b"  # type: ignore[arg-type]
    assert session_of(lambda name: b"c" if name == b"x-claude-code-session-id" else b"") == b"c"
    assert session_of(lambda _: b"") == b""


# -- evictions ---------------------------------------------------------------------------------------------------------


def conversation(number: int, turns: int = 1) -> Path:
    messages = [say("system", words(f"c{number}", 2000))]
    for turn in range(turns):
        messages += [say("user", words(f"c{number}t{turn}", 100)), ANSWER]
    return path(*messages[:-1])


def test_an_eviction_is_noticed_and_what_is_older_is_gone_too() -> None:
    known = Affinity()
    for number in range(4):
        note(known, conversation(number))
    note(known, conversation(1, 2), cached=0)
    held = [bool(in_caches(known, conversation(number))) for number in range(4)]
    assert held == [False, True, True, True], "it has read the second one again"


def test_what_was_used_since_is_not_older() -> None:
    known = Affinity()
    for number in range(3):
        note(known, conversation(number))
    note(known, conversation(0, 2), cached=tokens(conversation(0)))
    note(known, conversation(1, 2), cached=0)
    assert [bool(in_caches(known, conversation(number))) for number in range(3)] == [True, True, True]


def test_a_model_that_never_finds_its_answers_is_not_taken_for_one_that_evicts() -> None:
    """A template that leaves out earlier reasoning, or a cache that cannot be trimmed: a part is found each time."""
    known = Affinity()
    note(known, conversation(0))
    for turns in range(2, 40):
        expected = in_caches(known, conversation(9, turns)).get(HERE, 0)
        note(known, conversation(9, turns), cached=expected * 6 // 10 if expected else 0)
    assert in_caches(known, conversation(0))[HERE] < tokens(conversation(0)), "as much as is found"
    assert in_caches(known, conversation(0))


def test_a_backend_that_does_not_report_what_it_found_is_believed_to_find_it() -> None:
    known = Affinity()
    for turns in range(1, 5):
        note(known, conversation(0, turns))
    assert in_caches(known, conversation(0, 5))[HERE] == tokens(conversation(0, 4)) + 10


# -- bounds ------------------------------------------------------------------------------------------------------------


def test_the_oldest_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(affinity, "MAX_CONVERSATIONS", 2)
    monkeypatch.setattr(affinity, "MAX_HINTS", 1)
    known = Affinity()
    for number in (1, 2, 1, 3):
        note(known, path(say("user", f"hello {number}"), session=str(number).encode()))
    held = [bool(in_caches(known, path(say("user", f"hello {number}")))) for number in (1, 2, 3)]
    assert held == [True, False, True]
    assert [known.hinted(path(FIRST, session=str(n).encode())) for n in (1, 3)] == [None, HERE]


def test_a_prompt_of_very_many_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(affinity, "MAX_PIECES", 10)
    monkeypatch.setattr(affinity, "MAX_KEYS", 15)
    known = Affinity()
    long = path(*[say("user", f"{n}") for n in range(1000)])
    assert len(long.keys) == 10
    assert long.turns != path(*[say("user", f"{n}") for n in range(999)]).turns
    note(known, long)
    note(known, path(*[say("user", f"other {n}") for n in range(1000)]))
    assert in_caches(known, long) == {}
    assert in_caches(known, Path()) == {}
    known.note(Path(), HERE, Answered(0))


PROMPTS = st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=6), min_size=1, max_size=30)


@given(PROMPTS, st.lists(st.integers(0, 400), min_size=30, max_size=30))
def test_nothing_is_left_of_what_was_forgotten(prompts: list[list[str]], cached: list[int]) -> None:
    """Whatever was answered and evicted: the beginnings are those of the conversations, and none is within another."""
    known = Affinity()
    for prompt, found in zip(prompts, cached, strict=False):
        of = path(*[say("user", text * 1000) for text in prompt])
        note(known, of, cached=found)
        assert in_caches(known, of)
    (cache,) = known._caches.values()
    conversations = [conversation.keys for conversation in cache.conversations.values()]
    count = {key: sum(key in keys for keys in conversations) for keys in conversations for key in keys}
    assert {key: beginning.used for key, beginning in cache.beginnings.items()} == count

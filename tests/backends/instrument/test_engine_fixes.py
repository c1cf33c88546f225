"""What is replaced in the engine, beside the original of the installed mlx-lm."""

import inspect
import time
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.instrument import engine_source
from backends.instrument.instrument import ADMISSION_BUDGET, FIXES, THINKING_TAIL, digest
from tests.backends.instrument.engine_parts import (
    CACHE,
    SERVER,
    FakeCache,
    FakeTokenizer,
    cache_module,
    fixed,
    method,
    module,
)

engine = cache_module()
search = fixed("prompt_search", engine.PromptTrie.search)
start = fixed("prompt_list", engine.LRUPromptCache.__init__)
fetch = fixed("exact_hit", engine.LRUPromptCache.fetch_nearest_cache)

prompts = st.lists(st.integers(0, 2), max_size=9)
keys = st.lists(st.integers(0, 2), min_size=1, max_size=9)


def filled(stored: list[list[int]], *, trimmable: bool, entries: int = 10, listed: bool = False) -> Any:
    """A prompt cache as the engine fills it: in order, beginnings and what is too much taken out."""
    cache = engine.LRUPromptCache.__new__(engine.LRUPromptCache)
    (start if listed else engine.LRUPromptCache.__init__)(cache, entries)
    for key in stored:
        cache.insert_cache("m", key, [FakeCache(len(key), trimmable)])
    return cache


# -- the search --------------------------------------------------------------------------------------------------------


caches = st.builds(
    filled, st.lists(keys, max_size=14), trimmable=st.booleans(), entries=st.integers(1, 10), listed=st.booleans()
)


@given(caches, st.lists(prompts, min_size=1, max_size=8))
def test_the_search_finds_what_the_original_finds(cache: Any, asked: list[list[int]]) -> None:
    trie = cache._trie
    for prompt in asked:
        for model in ("m", "another"):
            assert search(trie, model, prompt) == engine.PromptTrie.search(trie, model, prompt)


def test_the_search_takes_linear_time() -> None:
    """The original copies five thousand million tokens here."""
    trie = engine.PromptTrie()
    trie.add("m", range(100_000), "entry")
    began = time.process_time()
    found = search(trie, "m", [0, 1, -1])
    assert time.process_time() - began < 1.0
    assert (found.longer, found.common_prefix) == ([*range(100_000)], 2)


def test_a_list_of_the_entries_spares_the_walk() -> None:
    """One that would find nothing at all."""
    cache = filled([[1, 2, 3, 4], [1, 2, 5, 6, 7], [1, 8, 9]], trimmable=True, listed=True)
    for node in cache._trie._trie["m"][1].values():
        node.clear()
    assert search(cache._trie, "m", [1, 2, 8]).longer == [1, 2, 3, 4]
    assert search(cache._trie, "m", [1, 8]).longer == [1, 8, 9]


def test_the_search_where_every_entry_is_nearer_than_the_last() -> None:
    trie = engine.PromptTrie()
    for length in range(1, 400):  # the last inserted is looked at first
        trie.add("m", [0, length, *([1] * length)], length)
    assert search(trie, "m", [0, -1]).longer == engine.PromptTrie.search(trie, "m", [0, -1]).longer == [0, 1, 1]


# -- a prompt that is cached whole -------------------------------------------------------------------------------------


@given(st.lists(keys, max_size=10), st.booleans(), st.lists(keys, min_size=1, max_size=8), st.booleans())
def test_there_is_always_something_to_read(
    stored: list[list[int]], trimmable: bool, asked: list[list[int]], linear: bool
) -> None:
    cache = filled(stored, trimmable=trimmable)
    if linear:
        cache._trie.search = lambda model, tokens: search(cache._trie, model, tokens)
    for prompt in [*asked, *stored]:
        found, rest = fetch(cache, "m", prompt)
        assert rest
        assert rest == prompt[len(prompt) - len(rest) :]
        held = found[0].offset if found else 0
        assert held + len(rest) == len(prompt)
        original, left = engine.LRUPromptCache.fetch_nearest_cache(cache, "m", prompt)
        if left:
            assert (found, rest) == (original, left)


@pytest.mark.parametrize(("trimmable", "read"), [(True, 2), (False, 5)])
def test_a_prompt_that_is_cached_whole(trimmable: bool, read: int) -> None:
    """Read again: two tokens, or all where the cache cannot be trimmed."""
    cache = filled([[1, 2, 3, 4, 5]], trimmable=trimmable)
    assert engine.LRUPromptCache.fetch_nearest_cache(cache, "m", [1, 2, 3, 4, 5])[1] == []
    assert len(fetch(cache, "m", [1, 2, 3, 4, 5])[1]) == read


# -- the admission budget ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranks", "given", "budget"), [(1, {}, ADMISSION_BUDGET), (1, {"budget": 2.0}, 2.0), (2, {}, 0.5)]
)
def test_the_engine_looks_for_requests_more_often_unless_it_is_distributed(
    ranks: int, given: dict[str, float], budget: float
) -> None:
    group = SimpleNamespace(size=lambda: ranks)
    mx = SimpleNamespace(distributed=SimpleNamespace(init=lambda: group))
    time_budget = module(SERVER, {"TimeBudget"}, mx=mx, time=time)["TimeBudget"]
    made = time_budget.__new__(time_budget)
    fixed("admission_budget", time_budget.__init__)(made, **given)
    assert made._budget == budget


# -- tool turns --------------------------------------------------------------------------------------------------------

scope = module(SERVER, {"process_message_content", "_image_url", "convert_chat"}, logging=None)
cut_by_the_engine = method(SERVER, "ResponseGenerator._tokenize", scope)
cut = fixed("tool_turns", cut_by_the_engine)

roles = st.sampled_from(["system", "user", "assistant", "tool"])
conversations = st.lists(st.tuples(roles, st.text("ab", max_size=9)), min_size=1, max_size=6)
trimmables = st.booleans() | st.integers(1, 60)  # a number: a window of so many tokens


@dataclass
class Window(FakeCache):
    max_size: int = 0


def layers(trimmable: bool | int) -> list[Any]:
    last = FakeCache(0, trimmable) if isinstance(trimmable, bool) else Window(0, max_size=trimmable)
    return [FakeCache(0), SimpleNamespace(caches=[FakeCache(0), last], is_trimmable=lambda: last.trimmable)]


@given(conversations, st.integers(0, 12), trimmables)
def test_a_tool_turn_is_cut_where_a_user_turn_is(said: list[tuple[str, str]], tail: int, trimmable: bool | int) -> None:
    provider = SimpleNamespace(processor=None, model=None, cli_args=SimpleNamespace(chat_template_args={}))
    scope["make_prompt_cache"] = lambda _model: layers(trimmable)

    def parts(tokenize: Any, last: str) -> Any:
        messages = [{"role": role, "content": text} for role, text in said]
        messages[-1]["role"] = last
        request = SimpleNamespace(request_type="chat", messages=messages, tools=None, role_mapping=None)
        settings = SimpleNamespace(chat_template_kwargs=None)
        return tokenize(SimpleNamespace(model_provider=provider), FakeTokenizer(tail), request, settings)

    for role in ("user", "assistant", "system"):
        assert parts(cut, role) == parts(cut_by_the_engine, role)
    whole = parts(cut_by_the_engine, "tool")
    prompt, *_ = whole
    ends = len(prompt) < trimmable if type(trimmable) is int else trimmable
    if ends or not 0 < tail <= THINKING_TAIL:
        assert parts(cut, "tool") == whole
    else:
        segments = [prompt[:-tail], prompt[-tail:]]
        assert parts(cut, "tool") == (prompt, segments, ["user", "assistant"], *whole[3:])
        assert parts(cut_by_the_engine, "user")[1][-1] == segments[-1]


def test_other_requests_are_cut_as_the_original_cuts_them() -> None:
    for kind, template in (("text", True), ("chat", False)):
        request = SimpleNamespace(
            request_type=kind, prompt="abc", messages=[{"role": "tool", "content": "x"}], tools=None, role_mapping=None
        )
        tokenizer = FakeTokenizer(3, has_chat_template=template)
        assert cut(None, tokenizer, request, None) == cut_by_the_engine(None, tokenizer, request, None)


# -- the guard ---------------------------------------------------------------------------------------------------------


def test_all_fixes_fit_the_installed_engine() -> None:
    package = engine_source.installed()
    assert package is not None
    assert engine_source.unfit(package) == ()


def test_a_source_that_is_another_one_is_told(tmp_path: Any) -> None:
    package = engine_source.installed()
    assert package is not None
    (tmp_path / "models").mkdir()
    text = (package / CACHE).read_text()
    (tmp_path / CACHE).write_text(text.replace("best = None", "best = None  # none yet"))
    (tmp_path / SERVER).write_text("class TimeBudget:\n    def __init__(self")
    assert engine_source.unfit(tmp_path) == ("prompt_search", "admission_budget", "tool_turns")


# -- with mlx ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow  # loads mlx
def test_the_sources_read_are_those_that_the_instrument_sees() -> None:
    from mlx_lm import server  # noqa: PLC0415 - for the slow tests alone
    from mlx_lm.models import cache  # noqa: PLC0415 - the same

    for fix in FIXES:
        owner, name = fix.name.split(".")
        found = getattr(getattr(cache if fix.module.endswith("cache") else server, owner), name)
        assert digest(inspect.getsource(found)) == digest(found)
        assert digest(found) in fix.sources


@pytest.mark.slow  # loads mlx
@pytest.mark.parametrize("kind", ["attention", "window", "recurrent", "list"])
def test_a_stored_entry_holds_what_it_says_and_no_more(kind: str) -> None:
    import mlx.core as mx  # noqa: PLC0415 - for the slow tests alone
    from mlx_lm.models import cache  # noqa: PLC0415 - the same

    caches: Any = cache

    def batch_of(kind: str) -> Any:
        made: Any
        match kind:
            case "recurrent":
                made = caches.ArraysCache(2)
                made[0], made[1] = (mx.random.normal((8, size, 64)) for size in (64, 512))
                return made
            case "list":
                made = caches.CacheList()
                made.caches = (batch_of("attention"), batch_of("recurrent"))
                return made
            case "attention":
                made = caches.BatchKVCache([0] * 8)
            case _:
                made = caches.BatchRotatingKVCache(256, [0] * 8)
        made.update_and_fetch(*(mx.random.normal((8, 4, 600, 16)) for _ in range(2)))
        return made

    insert = fixed("stored_entries", caches.LRUPromptCache.insert_cache)
    batch = batch_of(kind)
    mx.eval(batch.state)
    entry, plain = batch.extract(3), batch.extract(3)
    before = mx.get_active_memory()
    stored = caches.LRUPromptCache()
    insert(stored, "m", [1, 2, 3], [entry], cache_type="user")
    held = mx.get_active_memory() - before
    assert 0.9 * entry.nbytes < held < 1.1 * entry.nbytes + 100_000
    assert (len(stored), stored.nbytes) == (1, entry.nbytes)
    flat = [array for state in (entry.state, plain.state) for array in _arrays(state)]
    half = len(flat) // 2
    assert half >= 2
    assert all(bool(mx.array_equal(a, b)) for a, b in zip(flat[:half], flat[half:], strict=True))


def _arrays(state: Any) -> list[Any]:
    if isinstance(state, list | tuple):
        return [array for part in state for array in _arrays(part)]
    return [state] if hasattr(state, "dtype") else []

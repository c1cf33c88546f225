"""How the memory is divided among replicas, and each share into its parts."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.memory.share import (
    MAX_CACHED_TOKENS,
    MIN_ENTRIES,
    MIN_POOL,
    MIN_PROMPT_CACHE,
    UNKNOWN,
    Appetite,
    Claimant,
    Ours,
    Sizes,
    capacity,
    divide,
    sizes,
    split,
)

GB = 10**9
KIB = 1024
QWEN = Appetite(base=3 * GB, sequence=int(1.2 * GB), token=144 * KIB)  # Qwen3-4B, 4-bit, at 8192 tokens
CONVERSATION = 28_000 * 144 * KIB

amounts = st.integers(0, 500 * GB)
appetites = st.builds(
    Appetite,
    base=st.integers(0, 200 * GB),
    sequence=st.integers(0, 20 * GB),
    token=st.floats(1, 1e6),
    measured=st.integers(0, 100 * GB),
    most=st.none() | amounts,
    prompt_cache=st.none() | st.integers(0, 50 * GB),
)


def claimant(name: str, appetite: Appetite = QWEN, *, resident: bool = True) -> Claimant:
    return Claimant(f"{name}:0", name, appetite, resident)


claimants = st.lists(st.tuples(appetites, st.booleans()), min_size=1, max_size=5).map(
    lambda drawn: [claimant(str(n), appetite, resident=here) for n, (appetite, here) in enumerate(drawn)]
)


def test_two_long_conversations_of_a_small_model_are_found_again_on_a_mac_with_48_gb() -> None:
    share = split(
        divide(capacity(total=48 * GB, available=40 * GB, held=0, budget=None, working_set=None), [claimant("a")])[
            "a:0"
        ],
        QWEN,
    )
    assert share.prompt_cache > 4 * CONVERSATION, "by default it was one"
    assert share.entries >= MIN_ENTRIES
    assert share.total == share.base + share.batch + share.prompt_cache
    assert share.total <= 36 * GB


def test_what_the_machine_can_give_leaves_a_tenth_to_other_programs_and_no_more_than_metal_recommends() -> None:
    assert capacity(total=64 * GB, available=20 * GB, held=10 * GB, budget=None, working_set=None) == int(23.6 * GB)
    assert capacity(total=64 * GB, available=60 * GB, held=4 * GB, budget=None, working_set=None) == 48 * GB
    assert capacity(total=64 * GB, available=60 * GB, held=4 * GB, budget=None, working_set=51 * GB) == 51 * GB
    assert capacity(total=64 * GB, available=0, held=1, budget=None, working_set=None) == 0


def test_a_budget_is_the_capacity_unless_the_gpu_has_less() -> None:
    assert capacity(total=64 * GB, available=0, held=0, budget=40 * GB, working_set=None) == 40 * GB
    assert capacity(total=64 * GB, available=0, held=0, budget=60 * GB, working_set=48 * GB) == 48 * GB


def test_replicas_share_the_surplus_and_what_one_may_not_use_goes_to_the_others() -> None:
    bounded = replace(QWEN, most=5 * GB)
    shares = divide(30 * GB, [claimant("a"), claimant("b"), claimant("c", bounded)])
    assert shares["c:0"] == 5 * GB
    assert shares["a:0"] == shares["b:0"] == int(12.5 * GB)


def test_the_need_of_a_model_that_is_loaded_on_demand_is_left_free_for_it() -> None:
    large = replace(QWEN, base=15 * GB)
    alone = divide(30 * GB, [claimant("a")])["a:0"]
    beside = divide(30 * GB, [claimant("a"), claimant("b", resident=False), claimant("c", large, resident=False)])
    assert beside == {"a:0": alone - large.need}


def test_nothing_is_left_free_for_a_model_that_can_never_be_loaded() -> None:
    too_large = replace(QWEN, base=40 * GB)
    beside = [claimant("a"), claimant("b", resident=False), claimant("c", too_large, resident=False)]
    assert divide(30 * GB, beside, 36 * GB) == {"a:0": 30 * GB - QWEN.need}


def test_a_small_prompt_cache_that_the_user_wrote_leaves_the_rest_to_the_batch() -> None:
    written = replace(QWEN, prompt_cache=64 * 10**6)
    share = split(divide(30 * GB, [claimant("a", written)])["a:0"], written)
    assert share.batch == 30 * GB - QWEN.base - 64 * 10**6


def test_a_small_share_keeps_a_prompt_cache_and_no_limit_that_slows_it_down() -> None:
    cramped = split(QWEN.need, QWEN)
    assert MIN_PROMPT_CACHE <= cramped.prompt_cache <= QWEN.sequence // 4
    assert cramped.limit is None
    assert split(QWEN.need + MIN_PROMPT_CACHE, QWEN).limit == QWEN.need + MIN_PROMPT_CACHE


def test_what_processes_have_needed_counts_more_than_the_estimate() -> None:
    usual, measured = split(20 * GB, QWEN), split(20 * GB, replace(QWEN, base=2 * GB, measured=6 * GB))
    assert (usual.base, measured.base) == (3 * GB, 2 * GB)
    assert measured.batch > 7.5 * GB > usual.batch


def test_small_prompts_do_not_fill_the_number_of_entries_first() -> None:
    share = split(40 * GB, QWEN)
    assert share.entries * 1024 * QWEN.token >= 0.99 * share.prompt_cache


def test_what_python_needs_for_each_cached_token_counts_where_the_model_is_tiny() -> None:
    tiny = Appetite(base=GB, sequence=8 << 20, token=1024)
    assert split(100 * GB, tiny).prompt_cache == MAX_CACHED_TOKENS * 1024
    assert split(GB + (600 << 20), tiny).prompt_cache < 0.81 * (600 << 20)


def test_without_an_estimate_the_defaults_stay() -> None:
    assert (UNKNOWN.prompt_cache, UNKNOWN.pool, UNKNOWN.limit) == (4 * GB, None, None)


@given(amounts, claimants)
def test_no_share_is_less_than_the_need_and_together_they_are_no_more_than_there_is(
    whole: int, everyone: list[Claimant]
) -> None:
    shares = divide(whole, everyone)
    residents = [one for one in everyone if one.resident]
    assert shares.keys() == {one.id for one in residents}
    assert all(shares[one.id] >= one.appetite.need for one in residents)
    needed = sum(one.appetite.need for one in residents)
    assert sum(shares.values()) <= max(needed, whole)
    reserve = max((one.appetite.need for one in everyone if not one.resident), default=0)
    assert sum(shares.values()) <= max(needed, whole - reserve)
    for one in residents:
        if one.appetite.most is not None:
            assert shares[one.id] <= max(one.appetite.need, one.appetite.most)


@given(amounts, claimants, amounts)
def test_who_uses_less_gets_no_less_of_more(whole: int, everyone: list[Claimant], more: int) -> None:
    before, after = divide(whole, everyone), divide(whole + more, everyone)
    assert all(after[name] >= size for name, size in before.items())


@given(amounts, appetites)
def test_the_parts_of_a_share(total: int, appetite: Appetite) -> None:
    share = split(total, appetite)
    if appetite.prompt_cache is not None:
        assert share.prompt_cache == appetite.prompt_cache
    else:
        assert share.prompt_cache >= MIN_PROMPT_CACHE
    assert share.entries >= MIN_ENTRIES
    assert share.pool is not None
    assert share.pool >= MIN_POOL
    assert share.batch >= 0
    left = total - appetite.base
    if left >= share.prompt_cache:
        assert share.base + share.batch + share.prompt_cache == total
    if share.limit is not None:
        assert share.limit >= appetite.need, "what it needs is not slowed down"
    if appetite.prompt_cache is None and left >= 2 * appetite.sequence + 4 * MIN_PROMPT_CACHE:
        assert share.batch >= appetite.sequence, "one request of its context fits beside a full prompt cache"


def test_a_process_is_told_what_has_changed_by_a_tenth_and_never_what_the_user_wrote() -> None:
    share = split(20 * GB, QWEN)
    first = sizes(share, 3 * GB, Ours())
    assert first.differ(Sizes())
    assert not first.differ(first)
    assert not sizes(replace(share, limit=int(share.total * 1.05)), 3 * GB, Ours()).differ(first)
    assert sizes(replace(share, prompt_cache=share.prompt_cache // 2), 3 * GB, Ours()).differ(first)
    theirs = sizes(share, 3 * GB, Ours(prompt_cache=False, entries=False, pool=False))
    assert (theirs.prompt_cache, theirs.entries, theirs.pool) == (None, None, None)


@pytest.mark.parametrize(("active", "limit"), [(3 * GB, 20 * GB), (19 * GB, int(23.75 * GB))])
def test_the_limit_is_above_what_is_in_use(active: int, limit: int) -> None:
    assert sizes(split(20 * GB, QWEN), active, Ours()).limit == limit

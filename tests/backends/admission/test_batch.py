"""The cost of a batch, and its likely peak."""

from dataclasses import replace

import pytest

from backends.admission.batch import Member, bound, fits, peak
from backends.memory.kv_cost import KvCost

KIB, MIB = 1 << 10, 1 << 20
PLAIN = KvCost(per_token=KIB, layers=16, step=512)
WITH_ALL = KvCost(KIB, 4 * KIB, 1024, 8, 64 * KIB, 16, step=512, scores=16, activations=4096)
MIX = [
    Member(3000, 40),
    Member(60, 700),
    Member(512, 1),
    Member(900, 10, 400),
    Member(5000, 900, 5000, 300, decoding=True),
]


def test_a_batch_is_a_rectangle() -> None:
    long, short = Member(8191, 1, 8191, decoding=True), Member(10, 1, 10, decoding=True)
    alone, beside = peak(PLAIN, [long]), peak(PLAIN, [long, short])
    assert 8 * MIB <= alone <= 8 * MIB * 2
    assert 16 * MIB <= beside <= 16 * MIB * 17 / 16 + 8 * MIB
    assert peak(PLAIN, [long] * 4) > 3.5 * alone


def test_what_ends_before_the_longest_has_grown_does_not_count_at_its_full_length() -> None:
    long, brief = Member(256, 8000, 256, decoding=True), Member(256, 10, 256, decoding=True)
    assert peak(PLAIN, [long] + [brief] * 7) < 1.2 * peak(PLAIN, [long])
    assert peak(PLAIN, [long] * 8) > 7 * peak(PLAIN, [long])


def test_prompts_that_wait_for_their_turn_are_not_read_yet() -> None:
    prompt = Member(10_000, 1)
    assert peak(replace(PLAIN, readers=1), [prompt] * 16) < peak(PLAIN, [prompt] * 16)


def test_the_scores_of_a_step_count_while_prompts_are_read() -> None:
    scored = replace(PLAIN, scores=32)
    assert peak(scored, [Member(4096, 1)]) - peak(PLAIN, [Member(4096, 1)]) == pytest.approx(32 * 512 * 4096, rel=0.1)
    done = [Member(4096, 1, 4096, decoding=True)]
    assert peak(scored, done) == peak(PLAIN, done)


def test_a_window_bounds_what_its_layers_keep() -> None:
    cost = KvCost(per_token=0, windowed=KIB, window=1024, windows=16, layers=16, step=512)
    decoding = Member(100_000, 100, 100_000, decoding=True)
    assert cost.decoding(3, 100_000) == 3 * MIB
    assert peak(cost, [decoding]) <= 2 * MIB
    assert cost.reading(1, 100_000) == (1024 - 1 + 512) * KIB


@pytest.mark.parametrize("cost", [PLAIN, WITH_ALL])
@pytest.mark.parametrize("members", [MIX[:count] for count in range(len(MIX) + 1)] + [[one] for one in MIX])
def test_the_quick_bound_is_no_less_than_the_peak(cost: KvCost, members: list[Member]) -> None:
    longest = max((member.end for member in members), default=0)
    assert bound(cost, len(members), longest) >= peak(cost, members)


def test_more_members_longer_answers_and_longer_prompts_never_need_less() -> None:
    for cost in (PLAIN, WITH_ALL):
        for index, member in enumerate(MIX):
            rest = MIX[:index] + MIX[index + 1 :]
            assert peak(cost, rest) <= peak(cost, MIX)
            assert peak(cost, MIX) <= peak(cost, [*rest, replace(member, likely=member.likely + 2000)])


def test_fits_is_exact_at_the_peak() -> None:
    need = peak(PLAIN, MIX)
    assert fits(PLAIN, MIX, need)
    assert not fits(PLAIN, MIX, need - 1)
    assert fits(PLAIN, [], 0)

"""The course of a batch: its rectangles as mlx_lm's own were seen, and what holds for all of them."""

from dataclasses import replace
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.admission.batch import Member, bound, peak
from backends.admission.course import Course, Part, Rectangle
from backends.memory.kv_cost import KvCost

KIB, MIB = 1 << 10, 1 << 20
ROW = 2 * KIB  # of one layer, per token, in what was measured: float32, two heads of 128
FULL = KvCost(12 * ROW, layers=12, step=512, scores=8, activations=12_032)
SLIDING = KvCost(2 * ROW, 10 * ROW, 512, 10, layers=12, step=512, scores=8, activations=12_032)

members = st.builds(
    lambda prompt, likely, part, decoding: Member(
        prompt,
        likely,
        prompt if decoding else int(prompt * part),
        int(likely * part) if decoding else 0,
        decoding=decoding,
    ),
    st.integers(1, 5000),
    st.integers(0, 3000),
    st.floats(0, 1),
    st.booleans(),
)
costs = st.builds(
    KvCost,
    per_token=st.sampled_from((0, 1000)),
    windowed=st.sampled_from((0, 4000)),
    window=st.sampled_from((256, 1024)),
    windows=st.just(8),
    fixed=st.sampled_from((0, 65_536)),
    layers=st.just(16),
    step=st.sampled_from((256, 512, 2048)),
    scores=st.sampled_from((0, 16)),
    activations=st.sampled_from((0, 4096)),
    linears=st.sampled_from((0, 4)),
    readers=st.sampled_from((1, 8)),
)
batches = st.lists(members, min_size=1, max_size=8)


def test_tokens_have_room_in_steps_and_windows_only_until_they_are_full() -> None:
    alone = Rectangle(1)
    alone.read(240, 1, 512)
    assert (alone.end, alone.room, alone.windowed) == (240, 256, 240)
    assert alone.write(1, 512), "the window has no room beyond the prompt"
    assert (alone.end, alone.room, alone.windowed) == (241, 256, 496)
    assert not alone.write(15, 512)
    assert alone.write(1, 512)
    assert (alone.end, alone.room, alone.windowed) == (257, 512, 496)
    alone.write(300, 512)
    assert (alone.end, alone.room, alone.windowed) == (557, 768, 512)


def test_a_prompt_that_is_read_in_steps_holds_the_last_one_beside_its_window() -> None:
    once, thrice = Rectangle(2), Rectangle(2)
    once.read(512, 3, 512)
    for _ in range(3):
        thrice.read(512, 1, 512)
    assert once == thrice
    assert (once.end, once.room, once.windowed) == (1536, 1536, 511 + 512)


def test_padding_is_cut_off_but_not_in_a_window() -> None:
    batch = Rectangle(3, 500, 512, 500, 500)
    left = batch.of([Part(120, 0, 9), Part(300, 0, 9)])
    assert (left.rows, left.end, left.room, left.windowed) == (2, 300, 312, 500)


def test_a_late_step_of_a_short_prompt_pads_a_long_one() -> None:
    """Each step is as long as the longest part of a prompt that is read in it."""
    late = [Member(2100, 1, 2048), Member(2048, 1)]
    assert peak(KvCost(1000, layers=1000), late) > 2 * 1000 * (2048 + 2047)


@pytest.mark.parametrize(
    ("cost", "step", "batch", "real"),
    [  # MiB at the peak of mlx 0.32, from the arrival of the last on
        pytest.param(FULL, 2048, [Member(1536, 14), Member(804, 9), Member(533, 9), Member(88, 9)], 293.9, id="scores"),
        pytest.param(FULL, 2048, [Member(578, 42), Member(248, 22)], 55.1, id="aligned"),
        pytest.param(
            FULL,
            512,
            [
                Member(156, 33, 156, 18, decoding=True),
                Member(1831, 21, 1831, 15, decoding=True),
                Member(802, 96, 802, 17, decoding=True),
                Member(445, 21, 445, 18, decoding=True),
                Member(1021, 123, 1021, 11, decoding=True),
                Member(103, 11, 103, 5, decoding=True),
                Member(588, 14),
            ],
            354.2,
            id="one leaves as one joins",
        ),
        pytest.param(SLIDING, 512, [Member(870, 10, 512), Member(136, 4, 135)], 45.8, id="one is still read"),
        pytest.param(
            SLIDING,
            512,
            [Member(949, 8, 948), Member(1357, 43, 1024), Member(322, 28)],
            107.4,
            id="one begins as one joins",
        ),
        pytest.param(
            SLIDING, 2048, [Member(420, 2), Member(999, 2), Member(523, 2), Member(312, 4)], 176.8, id="windows"
        ),
    ],
)
def test_as_measured(cost: KvCost, step: int, batch: list[Member], real: float) -> None:
    assert peak(replace(cost, step=step), batch) / MIB == pytest.approx(real, rel=0.06)


@given(costs, batches)
@settings(max_examples=60)
def test_steps_in_which_nothing_happens_can_be_left_out(cost: KvCost, batch: list[Member]) -> None:
    short = [Member(m.prompt, min(m.likely, 400), m.read, min(m.written, 300), decoding=m.decoding) for m in batch]
    quick = peak(cost, short)
    with patch.object(Course, "_quiet", lambda _: 0):
        assert peak(cost, short) == quick


@given(costs, batches)
@settings(max_examples=100)
def test_the_quick_bound_is_no_less(cost: KvCost, batch: list[Member]) -> None:
    assert bound(cost, len(batch), max(member.end for member in batch)) >= peak(cost, batch)


@given(costs, batches)
@settings(max_examples=100)
def test_a_batch_takes_at_least_its_rectangle(cost: KvCost, batch: list[Member]) -> None:
    writing = [member for member in batch if member.decoding]
    longest = max((member.now for member in writing), default=0)
    assert peak(cost, batch) >= cost.rectangle(len(writing), longest, 0)
    longest = max(member.end for member in batch)
    assert peak(cost, batch) >= cost.rectangle(1, longest, min(longest, cost.window))


@given(st.builds(KvCost, per_token=st.just(1000), layers=st.just(16), step=st.sampled_from((256, 2048))), batches)
@settings(max_examples=100)
def test_one_more_needs_no_less_but_for_room_that_it_lends(cost: KvCost, batch: list[Member]) -> None:
    """A row that is longer brings room of its own, so that the others need not grow: a step of the cache at most."""
    spare = cost.rectangle(len(batch), 512, 512) + cost.layer(len(batch), 512, 512)
    for index in range(len(batch)):
        assert peak(cost, batch[:index] + batch[index + 1 :]) <= peak(cost, batch) + spare

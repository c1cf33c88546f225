"""What a backend sends at once is given out in slices, with a turn for others between them."""

import asyncio

import pytest

from backends.upstream.exchange import Head
from backends.upstream.h1_response import SLICE, Answer, End


async def test_a_flood_is_given_out_in_slices_and_others_have_their_turn() -> None:
    answer = Answer()
    answer.begin(Head(200, ()))
    sent = b":\n\n" * 200_000
    answer.put(sent[:300_000])
    answer.put(sent[300_000:])
    answer.finish(End.EOF)
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.ensure_future(other())
    got = []
    while data := await answer.take():
        got.append(data)
    task.cancel()
    assert b"".join(got) == sent
    assert max(map(len, got)) <= SLICE
    assert turns >= len(got) - 1


async def test_what_comes_in_small_pieces_takes_no_further_turn() -> None:
    answer = Answer()
    answer.begin(Head(200, ()))
    answer.put(b"a" * SLICE)
    with pytest.raises(StopIteration) as done:
        answer.take().send(None)
    assert done.value.value == b"a" * SLICE
    assert answer.size == 0

"""The text of an answer is noted once, whichever way its bytes are read."""

import json

import pytest

from backends.upstream.exchange import Offer
from gateway.forward.answer_trace import Traced
from gateway.policy.cached_prompts import Trace
from tests.gateway.policy.test_cached_prompts import of_text

WORDS = ["The", " river", " runs", " \u2028past", " it"]


class Pieces:
    """Offers every second piece, and gives it out if it is not taken."""

    def __init__(self, pieces: list[bytes]) -> None:
        self._pieces = pieces

    async def read(self, offer: Offer | None = None) -> bytes:
        while self._pieces:
            data = self._pieces.pop(0)
            if offer is None or len(self._pieces) % 2 or not offer(data):
                return data
        return b""


def event(text: str) -> bytes:
    return f"data: {json.dumps({'choices': [{'index': 0, 'text': text}]}, ensure_ascii=False)}\n\n".encode()


@pytest.mark.parametrize("takes", [True, False])
@pytest.mark.parametrize("size", [1, 10, 1000])
async def test_a_stream(takes: bool, size: int) -> None:
    body = b": keepalive 1/2\n\n" + b"".join(map(event, WORDS)) + b'data: {"error": 1}\n\ndata: [1]\n\ndata: [DONE]\n\n'
    trace = Trace(of_text("P:"))
    source = Traced(Pieces([body[at : at + size] for at in range(0, len(body), size)]), trace, streams=True)
    while await source.read(lambda _: takes):
        pass
    assert trace.may_equal(of_text("P:" + "".join(WORDS)))
    assert not trace.may_equal(of_text("P:" + "".join(WORDS) * 2))


@pytest.mark.parametrize("size", [1, 1000])
async def test_an_answer_in_one_piece(size: int) -> None:
    body = json.dumps({"choices": [{"text": "".join(WORDS)}]}).encode()
    trace = Trace(of_text("P:"))
    source = Traced(Pieces([body[at : at + size] for at in range(0, len(body), size)]), trace, streams=False)
    while await source.read():
        pass
    assert trace.may_equal(of_text("P:" + "".join(WORDS)))


@pytest.mark.parametrize("body", [b"", b"nonsense", b"[]", b'{"choices": 1}', b'{"choices": [1, {"text": 2}]}'])
async def test_what_is_no_answer_is_left_out(body: bytes) -> None:
    trace = Trace(of_text("P:"))
    source = Traced(Pieces([body]), trace, streams=False)
    while await source.read():
        pass
    assert not trace.may_equal(of_text("P:"))

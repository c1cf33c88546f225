"""What is fuzzed: bytes in, and what must hold for any of them. Used by hypothesis and by atheris alike."""

import json
from itertools import pairwise
from typing import Any

from gateway.api.errors import Code, GatewayError, RequestError
from gateway.api.json_codec import dumps, loads
from gateway.api.kinds import Kind
from gateway.config import RequestRules
from gateway.request import fit_vocab, parse, upstream_body
from gateway.stream.aggregate import Aggregator, fix_json, whole_answer
from gateway.stream.chunk_fields import COUNTS
from gateway.stream.interpreter import Completeness
from gateway.stream.lost_calls import Ending
from gateway.stream.relay import Relay, Seen
from gateway.stream.resume import MAX_CHUNKS
from gateway.stream.unstreamed import as_stream

KINDS = tuple(Kind)
VOCAB = 1000
RULES = RequestRules({}, {}, (), ())

CHUNK = b'data: {"id":"a","created":1,"choices":[{"index":0,"delta":{"role":"assistant","content":"hi"}}]}\n\n'
FINISH = b'data: {"id":"a","created":1,"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
CALL = (
    b'data: {"choices":[{"index":0,"delta":{"tool_calls":[{"index":0,"id":"c","type":"function","function":'
    b'{"name":"f","arguments":"{\\"a\\": 1}"}}]}}]}\n\n'
)
CALLED = FINISH.replace(b"stop", b"tool_calls")
CUT = FINISH.replace(b"stop", b"length")
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":2,"total_tokens":3}}\n\n'
DONE = b"data: [DONE]\n\n"
STREAMS = (
    b": keepalive 1/2\n\n" + CHUNK + CHUNK + FINISH + USAGE + DONE,
    CHUNK + CALL + FINISH + DONE,
    CHUNK.replace(b"\n\n", b"\r\n\r\n") + FINISH,
    b'event: error\ndata: {"error":{"message":"no","code":"backend_oom"}}\n\n',
    b'data: {"choices":[{"index":0,"text":"a"},{"index":1,"text":"b","finish_reason":"length"}]}\n\n' + DONE,
    b'data: {"error":"died"}\n\n',
    CHUNK + CALL + CALLED + USAGE + DONE,
    CHUNK + CUT + USAGE + DONE,
    CHUNK.replace(b'"hi"', b'"<tool_call>{"') + CUT,
    b'data: {"choices":[{"index":null,"delta":{"content":[{"type":"text","text":"a"}]},"finish_reason":""}]}\n\n',
    b'data: {"detail":"no"}\n\n' + b"Internal Server Error\n\n" + b'{"code":1,"message":"no"}\n\n',
)
BODIES = (
    b'{"messages":[{"role":"user","content":"hi"}],"stream":true,"temperature":0.5,"max_tokens":5,"stop":["a"]}',
    b'{"prompt":["a","b"],"n":2,"seed":-1,"logit_bias":{"5":1},"logprobs":3,"top_k":40.0}',
    b'{"messages":[{"role":"system","content":[{"type":"text","text":"x"}]},{"role":"user","content":"y"}],"n":2}',
    b'{"messages":[{"role":"assistant","tool_calls":[{"id":"c","function":{"name":"f","arguments":"{}"}}]}]}',
    b'{"messages":[{"role":"user","content":""}],"tools":[{"type":"function","function":{"name":"f"}}]}',
    b'{"messages":[{"role":"user","content":"a"}],"chat_template_kwargs":{"enable_thinking":false}}',
)


def stream(data: bytes) -> None:
    """The first bytes choose the kind of answer and where the rest is cut into reads; what is left is the stream. It is
    given twice: the second time as the replay of the first, which must add no text."""
    head, body = data[:4], data[4:]
    kind = KINDS[head[0] % 2] if head else Kind.CHAT
    edges = sorted({0, len(body), *(byte * len(body) // 256 for byte in head[1:])})
    reads = [body[a:b] for a, b in pairwise(edges)]
    tools = bool(head[0] & 2) if head else False
    relay = Relay(kind, "public", include_usage=True, remember=True, tools=tools)
    sent = b"".join(relay.feed(read).data for read in reads)
    whole(sent)
    if relay.state is Seen.SPEAKING and relay.resumable:
        relay.resume()
        again = b"".join(relay.feed(read).data for read in reads)
        whole(again)
        assert texts(sent + again) == texts(sent)
        assert relay.matched <= MAX_CHUNKS
    elif relay.end().verdict is Completeness.COMPLETE:
        assert sent.endswith(DONE) or relay.end().data.endswith(DONE) or relay.state is Seen.DONE
        assert relay.end().ending.finish_reason or b"[DONE]" in body
    counted(relay.usage)
    aggregator = Aggregator(kind, "public", tools=tools)
    for read in reads:
        aggregator.feed(read)
    if aggregator.end().verdict is Completeness.COMPLETE:
        json.loads(dumps(aggregator.answer()))
    counted(aggregator.usage)


def one_piece(answer: object) -> None:
    """Any JSON value as an answer that came whole: it passes, in a form that is one, or it does not."""
    for kind in KINDS:
        body = loads(dumps(answer))
        judged = whole_answer(body, kind)
        if isinstance(judged, Ending):
            told = json.loads(dumps(fix_json(body, kind, "public")))
            assert told["model"] == "public"
            assert all(isinstance(choice["finish_reason"], str) for choice in told["choices"])
            counted(told.get("usage"))
        as_stream(dumps(answer), kind)


def counted(usage: dict[str, Any] | None) -> None:
    assert all(isinstance((usage or {}).get(name, 0), int) for name in COUNTS)


def whole(sent: bytes) -> None:
    """Events, each ended, each an object of JSON or the end; and nothing after the end."""
    *events, rest = sent.split(b"\n\n")
    assert rest == b""
    for place, event in enumerate(events):
        assert event.startswith(b"data: ")
        if event == b"data: [DONE]":
            assert place == len(events) - 1
        else:
            chunk = json.loads(event[6:])
            assert chunk["model"] == "public"
            assert not chunk.get("error")


def texts(sent: bytes) -> dict[object, str]:
    """What a client puts together, by channel."""
    said: dict[object, str] = {}
    for event in sent.split(b"\n\n"):
        for choice in json.loads(event[6:])["choices"] if event.startswith(b"data: {") else ():
            delta = choice.get("delta") or choice
            pieces = [(name, delta.get(name)) for name in ("content", "reasoning", "text")]
            pieces += [
                (str(call.get("index")), (call.get("function") or {}).get("arguments"))
                for call in delta.get("tool_calls") or ()
            ]
            for channel, piece in pieces:
                if isinstance(piece, str):
                    said[channel] = said.get(channel, "") + piece
    return {channel: text for channel, text in said.items() if text}


def parsed(data: bytes) -> None:
    """Refused with a reason, or made into a body that holds nothing but what was checked."""
    kind = KINDS[data[0] % 2] if data else Kind.CHAT
    try:
        taken = fit_vocab(parse(data[1:], kind), VOCAB)
    except RequestError as refused:
        well_told(refused.error)
        return
    body = json.loads(upstream_body(taken, model="m", stream=True, request_rules=RULES))
    assert (body["model"], body["stream"]) == ("m", True)
    assert bool(body["messages"] if kind is Kind.CHAT else body["prompt"])
    assert body.get("top_k", 0) < VOCAB
    assert all(0 <= int(key) < VOCAB for key in body.get("logit_bias", {}))
    assert all(isinstance(word, str) and word for word in body.get("stop", ()))
    assert len(taken.parts) <= 16


def well_told(error: GatewayError) -> None:
    assert error.code is Code.INVALID_REQUEST
    assert error.message

"""Clients of every kind: some wait for the answer, some disconnect, some read slowly, some send invalid requests."""

import json
import random
import socket
import time
from collections.abc import Callable

import httpx

from tests.chaos.ledger import Ledger, Outcome, judge
from tests.integration.harness import Gateway
from tests.integration.wire import CHAT, Answer, Json, chat

COMPLETION = "/v1/completions"
PROMPTS = ("hello", "once upon a time", "the river and the lamp")
LENGTHS = (20, 100, 250)
NONSENSE: tuple[bytes, ...] = (
    b"",
    b"{",
    b"[]",
    b'{"messages": []}',
    b'{"messages": [{"role": "user", "content": "hi"}], "stop": [1]}',
    b'{"messages": [{"role": "user", "content": "hi"}], "temperature": "hot"}',
    b'{"messages": [{"role": "user", "content": "hi"}], "model": "none"}',
    b'{"messages": [{"role": "user", "content": "hi"}], "logit_bias": {"99999": 1}}',
    b"[" * 50_000,
    b"x" * 300_000,  # more than max_body
)
Key = tuple[str, str, int]
READ_PAUSE = 0.01  # seconds between two small reads of a slow client


class Clients:
    """``expected``: the texts of greedy requests without faults."""

    def __init__(self, gateway: Gateway, ledger: Ledger, expected: dict[Key, str]) -> None:
        self._gateway = gateway
        self._ledger = ledger
        self._expected = expected

    def one(self, chance: random.Random) -> None:
        kinds: list[tuple[Callable[[random.Random], None], int]] = [
            (self.greedy, 10),
            (self.sampled, 4),
            (self.seeded, 2),
            (self.with_logprobs, 1),
            (self.leaving, 3),
            (self.leaving_at_once, 1),
            (self.slow, 1),
            (self.nonsense, 2),
            (self.cut_short, 1),
        ]
        chosen = chance.choices([kind for kind, _ in kinds], [weight for _, weight in kinds])[0]
        chosen(chance)

    # -- clients that wait for the answer -----------------------------------------------------------------------------

    def greedy(self, chance: random.Random) -> None:
        key: Key = (chance.choice((CHAT, COMPLETION)), chance.choice(PROMPTS), chance.choice(LENGTHS))
        self._ask("greedy", body_of(key), key[0], chance=chance, expected=self._expected[key])

    def sampled(self, chance: random.Random) -> None:
        body = chat(f"number {chance.randrange(10**6)}", max_tokens=chance.choice(LENGTHS), temperature=0.9)
        self._ask("sampled", body, CHAT, chance=chance)

    def seeded(self, chance: random.Random) -> None:
        body = chat(f"number {chance.randrange(10**6)}", max_tokens=20, temperature=0.9, seed=chance.randrange(99))
        self._ask("seeded", body, CHAT, chance=chance)

    def with_logprobs(self, chance: random.Random) -> None:
        body = chat(f"number {chance.randrange(10**6)}", max_tokens=10, logprobs=True)
        self._ask("logprobs", body, CHAT, chance=chance)

    def _ask(self, what: str, body: Json, path: str, *, chance: random.Random, expected: str | None = None) -> None:
        stream = chance.random() < 0.6
        entry = self._ledger.begin(f"{what} {body}")
        try:
            answer = self._gateway.ask({**body, "stream": stream}, path)
        except httpx.HTTPError as error:
            self._ledger.end(entry, Outcome.WRONG, f"no answer: {error!r}")
            return
        self._ledger.end(entry, *judge(answer, stream=stream, expected=expected))

    def slow(self, chance: random.Random) -> None:
        """Reads 512 bytes at a time, with a receive buffer of 2048."""
        key: Key = (CHAT, chance.choice(PROMPTS), 100)
        entry = self._ledger.begin(f"slow {key}")
        with self._connect() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            sock.sendall(raw_post(json.dumps({**body_of(key), "stream": True}).encode()))
            raw = b""
            while data := sock.recv(512):
                raw += data
                time.sleep(READ_PAUSE)
        self._ledger.end(entry, *judge(parsed(raw), stream=True, expected=self._expected[key]))

    # -- clients that disconnect --------------------------------------------------------------------------------------

    def leaving(self, chance: random.Random) -> None:
        entry = self._ledger.begin("leaving in the middle")
        with self._gateway.stream(chat(f"number {chance.randrange(10**6)}", max_tokens=400)) as stream:
            for _ in range(chance.randrange(30)):
                if stream.event() is None:
                    break
        self._ledger.end(entry, Outcome.LEFT)

    def leaving_at_once(self, chance: random.Random) -> None:
        entry = self._ledger.begin("leaving at once")
        with self._connect() as sock:
            body = {**chat(f"number {chance.randrange(10**6)}", max_tokens=400), "stream": chance.random() < 0.5}
            sock.sendall(raw_post(json.dumps(body).encode()))
            time.sleep(chance.uniform(0, 0.2))
        self._ledger.end(entry, Outcome.LEFT)

    def cut_short(self, chance: random.Random) -> None:
        entry = self._ledger.begin("half a body")
        with self._connect() as sock:
            data = raw_post(json.dumps(chat("hello")).encode())
            sock.sendall(data[: chance.randrange(1, len(data))])
        self._ledger.end(entry, Outcome.LEFT)

    # -- clients with invalid requests ---------------------------------------------------------------------------------

    def nonsense(self, chance: random.Random) -> None:
        body = chance.choice(NONSENSE)
        entry = self._ledger.begin(f"nonsense {body[:80]!r}")
        try:
            response = httpx.post(self._gateway.url + CHAT, content=body, timeout=60)
        except httpx.HTTPError as error:
            self._ledger.end(entry, Outcome.WRONG, f"no answer: {error!r}")
            return
        sane = response.status_code in (400, 404, 413) and response.json()["error"]["message"]
        # Ids are checked against the vocabulary only once a backend is available.
        down = response.status_code == 503 and b"logit_bias" in body
        self._ledger.end(entry, Outcome.REFUSED if sane or down else Outcome.WRONG, response.text[:300])

    def _connect(self) -> socket.socket:
        host, port = self._gateway.url.removeprefix("http://").split(":")
        return socket.create_connection((host, int(port)), timeout=60)


def body_of(key: Key) -> Json:
    path, prompt, length = key
    if path == CHAT:
        return chat(prompt, max_tokens=length)
    return {"model": "tiny", "prompt": prompt, "max_tokens": length}


def raw_post(body: bytes) -> bytes:
    head = f"POST {CHAT} HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


def parsed(raw: bytes) -> Answer:
    """The answer in ``raw``, the bytes of a chunked stream or of a JSON error."""
    head, _, rest = raw.partition(b"\r\n\r\n")
    answer = Answer(status=int(head.split(b" ", 2)[1]) if head else 0)
    if b"application/json" in head:
        answer.body = json.loads(rest)
        answer.error = answer.body.get("error")
        return answer
    data, ended = b"", False
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        length = int(size, 16)
        ended = length == 0
        data, rest = data + rest[:length], rest[length + 2 :]
    answer.dropped = "" if ended else "the last chunk is missing"
    for part in data.split(b"\n\n"):
        if part == b"data: [DONE]":
            answer.done = True
        elif part.startswith(b"data: "):
            event = json.loads(part[6:])
            answer.error = event.get("error", answer.error)
            for choice in event.get("choices", ()):
                answer.text += choice["delta"].get("content") or ""
                answer.finish = choice["finish_reason"] or answer.finish
    return answer

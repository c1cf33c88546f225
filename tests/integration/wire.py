"""Requests and their answers, recorded in full: events, comments, ``[DONE]``, errors, and broken connections."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

Json = dict[str, Any]

PATIENCE = 60.0  # seconds; the machine may be busy with something else
CHAT = "/v1/chat/completions"


def chat(content: str, model: str = "tiny", **more: Any) -> Json:
    return {"model": model, "messages": [{"role": "user", "content": content}], **more}


def endless(model: str = "tiny", **more: Any) -> Json:
    """A request to the fake: a word every 20 ms, for longer than any test."""
    return chat("FAKE n=1000000 delay=0.02", model, max_tokens=1_000_000, **more)


def lasting(until: Path, model: str = "tiny", words: str = "") -> Json:
    """A request to the fake: a word every 20 ms, until that file exists. ``words``: more of what the fake is to do."""
    return chat(f"FAKE delay=0.02 until={until} {words}", model)


@dataclass(slots=True)
class Answer:
    """``events``: the data events of a stream except ``[DONE]``; ``dropped``: the error, if the connection broke."""

    status: int = 0
    headers: httpx.Headers = field(default_factory=httpx.Headers)
    text: str = ""
    finish: str | None = None
    done: bool = False
    error: Json | None = None
    body: Json = field(default_factory=dict)
    events: list[Json] = field(default_factory=list)
    comments: int = 0
    dropped: str = ""

    @property
    def code(self) -> str | None:
        return None if self.error is None else self.error["code"]

    @property
    def attempts(self) -> int:
        return int(self.headers.get("x-gateway-attempts", "0"))


class Stream:
    """One streamed request, read as far as the test needs. A context manager; leaving it closes the connection."""

    def __init__(self, url: str, body: Json, path: str = CHAT, headers: Json | None = None) -> None:
        self.answer = Answer()
        self._client = httpx.Client(base_url=url, timeout=PATIENCE)
        self._request = self._client.build_request("POST", path, json={**body, "stream": True}, headers=headers)
        self._response: httpx.Response | None = None
        self._lines: Iterator[str] = iter(())

    def __enter__(self) -> Self:
        try:
            response = self._client.send(self._request, stream=True)
        except BaseException:
            self._client.close()
            raise
        self._response = response
        self.answer.status, self.answer.headers = response.status_code, response.headers
        if response.headers["content-type"].startswith("text/event-stream"):
            self._lines = response.iter_lines()
        else:
            response.read()
            self.answer.body = response.json()
            self.answer.error = self.answer.body["error"]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._response is not None:
            self._response.close()
        self._client.close()

    def event(self) -> Json | None:
        """The next data event; None at the end of the stream, or if the connection broke."""
        answer = self.answer
        try:
            for line in self._lines:
                if line.startswith(":"):
                    answer.comments += 1
                elif line == "data: [DONE]":
                    answer.done = True
                elif line.startswith("data: "):
                    event: Json = json.loads(line[6:])
                    self._take(event)
                    return event
        except httpx.HTTPError as error:
            answer.dropped = repr(error)
        return None

    def _take(self, event: Json) -> None:
        answer = self.answer
        answer.events.append(event)
        if "error" in event:
            answer.error = event["error"]
        for choice in event.get("choices", ()):
            answer.text += choice["delta"].get("content") or "" if "delta" in choice else choice["text"]
            answer.finish = choice["finish_reason"] or answer.finish

    def until_text(self, length: int = 1) -> None:
        while len(self.answer.text) < length:
            assert self.event() is not None, f"the stream ended before {length} characters: {self.answer}"

    def rest(self) -> Answer:
        while self.event() is not None:
            pass
        return self.answer


def whole(answer: Answer) -> bool:
    return answer.status == 200 and answer.finish is not None and answer.error is None and not answer.dropped


def of_response(response: httpx.Response) -> Answer:
    body = response.json()
    answer = Answer(status=response.status_code, headers=response.headers, body=body, error=body.get("error"))
    for choice in body.get("choices", ()):
        answer.text += choice["message"]["content"] or "" if "message" in choice else choice["text"]
        answer.finish = choice["finish_reason"]
    return answer

"""Notes the text of a completion as it passes, for ``policy.cached_prompts``. What it cannot read it leaves out."""

from typing import Any

from backends.upstream.exchange import Offer
from gateway.api.json_codec import loads
from gateway.policy.cached_prompts import Trace
from gateway.stream.sse import MAX_EVENT, EventTooLarge, Framer, read
from gateway.stream.unstreamed import Source


class Traced:
    """``source``, whose bytes are noted in ``trace``. ``streams``: it sends events, not one JSON text."""

    def __init__(self, source: Source, trace: Trace, *, streams: bool) -> None:
        self._source = source
        self._trace = trace
        self._framer: Framer | None = Framer(MAX_EVENT) if streams else None
        self._body = bytearray()
        self._streams = streams

    async def read(self, offer: Offer | None = None) -> bytes:
        """Raises ExchangeError."""
        data = await self._source.read(None if offer is None else lambda data: self._offered(offer, data))
        if self._streams:
            self._note_events(data)
        elif data:
            self._body += data[: MAX_EVENT - len(self._body)]
        else:
            self._note(bytes(self._body))
        return data

    def _offered(self, offer: Offer, data: bytes) -> bool:
        taken = offer(data)
        if taken:
            self._note_events(data)
        return taken

    def _note_events(self, data: bytes) -> None:
        if self._framer is None:
            return
        try:
            for raw in self._framer.feed(data):
                if event := read(raw).data:
                    self._note(event)
        except EventTooLarge:
            self._framer = None

    def _note(self, data: bytes) -> None:
        try:
            answer: Any = loads(data)
        except ValueError:
            return
        choices = answer.get("choices") if isinstance(answer, dict) else None
        for choice in choices if isinstance(choices, list) else ():
            if isinstance(choice, dict) and isinstance(text := choice.get("text"), str):
                self._trace.add(text)

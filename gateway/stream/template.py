"""Chunks that differ in one text only: told by comparing bytes, without parsing them again and again.

Nearly all chunks of a stream are equal in every byte but those of the token. Once one of them has been parsed and
checked, the bytes before and after its text are the template: an event with the same bytes there, and a JSON string
between them, means the same but for the text.

Caveat: which bytes are the text's has to be certain. A template is made only where putting a mark there and parsing the
result gives the chunk with the mark as its text, and nothing else changed.

Pure: no I/O, no clock.
"""

import re
from typing import Any, NamedTuple

from gateway.api.json_codec import loads, strings
from gateway.api.kinds import Kind
from gateway.stream.chunk_fields import tidy_choice

MARK = b"0a-text-of-mlx-gateway-0"  # nothing in it needs escaping
BEFORE = b"data: "  # an event as nearly all write it

_VALUE = re.compile(
    rb'"(%s)"\s*:\s*"((?:[^"\\]|\\.)*)"' % "|".join((*Kind.CHAT.texts, *Kind.COMPLETION.texts)).encode()
)


class Repeats(NamedTuple):
    """Chunks like the one of ``template`` but for their texts: as text, and as they stood in the JSON."""

    template: "ChunkTemplate"
    texts: list[str]
    escaped: list[bytes]


class ChunkTemplate:
    """``field``: the name of the text that differs."""

    __slots__ = ("_after", "_before", "_event_before", "_kind", "_size", "field")

    def __init__(self, field: str, before: bytes, after: bytes, kind: Kind) -> None:
        self.field = field
        self._kind = kind
        self._before, self._after = before, after
        self._event_before = BEFORE + before
        self._size = len(self._event_before) + len(after)

    def run(self, raws: list[bytes], at: int = 0) -> Repeats | None:
        """``raws``: events without the blank line that ends them; those from ``at`` on that are like this, up to the
        first that is not."""
        before, after = self._event_before, self._after
        begin, end = len(before), -len(after)
        escaped: list[bytes] = []
        for raw in raws[at:] if at else raws:
            if len(raw) < self._size or not raw.startswith(before) or not raw.endswith(after):
                break
            escaped.append(raw[begin:end])
        texts = strings(escaped) if escaped else []
        return Repeats(self, texts, escaped[: len(texts)]) if texts else None

    def like(self, escaped: bytes) -> dict[str, Any]:
        """The chunk with this text, as the interpreter gives one out: its choice is tidied."""
        chunk: dict[str, Any] = loads(self._before + escaped + self._after)
        tidy_choice(chunk["choices"][0], self._kind, first=False)
        return chunk


def template_of(data: bytes, kind: Kind) -> ChunkTemplate | None:
    """``data``: of an event that was found good. None where it holds more than one text of one choice."""
    if b"\n" in data or b"\r" in data:
        return None  # it stood in several lines, or would
    chunk = loads(data)
    holder = _holder(chunk, kind)
    if holder is None:
        return None
    told = [name for name, value in holder.items() if value and name != "role"]
    if len(told) != 1 or told[0] not in kind.texts:
        return None
    field = told[0]
    tidy_choice(chunk["choices"][0], kind, first=False)
    for match in _VALUE.finditer(data):
        if match[1].decode() != field:
            continue
        template = ChunkTemplate(field, data[: match.start(2)], data[match.end(2) :], kind)
        holder[field] = MARK.decode()
        if template.like(MARK) == chunk:
            return template
    return None


def _holder(chunk: dict[str, Any], kind: Kind) -> dict[str, Any] | None:
    """What has the text in it; None where there is anything else to be told."""
    choices = chunk.get("choices")
    if chunk.get("usage") or "error" in chunk or not isinstance(choices, list) or len(choices) != 1:
        return None
    choice: dict[str, Any] = choices[0]
    if any(value for name, value in choice.items() if name not in ("delta", "text")):
        return None  # a finish_reason, log probabilities, another choice than the first
    if kind is Kind.COMPLETION:
        return choice
    delta = choice.get("delta")  # some leave out an empty one
    return delta if isinstance(delta, dict) else None

"""The fields of a choice, as servers send them, to what the protocol has: checked once, in place, for all readers.

A field that is present and empty says nothing: ``finish_reason: ""`` or ``"null"``, ``index: null`` become what a
missing one means.
What cannot be read is refused, not dropped: text that is lost in silence makes half an answer pass as whole.

Pure: no I/O, no clock.
"""

from typing import Any

from gateway.api.json_codec import dumps
from gateway.api.kinds import Kind

Json = dict[str, Any]

MAX_CHOICES = 128  # OpenAI's bound on ``n``
MAX_DEPTH = 64  # of a chunk; what is nested deeper cannot be written again by every JSON library
COUNTS = ("prompt_tokens", "completion_tokens", "total_tokens")

_BAD_DELTA = "a delta that is not an object, or whose tool calls are not a list of objects"
_NOTHING = frozenset({"", "null", "none", "nil", "undefined"})  # a finish_reason: DashScope's own API says "null"
_PROSE = ("content", "reasoning", "reasoning_content", "refusal")


class BadField(Exception):
    """``str``: what the backend sent, as the end of a sentence."""


def tidy_choice(choice: Any, kind: Kind, *, first: bool) -> None:
    """``first``: nothing of the answer has come before. Afterwards ``index`` is a number, ``finish_reason`` a text with
    something in it or None, ``delta`` (chat) an object whose texts are texts and whose tool calls are objects. Raises
    BadField."""
    if not isinstance(choice, dict):
        raise BadField("a choice that is not an object with an index")
    index = choice.get("index")
    if index.__class__ is not int:
        if index not in (None, ""):
            raise BadField("a choice that is not an object with an index")
        index = choice["index"] = 0
    if not 0 <= index < MAX_CHOICES:
        raise BadField(f"a choice with an index that is not 0 to {MAX_CHOICES - 1}")
    finish = choice.get("finish_reason")
    if finish is not None and not (isinstance(finish, str) and finish.strip().lower() not in _NOTHING):
        choice["finish_reason"] = None
    if kind is Kind.CHAT:
        _tidy_delta(choice, first=first)
    else:
        _tidy_text(choice, first=first)


def tidy_usage(usage: Any) -> Json | None:
    """A usage whose counts are whole numbers; None where it counts nothing."""
    if not isinstance(usage, dict):
        return None
    prompt, made, total = map(usage.get, COUNTS)
    if prompt.__class__ is made.__class__ is total.__class__ is int and min(prompt, made, total) > 0:
        return usage  # nearly always
    out = {name: _count(value) if name in COUNTS else value for name, value in usage.items()}
    out = {name: value for name, value in out.items() if value is not None}
    return out if any(out.get(name) for name in COUNTS) else None


def cached_at_most(usage: Json | None, tokens: int) -> Json | None:
    """A tidy usage that claims no more than ``tokens`` of the prompt to have been in the prompt cache."""
    details = (usage or {}).get("prompt_tokens_details")
    if usage is None or not isinstance(details, dict):
        return usage
    cached = details.get("cached_tokens")
    if not isinstance(cached, int) or cached <= tokens:
        return usage
    return {**usage, "prompt_tokens_details": {**details, "cached_tokens": tokens}}


def too_deep(value: Any) -> bool:
    """Nested deeper than MAX_DEPTH; level by level, as a walk down would be recursive itself."""
    level = [value]
    for _ in range(MAX_DEPTH):
        inner = [item for one in level for item in (one.values() if isinstance(one, dict) else one)]
        level = [item for item in inner if isinstance(item, dict | list)]
        if not level:
            return False
    return True


def named_calls(choice: Json, kind: Kind) -> bool:
    """There is a tool call in this choice, as far as it can be run: with a name."""
    if kind is not Kind.CHAT:
        return False
    delta = choice["delta"]
    calls = delta.get("tool_calls") or ()
    old = delta.get("function_call")  # what ``tool_calls`` replaced
    return any(_name_of(call) for call in calls) or (isinstance(old, dict) and bool(old.get("name")))


def _name_of(call: Json) -> Any:
    custom = call.get("custom")
    return (call.get("function") or {}).get("name") or (isinstance(custom, dict) and custom.get("name"))


def _tidy_delta(choice: Json, *, first: bool) -> None:
    delta = choice.get("delta")
    if not delta:  # null, "", [], or left out
        delta = choice["delta"] = (_elsewhere(choice) if first else None) or {}
    if not isinstance(delta, dict):
        raise BadField(_BAD_DELTA)
    odd = [name for name, value in delta.items() if value.__class__ is not str or name == "tool_calls"]
    for name in odd:
        if name == "tool_calls":
            _tidy_calls(delta)
        elif name in _PROSE and delta[name] is not None:
            _tidy_prose(delta, name, delta[name])


def _tidy_calls(delta: Json) -> None:
    calls = delta["tool_calls"]
    if calls is None:
        return
    if not calls:
        del delta["tool_calls"]
        return
    if not isinstance(calls, list):
        raise BadField(_BAD_DELTA)
    for call in calls:
        _tidy_call(call)


def _elsewhere(choice: Json) -> Any:
    """The answer, where an unstreamed one has it; later on it would be a repetition of all that was streamed."""
    return choice.pop("message", None) or ({"content": choice.pop("text")} if choice.get("text") else None)


def _tidy_text(choice: Json, *, first: bool) -> None:
    text = choice.get("text")
    if text is None and first and isinstance(holder := choice.get("delta") or choice.get("message"), dict):
        text = choice["text"] = holder.get("content")
    if text is not None and not isinstance(text, str):
        if text:
            raise BadField("a text that is not a string")
        choice["text"] = ""


def _tidy_prose(delta: Json, name: str, value: Any) -> None:
    """Mistral's API sends a list of parts: of type text, and of type thinking."""
    if not value:
        delta[name] = None
        return
    parts = value if isinstance(value, list) else [value]
    said: dict[str, list[str]] = {}
    for part in parts:
        kind, text = _part(part)
        said.setdefault("reasoning_content" if kind == "thinking" else name, []).append(text)
    delta.pop(name)
    for channel, texts in said.items():
        delta[channel] = (delta.get(channel) or "") + "".join(texts)


def _part(part: Any) -> tuple[str, str]:
    """Its type, and its text."""
    if isinstance(part, str):
        return "text", part
    kind = part.get("type", "text") if isinstance(part, dict) else None
    text = part.get(kind) if isinstance(kind, str) and kind in ("text", "thinking") else None
    if isinstance(text, list):
        text = "".join(_part(one)[1] for one in text if not isinstance(one, dict) or one.get("type", "text") == "text")
    if not isinstance(kind, str) or not isinstance(text, str):
        raise BadField("content that is neither text nor a list of texts")
    return kind, text


def _tidy_call(call: Any) -> None:
    if not isinstance(call, dict) or not isinstance(call.get("function") or {}, dict):
        raise BadField(_BAD_DELTA)
    index = call.get("index")
    if index.__class__ is not int and index is not None:
        if index != "":
            raise BadField("a tool call with an index that is not a number")
        del call["index"]
    if call.get("id").__class__ is int:
        call["id"] = str(call["id"])
    for name in ("id", "type"):
        if not isinstance(call.get(name), str | None):
            raise BadField(f"a tool call whose {name} is not a text")
    if call.get("function"):
        _tidy_function(call["function"])
    elif call.get("function") is not None:
        call["function"] = {}


def _tidy_function(function: Json) -> None:
    if not isinstance(function.get("name"), str | None):
        raise BadField("a tool call whose name is not a text")
    arguments = function.get("arguments")
    if isinstance(arguments, dict | list):  # the protocol has text here; Ollama's own API an object
        function["arguments"] = dumps(arguments).decode()
    elif not isinstance(arguments, str | None):
        raise BadField("a tool call whose arguments are not a text")


def _count(value: Any) -> int | None:
    if isinstance(value, str) and value.isdecimal() and len(value) < 16:
        value = int(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53 else None

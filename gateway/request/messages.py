"""Chat messages in the one shape that every chat template takes.

Content becomes one string, as mlx_lm.server itself would join it. System and developer messages become one system
message at the front, in their order: strict templates raise on a second one or a late one. Nothing a client wrote is
dropped but keys that no template reads, and the first line of Claude Code's instructions, which tells whom to bill:
some versions change it with each request, and what comes after it would never be found in the prompt cache.

Caveat: mlx_lm.server fetches ``http`` image URLs itself, before any validation. Anything but text is refused.
"""

from typing import Any

from gateway.api import json_codec
from gateway.request.size import MAX_VALUES, count_values
from gateway.request.values import MAX_DEPTH, Notes, bad, check_tree, prose, refuse, text

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}
TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
MAX_MESSAGES = 10_000
MAX_KEYS = 64  # of a message
MAX_PARTS = 4096  # of a message's content
MAX_CALLS = 1024  # of a message
MAX_ID = 256  # characters
BILLING = "x-anthropic-billing-header:"  # the first line of the instructions (Claude Code 2.1)
KNOWN_KEYS = frozenset({"role", "content"})
TEXT_KEYS = ("name", "reasoning_content", "reasoning", "thinking")  # what templates read besides


def messages(value: Any, notes: Notes) -> list[dict[str, Any]]:
    """The messages to send; raises RequestError naming the place, such as ``messages[3].content[0].text``."""
    if not isinstance(value, list) or not value:
        raise bad("messages", "a list of at least one message", value)
    if len(value) > MAX_MESSAGES:
        raise bad("messages", f"at most {MAX_MESSAGES} messages", value)
    system: list[str] = []
    rest: list[dict[str, Any]] = []
    late = False
    for i, item in enumerate(value):
        message = _message(f"messages[{i}]", item, notes)
        if message["role"] == "system":
            late = late or bool(rest)
            system.append(message["content"])
        else:
            rest.append(message)
    if late or len(system) > 1:
        notes.changed("messages.system")
    front = [{"role": "system", "content": "\n\n".join(part for part in system if part)}] if system else []
    return front + rest


def _message(where: str, item: Any, notes: Notes) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise bad(where, "an object with role and content", item)
    if len(item) > MAX_KEYS:
        raise bad(where, f"at most {MAX_KEYS} keys", item)
    role = item.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise bad(f"{where}.role", f"one of {', '.join(ROLES)}", role)
    message: dict[str, Any] = {"role": ROLES[role]}
    if role != message["role"]:
        notes.changed("messages.role")
    message["content"] = _content(f"{where}.content", item.get("content"), message["role"], notes)
    used = set(KNOWN_KEYS)
    if message["role"] != "system":
        used |= _extras(where, item, message, notes)
    for key, value in item.items():
        if key not in used and value is not None:
            notes.changed(f"messages.{key}")
    return message


def _unbilled(content: str, notes: Notes) -> str:
    """Without its first line."""
    notes.changed("messages.system")
    return content.partition("\n")[2]


def _extras(where: str, item: dict[str, Any], message: dict[str, Any], notes: Notes) -> set[str]:
    """Copies the other keys that mean something for this role; gives their names."""
    used = set(TEXT_KEYS)
    for key in TEXT_KEYS:
        if item.get(key) is not None:
            message[key] = prose(f"{where}.{key}", item[key], notes)
    if message["role"] == "assistant":
        used |= {"tool_calls", "function_call"}
        if item.get("function_call") is not None:
            raise refuse(f"{where}.function_call", f"{where}.function_call: not supported; send tool_calls instead")
        if item.get("tool_calls") is not None and (
            calls := _tool_calls(f"{where}.tool_calls", item["tool_calls"], notes)
        ):
            message["tool_calls"] = calls
    if message["role"] == "tool":
        used.add("tool_call_id")
        if item.get("tool_call_id") is not None:
            message["tool_call_id"] = _call_id(f"{where}.tool_call_id", item["tool_call_id"])
    return used


def _content(where: str, content: Any, role: str, notes: Notes) -> str:
    if content is None and role in {"assistant", "tool"}:
        return ""  # as mlx_lm.server makes it
    if isinstance(content, list):
        if len(content) > MAX_PARTS:
            raise bad(where, f"at most {MAX_PARTS} parts", content)
        parts = [_part(f"{where}[{i}]", part, notes) for i, part in enumerate(content)]
        if role == "system" and parts and parts[0].startswith(BILLING):
            parts[0] = _unbilled(parts[0], notes)
        return "".join(parts)
    said = prose(where, content, notes, "a string or a list of text parts")
    billed = role == "system" and said.startswith(BILLING) and "\n" in said
    return _unbilled(said, notes) if billed else said


def _part(where: str, part: Any, notes: Notes) -> str:
    if isinstance(part, str):
        notes.changed("messages.content")
        return prose(where, part, notes)
    if not isinstance(part, dict):
        raise bad(where, 'an object such as {"type": "text", "text": "…"}', part)
    kind = part.get("type")
    if not isinstance(kind, str) or kind not in TEXT_PARTS:
        raise bad(f"{where}.type", "text", kind, "only text can be sent to the models here: no images, audio or files")
    if kind != "text":
        notes.changed("messages.content")
    key = TEXT_PARTS[kind]
    return prose(f"{where}.{key}", part.get(key), notes)


def _tool_calls(where: str, calls: Any, notes: Notes) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise bad(where, "a list of tool calls", calls)
    if len(calls) > MAX_CALLS:
        raise bad(where, f"at most {MAX_CALLS} tool calls", calls)
    return [_tool_call(f"{where}[{i}]", call, notes) for i, call in enumerate(calls)]


def _tool_call(where: str, call: Any, notes: Notes) -> dict[str, Any]:
    if not isinstance(call, dict):
        raise bad(where, "an object with id, type and function", call)
    if call.get("type", "function") not in ("function", None):
        raise bad(f"{where}.type", "function", call["type"])
    function = call.get("function")
    if not isinstance(function, dict):
        raise bad(f"{where}.function", "an object with name and arguments", function)
    name = text(f"{where}.function.name", function.get("name"))
    if not name:
        raise bad(f"{where}.function.name", "the name of the called function", name)
    arguments = _arguments(f"{where}.function.arguments", function.get("arguments"), notes)
    out: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": arguments}}
    if call.get("id") is not None:
        out["id"] = _call_id(f"{where}.id", call["id"])
    return out


def _call_id(where: str, call_id: Any) -> str:
    """Some templates write it into the prompt."""
    plain = text(where, call_id)
    if len(plain) > MAX_ID:
        raise bad(where, f"at most {MAX_ID} characters", call_id)
    return plain


def _arguments(where: str, arguments: Any, notes: Notes) -> str:
    """JSON text of an object: mlx_lm.server parses it, and templates walk the keys of what comes out."""
    expected = "the JSON text of an object"
    if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
        notes.changed("messages.tool_calls")
        return "{}"
    if isinstance(arguments, dict):
        check_tree(where, arguments)
        notes.changed("messages.tool_calls")
        return json_codec.dumps(arguments).decode()
    source = text(where, arguments, expected)
    notes.values += count_values(source.encode(), MAX_VALUES - notes.values)  # in the body it was one string
    if notes.values > MAX_VALUES:
        raise refuse(where, f"{where}: with it the body has more than {MAX_VALUES} values; send fewer")
    try:
        parsed = json_codec.loads(source)
    except (ValueError, RecursionError):
        remedy = f'a cut or malformed call of an earlier turn; mend it or send "{{}}" (at most {MAX_DEPTH} levels deep)'
        raise bad(where, expected, arguments, remedy) from None
    if not isinstance(parsed, dict):
        raise bad(where, expected, arguments)
    check_tree(where, parsed)
    return source

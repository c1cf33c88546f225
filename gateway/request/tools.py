"""Tools and chat template variables: the two free-form fields that reach Jinja.

Caveat: the variables are passed to ``apply_chat_template`` as keyword arguments, next to its own, so a client
could replace the template, or have it return something that is no prompt. Those names are reserved.
"""

import re
from typing import Any

from gateway.request.values import Notes, Rules, bad, check_tree, inner, refuse, text

MAX_TOOLS = 512
MAX_TEMPLATE_KEYS = 64
MAX_NAME = 256
MAX_VARIABLE = 4096  # characters; templates write them into the prompt

# The parameters of apply_chat_template in transformers 5 and in mlx_lm's wrapper, and what they render with.
RESERVED = frozenset(
    {
        "self", "conversation", "conversations", "messages", "tools", "documents", "chat_template",
        "add_generation_prompt",
        "continue_final_message", "tokenize", "sanitize_control_tokens", "padding", "truncation", "max_length",
        "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs", "processor_kwargs",
        "raise_exception", "strftime_now", "tojson",
    }
)  # fmt: skip

_VARIABLE = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")


def tools(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise bad("tools", "a list of tools", value)
    if len(value) > MAX_TOOLS:
        raise bad("tools", f"at most {MAX_TOOLS} tools", value)
    check_tree("tools", value)
    return [_tool(f"tools[{i}]", tool) for i, tool in enumerate(value)]


def _tool(where: str, tool: Any) -> dict[str, Any]:
    if not isinstance(tool, dict):
        raise bad(where, "an object with type and function", tool)
    if tool.get("type") != "function":
        raise bad(f"{where}.type", "function", tool.get("type"), "other kinds of tool cannot run here; leave them out")
    function = tool.get("function")
    if not isinstance(function, dict):
        remedy = "name, description and parameters belong inside it"
        raise bad(f"{where}.function", "an object with a name", function, remedy)
    name = text(f"{where}.function.name", function.get("name"))
    if not 0 < len(name) <= MAX_NAME:
        raise bad(f"{where}.function.name", f"1 to {MAX_NAME} characters", name)
    kept = {key: item for key, item in function.items() if item is not None}
    if "description" in kept:
        text(f"{where}.function.description", kept["description"])
    kept["parameters"] = _parameters(f"{where}.function.parameters", kept.get("parameters", {}))
    return {"type": "function", "function": kept}


def _parameters(where: str, schema: Any) -> dict[str, Any]:
    """A schema whose ``properties`` are objects: the tool parsers of mlx_lm read them without looking."""
    if not isinstance(schema, dict):
        raise bad(where, "a JSON Schema object", schema)
    properties = schema.get("properties")
    if properties is None:
        properties = {}
    if not isinstance(properties, dict):
        raise bad(f"{where}.properties", "an object", properties)
    for key, item in properties.items():
        if not isinstance(item, dict | bool):
            raise bad(inner(f"{where}.properties", key), "a JSON Schema object", item)
    plain = {key: {} if isinstance(item, bool) else item for key, item in properties.items()}
    return {"type": "object", **schema, "properties": plain}


def template_kwargs(value: Any, rules: Rules, notes: Notes) -> dict[str, Any]:
    param = "chat_template_kwargs"
    if not isinstance(value, dict):
        raise bad(param, 'an object such as {"enable_thinking": false}', value)
    if len(value) > MAX_TEMPLATE_KEYS:
        raise bad(param, f"at most {MAX_TEMPLATE_KEYS} keys", value)
    kept: dict[str, Any] = {}
    for key, item in value.items():
        where = inner(param, key)
        if item is None:
            notes.changed(param)
        elif key == "chat_template":
            if "chat_template" in rules.allow:
                kept[key] = text(where, item)
            else:
                notes.warn(where, "a template of the client's own is not allowed here; the model's was used")
        elif key in RESERVED or not _VARIABLE.fullmatch(key):
            raise refuse(where, f"{where}: not a variable of a chat template; leave it out")
        else:
            kept[key] = _scalar(where, item)
    return kept


def _scalar(where: str, item: Any) -> Any:
    match item:
        case bool():
            return item
        case str() if len(item) <= MAX_VARIABLE:
            return text(where, item)
        case int() | float() if -(2**53) <= item <= 2**53:  # NaN fails
            return item
    raise bad(where, f"true, false, a number or a string of at most {MAX_VARIABLE} characters", item)

"""Fields that mlx_lm.server reads past, and what a client should know when one of them asked for something.

All of them are dropped and noted, known or not; those in the table also give a warning when their value matters.
"""

from collections.abc import Callable
from typing import Any

from gateway.request.values import Notes

Matters = Callable[[Any], bool]


def _always(_value: Any) -> bool:
    return True


def _beyond(*harmless: Any) -> Matters:
    """True for any value but these. Compared with their type: 1 == True in Python."""
    return lambda value: not any(type(value) is type(plain) and value == plain for plain in harmless)


def _is_json(value: Any) -> bool:
    return not (isinstance(value, dict) and value.get("type") == "text")


_UNCONSTRAINED = "not enforced: the output is free text; say in the prompt what shape you want, and check it"

WARNINGS: dict[str, tuple[Matters, str]] = {
    "response_format": (_is_json, _UNCONSTRAINED),
    "grammar": (_beyond(""), _UNCONSTRAINED),
    "guided_json": (_always, _UNCONSTRAINED),
    "guided_regex": (_always, _UNCONSTRAINED),
    "guided_choice": (_always, _UNCONSTRAINED),
    "guided_grammar": (_always, _UNCONSTRAINED),
    "structured_outputs": (_always, _UNCONSTRAINED),
    "parallel_tool_calls": (_beyond(True), "ignored: the model may call several tools at once"),
    "reasoning_effort": (_always, "ignored: set chat_template_kwargs, if the model's template knows it"),
    "enable_thinking": (_always, "ignored here: put it into chat_template_kwargs"),
    "adapters": (_always, "not allowed here: the model was used as it is configured"),
    "draft_model": (_always, "not allowed here: the model was used as it is configured"),
    "role_mapping": (_always, "not allowed here: the model's own template was used"),
    "best_of": (_beyond(1, 1.0), "ignored: one answer is generated"),
    "echo": (_beyond(False), "ignored: the prompt is not repeated"),
    "suffix": (_beyond(""), "ignored: the text is continued, not filled in"),
    "repeat_penalty": (_beyond(1, 1.0), "ignored: the name here is repetition_penalty"),
    "min_tokens": (_beyond(0), "ignored"),
    "ignore_eos": (_beyond(False), "ignored"),
    "modalities": (_beyond(["text"]), "ignored: the answer is text"),
    "web_search_options": (_always, "ignored: nothing here searches the web"),
}


def warn_unsupported(said: dict[str, Any], notes: Notes) -> None:
    """``said``: what no rule has taken out."""
    for name, value in said.items():
        matters, sentence = WARNINGS.get(name, (None, ""))
        if matters is not None and matters(value):
            notes.warn(name, sentence)
        else:
            notes.changed(name)

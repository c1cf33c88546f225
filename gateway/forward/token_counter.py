"""Counts the tokens of a prompt as mlx_lm.server does: with the model's own tokenizer and chat template.

Both are read on first use from the model's folder or the hub cache; neither mlx nor transformers is imported. Prompts
that cannot be counted (no ``tokenizer.json``, a template that fails, a tokenizer class of mlx_lm's own) are estimated
by the caller.

Caveats: the template is untrusted Jinja from the hub; it is rendered in the sandbox, with the few names that
``apply_chat_template`` of transformers provides. ``Tokenizer.encode`` holds the interpreter's lock (6 s for 5 MB of
text, tokenizers 0.22), which would block the event loop from any thread; ``encode_batch_fast`` releases it.
"""

import asyncio
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from gateway.api.kinds import Kind

log = logging.getLogger(__name__)

SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class TokenCounter:
    """``folders``: returns the possible folders of the model's files, best first. The files are read once."""

    def __init__(self, folders: Callable[[], Iterable[Path]]) -> None:
        self._folders = folders
        self._counter: Callable[[Kind, Mapping[str, Any]], int] | None = None
        self._failed = False  # the tokenizer or the template cannot be used

    async def count(self, kind: Kind, params: Mapping[str, Any]) -> int | None:
        """None if the prompt cannot be counted. Runs in a thread: 5 MB of text take seconds."""
        if self._failed:
            return None
        return await asyncio.to_thread(self._count, kind, params)

    def _count(self, kind: Kind, params: Mapping[str, Any]) -> int | None:
        try:
            if self._counter is None:
                folder = next((f for f in self._folders() if (f / "tokenizer.json").exists()), None)
                if folder is None:
                    return None  # a hub model may still be downloading
                self._counter = _counter_of(folder)
            return self._counter(kind, params)
        except Exception as error:  # noqa: BLE001  a foreign template or tokenizer may raise anything; an estimate is used
            log.info("prompts cannot be counted exactly", extra={"reason": f"{type(error).__name__}: {error}"})
            self._failed = self._counter is None
            return None


def _counter_of(folder: Path) -> Callable[[Kind, Mapping[str, Any]], int]:
    # A batch of one has no parallel work; and a fork after the tokenizer's threads were used would print a warning into
    # the output of the next child process.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from tokenizers import Tokenizer  # noqa: PLC0415  rarely needed, and slow to import

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    if config.get("chat_template_type") or config.get("tokenizer_type"):
        raise ValueError("mlx_lm uses a template or tokenizer of its own for this model")
    render = _template(folder, config, thinks=tokenizer.token_to_id("<think>") is not None)

    def count(kind: Kind, params: Mapping[str, Any]) -> int:
        if kind is Kind.COMPLETION:
            return len(tokenizer.encode_batch_fast([params["prompt"]])[0])
        return len(tokenizer.encode_batch_fast([render(params)], add_special_tokens=False)[0])

    return count


def _template(folder: Path, config: Mapping[str, Any], *, thinks: bool) -> Callable[[Mapping[str, Any]], str]:
    from jinja2.ext import loopcontrols  # noqa: PLC0415  as above
    from jinja2.sandbox import ImmutableSandboxedEnvironment  # noqa: PLC0415

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _raise, "strftime_now": lambda form: datetime.now().strftime(form)}
    template = environment.from_string(_source(folder, config))
    known = {name: _special(config[name]) for name in SPECIAL if config.get(name)} | {"enable_thinking": thinks}

    def render(params: Mapping[str, Any]) -> str:
        messages = [_parsed(message) for message in params["messages"]]
        variables = {**known, **params.get("chat_template_kwargs", {})}
        tools = params.get("tools")
        return template.render(messages=messages, tools=tools, documents=None, add_generation_prompt=True, **variables)

    return render


def _source(folder: Path, config: Mapping[str, Any]) -> str:
    if (file := folder / "chat_template.jinja").exists():
        return file.read_text()
    template = config["chat_template"]
    return template if isinstance(template, str) else next(t["template"] for t in template if t["name"] == "default")


def _special(token: Any) -> str:
    return token["content"] if isinstance(token, dict) else str(token)


def _parsed(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message as mlx_lm.server passes it to the template: with the arguments of tool calls as objects."""
    calls = message.get("tool_calls")
    if not calls:
        return dict(message)
    return {**message, "tool_calls": [_parsed_call(call) for call in calls]}


def _parsed_call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return {**call, "function": {**function, "arguments": json.loads(function["arguments"])}}


def _tojson(value: Any, **options: Any) -> str:
    """Replaces Jinja's own filter, which escapes HTML."""
    return json.dumps(value, **{"ensure_ascii": False, **options})


def _raise(message: str) -> NoReturn:
    raise ValueError(message)

"""Counts the tokens of a prompt as mlx_lm.server does, with the model's own tokenizer and chat template; and cuts it
between two of them.

Both are read on first use from the model's folder or the hub cache; neither mlx nor transformers is imported. Prompts
that cannot be counted (no ``tokenizer.json``, a template that fails, a tokenizer class of mlx_lm's own) are estimated
by the caller.

Caveats: the template is untrusted Jinja from the hub; it is rendered in the sandbox, with the few names that
``apply_chat_template`` of transformers provides. ``Tokenizer.encode`` holds the interpreter's lock, from any thread;
``encode_batch_fast`` releases it, but freeing its result holds it again, and a byte of text takes up to 380 bytes of
memory meanwhile (tokenizers 0.22). So counting stops where the prompt is known to be too long, long texts are counted
in slices, and all models share one thread.
"""

import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from gateway.api.json_codec import loads
from gateway.api.kinds import Kind
from gateway.forward.body_workers import BodyWorkers
from gateway.policy.token_bound import most_chars_per_token
from gateway.request import RESERVED

log = logging.getLogger(__name__)

T = TypeVar("T")

SLICE = 64 << 10  # characters that are tokenized at a time where the rest may not be needed
LOST_AT_A_CUT = 16  # tokens that a cut between two slices may add
WHOLE = 1 << 20  # characters of a text that is tokenized in one call, which takes up to 400 MB for a second
LOOKED_AT = 2 << 20  # characters of a longer text: 30 MiB of blanks are few tokens for some models, and took a minute
LIKELY = 6  # characters per token: a prompt of no more is likely to fit, and is tokenized in one call

LONGEST = 4 << 20  # characters of a prompt that is cut: it is kept, and looked at, as one text
SAMPLE = 512  # characters of its beginning by which the tokens that are added there are found
BESIDE = 256  # characters looked at on each side of a cut: further away nothing decides about the tokens there
CUTS = 24  # places tried for one cut

SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True, slots=True)
class Templating:
    """What the server was told of chat templates. ``source``: the template in place of the model's own, "" = that;
    ``variables``: of it, where a request does not set them. ``own_code``: the model's repository may bring a tokenizer
    as code."""

    source: str = ""
    variables: Mapping[str, Any] = field(default_factory=dict)
    own_code: bool = False


AS_THE_FILES_SAY = Templating()


@dataclass(frozen=True, slots=True)
class Count:
    """``exact``: of all tokens; ``at_least``: counting stopped there; neither: estimated from the beginning of the
    text."""

    tokens: int
    exact: bool = False
    at_least: bool = False


@dataclass(frozen=True, slots=True)
class Script:
    """A prompt as one text, from which ``/v1/completions`` of mlx_lm.server reads the same tokens. ``tokens``: their
    number, 0 = not asked for; ``exact``: counted, else estimated."""

    text: str
    tokens: int
    exact: bool


@dataclass(frozen=True, slots=True)
class Cut:
    """A place between two tokens of a script. ``at``: characters before it; ``token``: the id of the token that follows
    it, ``says``: its text."""

    at: int
    token: int
    says: str


class TokenCounter:
    """``folders``: returns the possible folders of the model's files, best first. The files are read once. ``workers``:
    of all models."""

    def __init__(
        self,
        folders: Callable[[], Iterable[Path]],
        workers: BodyWorkers,
        templating: Templating = AS_THE_FILES_SAY,
    ) -> None:
        self._folders = folders
        self._templating = templating
        self._workers = workers
        self._model: _Model | None = None
        self._failed = False  # the tokenizer or the template cannot be used

    async def count(self, kind: Kind, params: Mapping[str, Any], enough: int | None = None) -> Count | None:
        """None if the prompt cannot be counted. ``enough``: tokens at which counting may stop."""
        return await self._with_model(lambda model: model.count(kind, params, enough))

    async def script(self, kind: Kind, params: Mapping[str, Any], *, counted: bool = True) -> Script | None:
        """None if the prompt cannot be written as one text, or only as a very long one."""
        return await self._with_model(lambda model: model.script(kind, params, counted=counted))

    async def cut(self, text: str, near: int) -> Cut | None:
        """The first place from ``near`` characters on that is between two tokens of the script ``text`` and of each
        beginning of it that ends there; None = there is none nearby."""
        return await self._with_model(lambda model: model.cut(text, near))

    async def _with_model(self, work: Callable[["_Model"], T | None]) -> T | None:
        return None if self._failed else await self._workers.count(lambda: self._tried(work))

    def _tried(self, work: Callable[["_Model"], T | None]) -> T | None:
        try:
            if self._model is None:
                folder = next((f for f in self._folders() if (f / "tokenizer.json").exists()), None)
                if folder is None:
                    return None  # a hub model may still be downloading
                self._model = _Model(folder, self._templating)
            return work(self._model)
        except Exception as error:  # noqa: BLE001  a foreign template or tokenizer may raise anything; an estimate is used
            log.info("prompts cannot be counted exactly", extra={"reason": f"{type(error).__name__}: {error}"})
            self._failed = self._model is None
            return None


class _Model:
    """The tokenizer and the template of one model. Blocks."""

    def __init__(self, folder: Path, templating: Templating = AS_THE_FILES_SAY) -> None:
        """Raises whatever the files, or the libraries that read them, make of them."""
        # A batch of one has no parallel work; and a fork after the tokenizer's threads were used would print a warning
        # into the output of the next child process.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        from tokenizers import Tokenizer, pre_tokenizers  # noqa: PLC0415  rarely needed, and slow to import

        source = (folder / "tokenizer.json").read_bytes()
        self._tokenizer = Tokenizer.from_buffer(source)
        self._tokenizer.no_truncation()  # as transformers calls it, whatever the file says
        self._tokenizer.no_padding()
        self._most_chars = most_chars_per_token(loads(source), pre_tokenizers.ByteLevel.alphabet())
        config = json.loads((folder / "tokenizer_config.json").read_text())
        if config.get("chat_template_type") or config.get("tokenizer_type"):
            raise ValueError("mlx_lm uses a template or tokenizer of its own for this model")
        if config.get("auto_map") and templating.own_code:
            raise ValueError("the model brings a tokenizer of its own")
        thinks = self._tokenizer.token_to_id("<think>") is not None
        self._render = _template(folder, config, templating, thinks=thinks)

    def count(self, kind: Kind, params: Mapping[str, Any], enough: int | None) -> Count:
        plain = kind is Kind.COMPLETION
        text = params["prompt"] if plain else self._render(params)
        if enough is not None and (count := self._too_many(text, enough)) is not None:
            return count
        return self._counted(text, special=plain)

    def _counted(self, text: str, *, special: bool) -> Count:
        if len(text) <= WHOLE:
            return Count(self._tokens(text, special=special), exact=True)
        return Count(round(self._sliced(text[:LOOKED_AT]) * max(1, len(text) / LOOKED_AT)))

    def script(self, kind: Kind, params: Mapping[str, Any], *, counted: bool) -> Script | None:
        plain = kind is Kind.COMPLETION
        text = params["prompt"] if plain else self._render(params)
        if len(text) > LONGEST:
            return None
        count = self._counted(text, special=plain) if counted else Count(0)
        if not plain:
            text = self._as_prompt(text)
        return None if text is None else Script(text, count.tokens, count.exact)

    def _as_prompt(self, text: str) -> str | None:
        """The text of a chat without the token that is added in front of a plain prompt, which a template writes
        itself; None where the tokens of both are not the same."""
        wanted = self._ids(text[:SAMPLE])
        if self._ids(text[:SAMPLE], special=True) == wanted:
            return text
        first = str(self._tokenizer.id_to_token(wanted[0])) if wanted else ""
        rest = text.removeprefix(first)
        return rest if self._ids(rest[: SAMPLE - len(first)], special=True) == wanted else None

    def cut(self, text: str, near: int) -> Cut | None:
        begin = max(0, near - BESIDE)
        window = text[begin : near + 2 * BESIDE]
        encoding = self._tokenizer.encode(window, add_special_tokens=False)
        ends = [at for _, at in encoding.offsets]
        places = [i for i, at in enumerate(ends) if near - begin <= at < near - begin + BESIDE][:CUTS]
        for last in places:
            before, at = encoding.ids[: last + 1], ends[last]
            if last + 1 < len(ends) and self._ids(window[:at]) == before:
                says = self._tokenizer.decode(encoding.ids[last + 1 : last + 2], skip_special_tokens=False)
                return Cut(begin + at, encoding.ids[last + 1], says)
        return None

    def _too_many(self, text: str, enough: int) -> Count | None:
        """None if the text may have fewer tokens than ``enough``."""
        if self._most_chars is not None and len(text) > enough * self._most_chars:
            return Count(-(-len(text) // self._most_chars), at_least=True)
        if len(text) <= enough * LIKELY:
            return None
        count = self._sliced(text[:LOOKED_AT], enough)
        return Count(count, at_least=True) if count >= enough else None

    def _sliced(self, text: str, enough: int | None = None) -> int:
        """Tokens that the text has at least, but for ``enough``."""
        count = 0
        for at in range(0, len(text), SLICE):
            count += max(0, self._tokens(text[at : at + SLICE]) - LOST_AT_A_CUT)
            if enough is not None and count >= enough:
                break
        return count

    def _tokens(self, text: str, *, special: bool = False) -> int:
        return len(self._tokenizer.encode_batch_fast([text], add_special_tokens=special)[0])

    def _ids(self, text: str, *, special: bool = False) -> list[int]:
        """Of a short text."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=special).ids
        return ids


def _template(
    folder: Path, config: Mapping[str, Any], templating: Templating, *, thinks: bool
) -> Callable[[Mapping[str, Any]], str]:
    from jinja2.ext import loopcontrols  # noqa: PLC0415  as above
    from jinja2.sandbox import ImmutableSandboxedEnvironment  # noqa: PLC0415

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _raise, "strftime_now": lambda form: datetime.now().strftime(form)}
    template = environment.from_string(templating.source or _source(folder, config))
    known = {name: _special(config[name]) for name in SPECIAL if config.get(name)} | {"enable_thinking": thinks}

    def render(params: Mapping[str, Any]) -> str:
        messages = [_parsed(message) for message in params["messages"]]
        told = {**templating.variables, **(params.get("chat_template_kwargs") or {})}
        if not RESERVED.isdisjoint(told):
            raise ValueError("more is told to the tokenizer than variables of the template")
        variables = {**known, **told}
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

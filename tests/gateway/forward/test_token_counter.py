"""Counting prompts: the files of a model, and those that cannot be counted."""

import asyncio
import json
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from gateway.api.kinds import Kind
from gateway.forward.token_counter import TokenCounter

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.content == 'stop' %}{% break %}{% endif %}"
    "{{ m.role }} {{ m.content }}{% for c in m.tool_calls or [] %} {{ c.function.arguments.word }}{% endfor %}\n"
    "{% endfor %}{% if tools %}{{ tools | tojson }}{% endif %}{% if loud %} loud{% endif %}"
    "{% if messages[0].content == 'bad' %}{{ raise_exception('no') }}{% endif %}"
    "{% if add_generation_prompt %} assistant{% endif %}"
)


def model(folder: Path, *, template: Any = TEMPLATE, **config: Any) -> Path:
    """Each word is a token."""
    tokenizer = Tokenizer(WordLevel({"[UNK]": 0}, unk_token="[UNK]"))  # noqa: S106
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    told = {"chat_template": template, "bos_token": {"content": "begin "}, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    return folder


async def count(folder: Path, *contents: str, **params: Any) -> int | None:
    messages = [{"role": "user", "content": content} for content in contents]
    return await TokenCounter(lambda: [folder]).count(Kind.CHAT, {"messages": messages, **params})


async def test_a_prompt_and_a_chat(tmp_path: Path) -> None:
    folder = model(tmp_path)
    assert await TokenCounter(lambda: [folder]).count(Kind.COMPLETION, {"prompt": "one two three"}) == 3
    assert await count(folder, "hello you") == 5  # begin user hello you assistant
    assert await count(folder, "hello you", "stop", "and more") == 5
    assert await count(folder, "hello", chat_template_kwargs={"loud": True}) == 5


async def test_arguments_of_calls_are_objects_to_a_template(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": '{"word": "x y z"}'}}
    messages = [{"role": "assistant", "content": "", "tool_calls": [call]}]
    assert await TokenCounter(lambda: [model(tmp_path)]).count(Kind.CHAT, {"messages": messages}) == 6


async def test_templates_in_a_file_of_their_own_and_by_name(tmp_path: Path) -> None:
    folder = model(tmp_path, template=[{"name": "tool_use", "template": "x"}, {"name": "default", "template": "a b"}])
    assert await count(folder, "hello") == 2
    (folder / "chat_template.jinja").write_text("a b c")
    assert await count(folder, "hello") == 3


async def test_what_a_template_refuses_is_not_counted_and_the_next_is(tmp_path: Path) -> None:
    counter = TokenCounter(lambda: [model(tmp_path)])
    assert await counter.count(Kind.CHAT, {"messages": [{"role": "user", "content": "bad"}]}) is None
    assert await counter.count(Kind.CHAT, {"messages": [{"role": "user", "content": "good"}]}) == 4


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: (folder / "tokenizer.json").write_text("{}"),
        lambda folder: (folder / "tokenizer_config.json").write_text('{"bos_token": "x"}'),
        lambda folder: (folder / "tokenizer_config.json").write_text('{"chat_template_type": "own"}'),
        lambda folder: (folder / "tokenizer_config.json").write_text('{"chat_template": "{% nonsense %}"}'),
    ],
)
async def test_files_that_cannot_be_used_are_read_once(tmp_path: Path, spoil: Any) -> None:
    counter = TokenCounter(lambda: [tmp_path])
    spoil(model(tmp_path))
    for _ in range(2):
        assert await counter.count(Kind.COMPLETION, {"prompt": "x"}) is None
    model(tmp_path)
    assert await counter.count(Kind.COMPLETION, {"prompt": "x"}) is None


async def test_a_model_that_is_not_there_yet_is_looked_for_again(tmp_path: Path) -> None:
    counter = TokenCounter(lambda: [tmp_path])
    assert await counter.count(Kind.COMPLETION, {"prompt": "x y"}) is None
    model(tmp_path)
    assert await counter.count(Kind.COMPLETION, {"prompt": "x y"}) == 2


async def test_the_sandbox_holds(tmp_path: Path) -> None:
    folder = model(tmp_path, template="{{ messages.__class__.__mro__[1].__subclasses__() }}")
    assert await count(folder, "hello") is None


async def test_the_event_loop_goes_on_while_a_long_prompt_is_counted(tmp_path: Path) -> None:
    folder = model(tmp_path)
    counter = TokenCounter(lambda: [folder])
    await counter.count(Kind.COMPLETION, {"prompt": "the files are read now"})
    counting = asyncio.ensure_future(counter.count(Kind.COMPLETION, {"prompt": "one two " * 200_000}))
    turns = [time.perf_counter()]
    while not counting.done():
        await asyncio.sleep(0)
        turns.append(time.perf_counter())
    assert await counting == 400_000
    longest = max(after - before for before, after in pairwise(turns))
    assert longest < (turns[-1] - turns[0]) / 2, "one turn of the loop took nearly all of the time"

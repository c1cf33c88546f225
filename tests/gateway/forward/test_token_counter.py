"""Counting prompts: the files of a model, and those that cannot be counted."""

import asyncio
import json
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import BPE, WordLevel
from tokenizers.normalizers import Replace
from tokenizers.pre_tokenizers import ByteLevel, Metaspace, Whitespace
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer

from gateway.api.kinds import Kind
from gateway.cli.demo_model.corpus import TEXT
from gateway.forward import token_counter
from gateway.forward.body_workers import BodyWorkers
from gateway.forward.token_counter import (
    BESIDE,
    LONGEST,
    LOOKED_AT,
    SLICE,
    WHOLE,
    Count,
    Script,
    Templating,
    TokenCounter,
)

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


@pytest.fixture
def workers() -> Iterator[BodyWorkers]:
    pool = BodyWorkers()
    yield pool
    pool.close()


Of = Callable[[Path], TokenCounter]


@pytest.fixture
def of(workers: BodyWorkers) -> Of:
    return lambda folder: TokenCounter(lambda: [folder], workers)


Counting = Callable[..., Awaitable[int | None]]


@pytest.fixture
def count(of: Of) -> Counting:
    async def counted(folder: Path, *contents: str, **params: Any) -> int | None:
        messages = [{"role": "user", "content": content} for content in contents]
        return tokens(await of(folder).count(Kind.CHAT, {"messages": messages, **params}))

    return counted


def tokens(count: Count | None) -> int | None:
    assert count is None or count.exact
    return None if count is None else count.tokens


async def test_a_prompt_and_a_chat(tmp_path: Path, of: Of, count: Counting) -> None:
    folder = model(tmp_path)
    assert tokens(await of(folder).count(Kind.COMPLETION, {"prompt": "one two three"})) == 3
    assert await count(folder, "hello you") == 5  # begin user hello you assistant
    assert await count(folder, "hello you", "stop", "and more") == 5
    assert await count(folder, "hello", chat_template_kwargs={"loud": True}) == 5


async def test_arguments_of_calls_are_objects_to_a_template(tmp_path: Path, of: Of) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": '{"word": "x y z"}'}}
    messages = [{"role": "assistant", "content": "", "tool_calls": [call]}]
    assert tokens(await of(model(tmp_path)).count(Kind.CHAT, {"messages": messages})) == 6


async def test_a_template_and_variables_of_the_server(tmp_path: Path, workers: BodyWorkers) -> None:
    folder = model(tmp_path)
    told = Templating("{{ bos_token }}a {% if loud %}b c {% endif %}{{ more }}", {"loud": True, "more": "d"})
    counter = TokenCounter(lambda: [folder], workers, told)

    async def counted(**settings: Any) -> int | None:
        params = {"messages": [{"role": "user", "content": "hello"}], "chat_template_kwargs": settings}
        count = await counter.count(Kind.CHAT, params)
        return None if count is None else tokens(count)

    assert await counted() == 5
    assert await counted(loud=False) == 3, "a request goes first"
    assert await counted(more="d e f") == 7
    counter = TokenCounter(lambda: [folder], workers, Templating(variables={"tokenizer_kwargs": {}}))
    assert await counted() is None, "what a tokenizer makes of it is not known"


@pytest.mark.parametrize("name", ["chat_template", "max_length", "documents"])
async def test_what_is_no_variable_of_the_template_is_not_counted(tmp_path: Path, of: Of, name: str) -> None:
    counter = of(model(tmp_path))
    params: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}], "chat_template_kwargs": {name: 1}}
    assert await counter.count(Kind.CHAT, params) is None
    assert await counter.script(Kind.CHAT, params) is None
    assert await counter.count(Kind.CHAT, {**params, "chat_template_kwargs": {}}) is not None


async def test_a_tokenizer_that_comes_as_code_is_not_known(tmp_path: Path, workers: BodyWorkers) -> None:
    folder = model(tmp_path, auto_map={"AutoTokenizer": ["tokenizer.Own", None]})
    for own_code in (False, True):
        counter = TokenCounter(lambda: [folder], workers, Templating(own_code=own_code))
        assert (await counter.count(Kind.COMPLETION, {"prompt": "one"}) is None) is own_code


async def test_templates_in_a_file_of_their_own_and_by_name(tmp_path: Path, count: Counting) -> None:
    folder = model(tmp_path, template=[{"name": "tool_use", "template": "x"}, {"name": "default", "template": "a b"}])
    assert await count(folder, "hello") == 2
    (folder / "chat_template.jinja").write_text("a b c")
    assert await count(folder, "hello") == 3


async def test_what_a_template_refuses_is_not_counted_and_the_next_is(tmp_path: Path, of: Of) -> None:
    counter = of(model(tmp_path))
    assert await counter.count(Kind.CHAT, {"messages": [{"role": "user", "content": "bad"}]}) is None
    assert tokens(await counter.count(Kind.CHAT, {"messages": [{"role": "user", "content": "good"}]})) == 4


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: (folder / "tokenizer.json").write_text("{}"),
        lambda folder: (folder / "tokenizer_config.json").write_text('{"bos_token": "x"}'),
        lambda folder: (folder / "tokenizer_config.json").write_text('{"chat_template_type": "own"}'),
        lambda folder: (folder / "tokenizer_config.json").write_text('{"chat_template": "{% nonsense %}"}'),
    ],
)
async def test_files_that_cannot_be_used_are_read_once(tmp_path: Path, spoil: Any, of: Of) -> None:
    counter = of(tmp_path)
    spoil(model(tmp_path))
    for _ in range(2):
        assert await counter.count(Kind.COMPLETION, {"prompt": "x"}) is None
    model(tmp_path)
    assert await counter.count(Kind.COMPLETION, {"prompt": "x"}) is None


async def test_a_model_that_is_not_there_yet_is_looked_for_again(tmp_path: Path, of: Of) -> None:
    counter = of(tmp_path)
    assert await counter.count(Kind.COMPLETION, {"prompt": "x y"}) is None
    model(tmp_path)
    assert tokens(await counter.count(Kind.COMPLETION, {"prompt": "x y"})) == 2


async def test_the_sandbox_holds(tmp_path: Path, count: Counting) -> None:
    folder = model(tmp_path, template="{{ messages.__class__.__mro__[1].__subclasses__() }}")
    assert await count(folder, "hello") is None


async def test_the_event_loop_goes_on_while_a_long_prompt_is_counted(tmp_path: Path, of: Of) -> None:
    folder = model(tmp_path)
    counter = of(folder)
    await counter.count(Kind.COMPLETION, {"prompt": "the files are read now"})
    counting = asyncio.ensure_future(counter.count(Kind.COMPLETION, {"prompt": "one two " * 100_000}))
    turns = [time.perf_counter()]
    while not counting.done():
        await asyncio.sleep(0)
        turns.append(time.perf_counter())
    assert tokens(await counting) == 200_000
    longest = max(after - before for before, after in pairwise(turns))
    assert longest < (turns[-1] - turns[0]) / 2, "one turn of the loop took nearly all of the time"


# -- prompts that are too long -----------------------------------------------------------------------------------------


def byte_level(folder: Path) -> Path:
    """A token for each byte, and one for "aaaa"."""
    vocab = {char: i for i, char in enumerate(sorted(ByteLevel.alphabet()))} | {"aa": 256, "aaaa": 257}
    tokenizer = Tokenizer(BPE(vocab, [("a", "a"), ("aa", "aa")]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    return folder


async def counted(counter: TokenCounter, prompt: str, enough: int) -> Count | None:
    return await counter.count(Kind.COMPLETION, {"prompt": prompt}, enough)


async def test_a_prompt_longer_than_any_of_so_many_tokens_is_not_tokenized(tmp_path: Path, of: Of) -> None:
    counter = of(byte_level(tmp_path))
    assert await counted(counter, "a" * 4000, 1000) == Count(1000, exact=True), "the longest that fits"
    counter._model._tokenizer = None  # type: ignore[union-attr]
    assert await counted(counter, "a" * 4001, 1000) == Count(1001, at_least=True)


async def test_counting_stops_where_a_prompt_is_too_long(tmp_path: Path, of: Of) -> None:
    counter = of(model(tmp_path))
    long = "one two " * (2 * SLICE)
    count = await counted(counter, long, 100)
    assert count is not None
    assert count.at_least
    assert SLICE // 5 < count.tokens < SLICE // 2, "one slice"
    assert await counted(counter, long, 4 * SLICE + 1) == Count(4 * SLICE, exact=True)


async def test_a_lower_bound_is_one(tmp_path: Path, of: Of) -> None:
    """One word without end is one unknown token, and blanks are none."""
    counter = of(model(tmp_path))
    for prompt in ("x" * 10 * SLICE, " " * 10 * SLICE):
        count = await counted(counter, prompt, 20)
        assert count is not None
        assert count.exact


async def test_a_text_too_long_for_one_call_is_counted_in_slices(tmp_path: Path, of: Of) -> None:
    prompt = "one two " * (WHOLE // 4)
    count = await counted(of(model(tmp_path)), prompt, 10**9)
    assert count is not None
    assert not count.exact
    assert not count.at_least
    assert count.tokens == pytest.approx(WHOLE // 2, rel=0.01)


async def test_of_a_text_that_decides_nothing_only_the_beginning_is_looked_at(tmp_path: Path, of: Of) -> None:
    """Blanks are no tokens here; words come where nobody looks."""
    counter = of(model(tmp_path))
    assert await counted(counter, " " * LOOKED_AT + "one two " * LOOKED_AT, 20) == Count(0)
    count = await counted(counter, "one " + " " * 96 + "two " * (LOOKED_AT // 2), 10**9)
    assert count is not None
    assert not count.exact
    assert not count.at_least


async def test_truncation_and_padding_in_the_file_do_not_count(tmp_path: Path, of: Of) -> None:
    tokenizer = Tokenizer.from_file(str(model(tmp_path) / "tokenizer.json"))
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=5)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    counter = of(tmp_path)
    assert tokens(await counter.count(Kind.COMPLETION, {"prompt": "one"})) == 1
    assert tokens(await counter.count(Kind.COMPLETION, {"prompt": "one " * 9})) == 9


async def test_one_prompt_is_counted_at_a_time(tmp_path: Path, workers: BodyWorkers) -> None:
    inside, most, lock = 0, 0, threading.Lock()

    def folders() -> list[Path]:
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        time.sleep(0.01)  # long enough for another thread to come in
        with lock:
            inside -= 1
        return []

    counters = [TokenCounter(folders, workers) for _ in range(4)]
    assert await asyncio.gather(*(one.count(Kind.COMPLETION, {"prompt": "x"}) for one in counters)) == [None] * 4
    assert most == 1


# -- cuts --------------------------------------------------------------------------------------------------------------


def like_qwen() -> Tokenizer:
    """As GPT-2, Llama 3 and Qwen; its words are trained on the text of the demo model."""
    return _trained(Tokenizer(BPE()), ByteLevel(add_prefix_space=False), initial_alphabet=sorted(ByteLevel.alphabet()))


def like_llama() -> Tokenizer:
    """As Llama 2 and Mistral."""
    return _trained(Tokenizer(BPE(unk_token="<unk>")), Metaspace(prepend_scheme="first"))  # noqa: S106


def like_gemma() -> Tokenizer:
    """As Gemma: no pre-tokenizer, blanks are written as letters."""
    tokenizer = Tokenizer(BPE(unk_token="<unk>"))  # noqa: S106
    tokenizer.normalizer = Replace(" ", "▁")
    return _trained(tokenizer, None)


def _trained(tokenizer: Tokenizer, pre_tokenizer: Any, **options: Any) -> Tokenizer:
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    special = ["<unk>", "<|user|>", "<|end|>"]
    trainer = BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False, **options)
    tokenizer.train_from_iterator(TEXT.split("\n") if pre_tokenizer is None else [TEXT], trainer)
    return tokenizer


KINDS = {"byte level": like_qwen(), "metaspace": like_llama(), "unsplit": like_gemma()}
WORDS = (
    "river",
    " bridge",
    " lamp",
    " 17",
    "3.14",
    ", ",
    ".\n",
    "\n\n",
    "    ",
    "\t",
    "def f(x):",
    "}",
    '"key": ',
    "it's",
)
ODD = ("<|user|>", "<|end|>", "雪の朝", "\uff0c然后", "é", "👍🏽", "_", "=" * 9, "0" * 30, " a b")
PIECES = st.sampled_from(WORDS + ODD)


def of_tokenizer(tokenizer: Tokenizer, folder: Path, template: str = TEMPLATE) -> Path:
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {
        name: token_counter._Model(of_tokenizer(tokenizer, tmp_path_factory.mktemp("model")))
        for name, tokenizer in KINDS.items()
    }


@pytest.mark.parametrize("kind", KINDS)
@given(pieces=st.lists(PIECES, min_size=1, max_size=600), share=st.floats(0.0, 1.0))
@settings(max_examples=40)
def test_the_tokens_before_a_cut_are_those_of_the_whole(
    kind: str, models: dict[str, Any], pieces: list[str], share: float
) -> None:
    text = "".join(pieces)
    whole: list[int] = KINDS[kind].encode(text, add_special_tokens=False).ids
    near = round(share * len(text))
    cut = models[kind].cut(text, near)
    if cut is None:
        assert len(text) - near < 3 * BESIDE, "there is a place, if not at the end"
        return
    assert near <= cut.at < near + BESIDE
    before: list[int] = KINDS[kind].encode(text[: cut.at], add_special_tokens=False).ids
    assert before == whole[: len(before)]
    assert cut.token == whole[len(before)]


async def test_a_script_is_read_as_the_chat(tmp_path: Path, of: Of) -> None:
    """A template writes the first token itself; in front of a plain prompt the tokenizer adds it."""
    tokenizer = like_qwen()
    template = "<|user|>{% for m in messages %}{{ m.content }}<|end|>{% endfor %}"
    params = {"messages": [{"role": "user", "content": "the river and the bridge"}]}
    chat = "<|user|>the river and the bridge<|end|>"
    script = await of(of_tokenizer(tokenizer, tmp_path, template)).script(Kind.CHAT, params)
    assert script == Script(chat, len(tokenizer.encode(chat).ids), exact=True)

    tokenizer.post_processor = TemplateProcessing(single="<|user|> $A", special_tokens=[("<|user|>", 1)])
    script = await of(of_tokenizer(tokenizer, tmp_path, template)).script(Kind.CHAT, params)
    assert script is not None
    assert script.text == chat.removeprefix("<|user|>")
    assert tokenizer.encode(script.text).ids == tokenizer.encode(chat, add_special_tokens=False).ids

    other = of_tokenizer(tokenizer, tmp_path, template.removeprefix("<|user|>"))
    assert await of(other).script(Kind.CHAT, params) is None, "a plain prompt would begin with one token more"

    tokenizer.post_processor = TemplateProcessing(single="$A <|end|>", special_tokens=[("<|end|>", 2)])
    assert await of(of_tokenizer(tokenizer, tmp_path, template)).script(Kind.CHAT, params) is None


async def test_no_script_of_what_cannot_be_written(tmp_path: Path, of: Of) -> None:
    counter = of(model(tmp_path))
    assert await counter.script(Kind.CHAT, {"messages": [{"role": "user", "content": "bad"}]}) is None
    assert await counter.script(Kind.COMPLETION, {"prompt": "x " * (LONGEST // 2 + 1)}) is None
    assert await counter.script(Kind.COMPLETION, {"prompt": "one two"}) == Script("one two", 2, exact=True)
    assert await of(tmp_path / "nowhere").script(Kind.COMPLETION, {"prompt": "one two"}) is None


async def test_where_no_cut_is_possible_there_is_none(tmp_path: Path, of: Of) -> None:
    """A text of one token."""
    tokenizer = Tokenizer(WordLevel({"[UNK]": 0}, unk_token="[UNK]"))  # noqa: S106
    counter = of(of_tokenizer(tokenizer, tmp_path))
    assert await counter.cut("x" * 5000, 1000) is None

"""Engine fixes in real processes: the same answers, and nothing that ends or holds up a server."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from backends.instrument.instrument import FIXES
from tests.integration.harness import Gateway, launched, wait_until
from tests.integration.test_live_cached_prompts import COMPLETIONS, OFF, hybrid
from tests.integration.wire import Answer, Json, chat, whole

pytestmark = pytest.mark.slow

WORDS = [
    "the",
    "river",
    "runs",
    "past",
    "the",
    "old",
    "mill",
    "and",
    "the",
    "town",
    "has",
    "a",
    "lamp",
    "and",
    "a",
    "bridge",
]


@pytest.fixture(scope="module")
def gateway(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """The caches of the model cannot be trimmed; its template can open a thought at the end of a prompt."""
    folder = tmp_path_factory.mktemp("fixes")
    base: Json = {"model": str(hybrid(tiny_model, folder / "hybrid")), "resume": "off"}
    trimmed: Json = {"model": str(tiny_model), "resume": "off"}
    models = {"fixed": base, "plain": {**base, "engine_fixes": "off"}, "trimmed": trimmed}
    with launched({"models": models}, folder) as running:
        yield running


def fixes(gateway: Gateway, model: str) -> Json:
    def told() -> Json:
        report: Json | None = gateway.http.get("/api/status").json()["models"][model]["backends"][0]["report"]
        return {} if report is None else report["fixes"]

    return wait_until(told)


def text(number: int, start: int) -> str:
    return " ".join(WORDS[(start + i * i) % len(WORDS)] for i in range(number))


def cached(answer: Answer) -> int:
    return int(answer.body["usage"]["prompt_tokens_details"]["cached_tokens"])


def agent(gateway: Gateway, model: str, last: str) -> list[Answer]:
    """A conversation that goes on with tool calls; without a thought, so that each prompt ends in the tail of one."""
    messages: list[Json] = [{"role": "system", "content": text(40, 0)}, {"role": "user", "content": text(200, 1)}]
    answers = []
    for turn in range(4):
        answers.append(gateway.ask({"model": model, "messages": messages, "temperature": 0, "max_tokens": 8, **OFF}))
        call = {"id": "c", "type": "function", "function": {"name": "look", "arguments": "{}"}}
        said: Json = {"role": "assistant", "content": text(5, turn), "tool_calls": [call]}
        heard: Json = {"role": last, "content": text(30, turn)}
        messages += [said, heard | ({"tool_call_id": "c"} if last == "tool" else {})]
    return answers


def pid(gateway: Gateway, model: str) -> int:
    return int(gateway.backend(f"{model}:0")["pid"])


def test_which_are_applied(gateway: Gateway) -> None:
    titles = [fix.title for fix in FIXES]
    assert fixes(gateway, "fixed") == dict.fromkeys(titles, "on")
    assert fixes(gateway, "plain") == dict.fromkeys(titles, "off")


def test_tool_turns_find_the_turn_before(gateway: Gateway) -> None:
    """A window that is full: without the fix all find the first turn at most."""
    fixed, plain = agent(gateway, "fixed", "tool"), agent(gateway, "plain", "tool")
    assert all(map(whole, [*fixed, *plain]))
    assert [answer.text for answer in fixed] == [answer.text for answer in plain]
    sizes = [answer.body["usage"]["prompt_tokens"] for answer in fixed]
    assert [cached(answer) for answer in fixed[2:]] == [size - 2 for size in sizes[1:-1]]
    assert [cached(answer) for answer in plain[2:]] == [cached(plain[1])] * 2


@pytest.mark.parametrize("model", ["fixed", "trimmed"])
def test_a_prompt_that_is_cached_whole_is_answered(gateway: Gateway, model: str) -> None:
    """By the only replica, in its batch."""
    fixes(gateway, model)
    before = pid(gateway, model)

    def complete(prompt: str, model: str = model) -> Answer:
        return gateway.ask({"model": model, "prompt": prompt, "temperature": 0, "max_tokens": 6}, COMPLETIONS)

    first = complete(text(20, 2))
    continued = f"{text(20, 2)} {first.text}"
    answers = [complete(continued), complete(continued), complete(text(19, 2))]
    if model == "fixed":
        answers += [gateway.ask(chat(text(9, 3), model, max_tokens=4, temperature=0, **more)) for more in (OFF, {})]
        fresh = complete(continued, "plain")
        assert fresh.text == answers[0].text, "as by a server that has nothing cached"
    else:
        assert cached(answers[0]) == answers[0].body["usage"]["prompt_tokens"] - 2, "it is cached whole"
    assert all(map(whole, answers))
    assert "x-gateway-normalized" not in answers[0].headers
    assert answers[0].text == answers[1].text != ""
    assert pid(gateway, model) == before


def test_values_of_samplers_are_rounded(gateway: Gateway) -> None:
    answer = gateway.ask(chat("Once", "fixed", max_tokens=1, temperature=0.70001, top_p=0.95))
    assert whole(answer)
    assert answer.headers["x-gateway-normalized"] == "temperature"

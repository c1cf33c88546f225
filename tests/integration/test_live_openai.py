"""openai-python against two real replicas: what it gets, and what it raises when one of them dies."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from signal import SIGKILL

import openai
import pytest
from openai._legacy_response import LegacyAPIResponse
from openai.types.chat import ChatCompletion, ChatCompletionMessageParam

from tests.integration.harness import QUICK_RESTART, Gateway, launched, wait_until

pytestmark = pytest.mark.slow

LONG = 3000  # tokens: some seconds


@pytest.fixture(scope="module")
def gateway(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    tiny = {"model": str(tiny_model), "replicas": 2, "aliases": ["gpt-4o-mini"], "resume": "off"}
    single = {"model": str(tiny_model), "resume": "off", "restart": {"min_backoff": "1s", "max_failures": 100}}
    config = {"models": {"tiny": {**tiny, "restart": QUICK_RESTART}, "single": single}}
    with launched(config, tmp_path_factory.mktemp("openai")) as running:
        yield running


@pytest.fixture
def client(gateway: Gateway) -> Iterator[openai.OpenAI]:
    gateway.await_health()
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


def busy_backend(gateway: Gateway, model: str) -> str:
    """The id of the one that has a request in flight."""

    def found() -> str | None:
        backends = gateway.health()["models"][model]["backends"]
        return next((str(b["id"]) for b in backends if b["inflight"]), None)

    return wait_until(found) or ""


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="gpt-4o-mini", max_tokens=12, messages=[{"role": "user", "content": "hello"}]
    )
    assert answer.object == "chat.completion"
    assert answer.model == "gpt-4o-mini"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 12


def test_stream_says_what_the_answer_says(client: openai.OpenAI) -> None:
    messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hello"}]
    answer = client.chat.completions.create(model="tiny", max_tokens=12, messages=messages)
    text, roles, finish = "", [], []
    with client.chat.completions.create(model="tiny", max_tokens=12, messages=messages, stream=True) as stream:
        for chunk in stream:
            assert chunk.usage is None  # nobody asked for it
            assert chunk.object == "chat.completion.chunk"
            choice = chunk.choices[0]
            text += choice.delta.content or ""
            roles += [choice.delta.role] if choice.delta.role else []
            finish += [choice.finish_reason] if choice.finish_reason else []
    assert text == answer.choices[0].message.content
    assert roles == ["assistant"]
    assert finish == ["length"]


def test_usage_comes_last_for_who_asks(client: openai.OpenAI) -> None:
    with client.chat.completions.create(
        model="tiny",
        max_tokens=5,
        messages=[{"role": "user", "content": "hello"}],
        stream=True,
        stream_options={"include_usage": True},
    ) as stream:
        chunks = list(stream)
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 5


def test_stream_helper(client: openai.OpenAI) -> None:
    messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hello"}]
    with client.chat.completions.create(model="tiny", max_tokens=30, messages=messages, stream=True) as chunks:
        words = [chunk.choices[0].delta.content or "" for chunk in chunks]
    stop = words[10]  # one token, so that mlx_lm.server finds it; the helper takes finish_reason "length" for an error
    assert stop
    with client.chat.completions.stream(model="tiny", max_tokens=30, messages=messages, stop=[stop]) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.role == "assistant"
    assert final.choices[0].finish_reason == "stop"
    assert final.choices[0].message.content == "".join(words[: words.index(stop)])


def test_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt="hello", max_tokens=8)
    assert answer.object == "text_completion"
    assert answer.choices[0].text
    with client.completions.create(model="tiny", prompt="hello", max_tokens=8, stream=True) as stream:
        assert "".join(chunk.choices[0].text for chunk in stream) == answer.choices[0].text


def test_models(client: openai.OpenAI) -> None:
    assert {model.id for model in client.models.list()} >= {"tiny", "single"}
    assert client.models.retrieve("tiny").id == "tiny"


def test_unknown_model(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-9", messages=[{"role": "user", "content": "hello"}])
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"
    assert "single" in caught.value.message
    assert caught.value.request_id


def test_kill_in_mid_stream(client: openai.OpenAI, gateway: Gateway) -> None:
    with client.chat.completions.create(
        model="tiny", max_tokens=LONG, messages=[{"role": "user", "content": "hello"}], stream=True
    ) as stream:
        next(iter(stream))
        gateway.signal_backend(busy_backend(gateway, "tiny"), SIGKILL)
        with pytest.raises(openai.APIError) as caught:
            list(stream)
    assert caught.value.code == "backend_crashed"
    assert caught.value.type == "server_error"
    assert isinstance(caught.value.body, dict)
    assert caught.value.body["request_id"]
    assert caught.value.body["backend"].startswith("tiny:")


def test_kill_before_the_answer_goes_unnoticed(client: openai.OpenAI, gateway: Gateway) -> None:
    """A request that is not streamed has seen nothing until it has all."""

    def ask() -> LegacyAPIResponse[ChatCompletion]:
        messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hello"}]
        return client.chat.completions.with_raw_response.create(model="tiny", max_tokens=2000, messages=messages)

    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask)
        gateway.signal_backend(busy_backend(gateway, "tiny"), SIGKILL)
        raw = asked.result(60)
    assert raw.headers["x-gateway-attempts"] == "2"
    assert raw.parse().choices[0].finish_reason == "length"


def test_a_pause_longer_than_the_client_waits(client: openai.OpenAI, gateway: Gateway) -> None:
    """The SDK sends its timeout along, so that it gets the cause in time."""
    gateway.signal_backend("single:0", SIGKILL)
    gateway.await_state("single:0", "backoff")
    with pytest.raises(openai.InternalServerError) as caught:
        client.with_options(timeout=1.0).chat.completions.create(
            model="single", messages=[{"role": "user", "content": "hello"}]
        )
    error = caught.value
    assert error.status_code == 503
    assert error.code == "model_unavailable"
    assert error.request_id
    assert isinstance(error.body, dict)
    assert error.body["request_id"] == error.request_id
    assert "killed" in error.message
    assert 1 <= int(error.response.headers["retry-after"]) <= 59

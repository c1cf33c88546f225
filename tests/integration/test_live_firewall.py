"""Bodies against the real mlx_lm.server, through the gateway: after each of them the same process still answers.

Without the gateway a good part of the table ends the server's generation thread, or the process, for good. What is let
through has to be answered; what is refused has to name the field.
"""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.cli.demo_model.shape import VOCABULARY as VOCAB
from tests.integration.harness import Gateway, launched
from tests.integration.wire import CHAT, Json

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

COMPLETION = "/v1/completions"

HI = [{"role": "user", "content": "hi"}]
PIXEL = "data:image/png;base64,iVBORw0KGgo="
HUGE = 10**400


class Case(NamedTuple):
    """``param``: what a refusal names; None with a 400 = the body as a whole. ``headers`` of the request."""

    body: bytes
    status: int = 200
    param: str | None = None
    path: str = CHAT
    headers: dict[str, str] = {}  # noqa: RUF012  never changed


def chat(status: int = 200, param: str | None = None, /, **fields: Any) -> Case:
    body: Json = {"messages": HI, "max_tokens": 2, **fields}
    return Case(json.dumps(body).encode(), status, param)


def plain(status: int = 200, param: str | None = None, /, **fields: Any) -> Case:
    body: Json = {"prompt": "hi", "max_tokens": 2, **fields}
    return Case(json.dumps(body).encode(), status, param, COMPLETION)


def both(status: int = 200, param: str | None = None, /, **fields: Any) -> list[Case]:
    return [chat(status, param, **fields), plain(status, param, **fields)]


def refused(name: str, *values: Any) -> list[Case]:
    """By both endpoints, under its own name."""
    return [case for value in values for case in both(400, name, **{name: value})]


def messages(*items: Any) -> list[Any]:
    return list(items)


def user(content: Any, **more: Any) -> Json:
    return {"role": "user", "content": content, **more}


def called(arguments: Any, **more: Any) -> list[Json]:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": arguments, **more}}
    return [user("hi"), {"role": "assistant", "content": None, "tool_calls": [call]}]


def tool(**function: Any) -> Json:
    return {"type": "function", "function": function}


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


# -- what a client says, and means ------------------------------------------------------------------------------------

NULLS = [
    "stream",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
    "logprobs",
    "top_logprobs",
    "max_tokens",
    "max_completion_tokens",
    "xtc_probability",
    "xtc_threshold",
    "num_draft_tokens",
    "repetition_context_size",
    "model",
    "seed",
    "stop",
    "logit_bias",
    "n",
    "tools",
    "tool_choice",
    "stream_options",
    "response_format",
    "user",
    "adapters",
    "draft_model",
    "role_mapping",
]

TAKEN: list[Case] = [
    *(case for name in NULLS for case in both(**{name: None})),
    *both(max_tokens=3.0),
    *both(max_tokens=-1),
    chat(max_completion_tokens=2, max_tokens=None),
    *both(top_k=-1),
    *both(top_k=40.0, temperature=1),
    *both(top_k=VOCAB, temperature=1),
    *both(top_k=VOCAB + 1, temperature=0.7, seed=3),
    *both(top_k=2**31 - 1, temperature=1),
    *both(seed=-1, temperature=1),
    *both(seed=1.0, temperature=1),
    *both(seed=2**63, temperature=1),
    *both(seed=-(2**62)),
    *both(temperature=1e-30),
    *both(temperature=100),
    *both(top_p=0, temperature=1),
    *both(min_p=1, temperature=1),
    *both(min_p=0.5, top_p=0.5, top_k=5, temperature=1),
    *both(xtc_probability=1, xtc_threshold=0, temperature=1),
    *both(xtc_probability=0.9, xtc_threshold=0.9, temperature=1),
    *both(xtc_probability=1, xtc_threshold=0.1, temperature=1, seed=4),
    *both(presence_penalty=2, frequency_penalty=-2, repetition_penalty=1.3),
    *both(repetition_penalty=0.01, repetition_context_size=1),
    *both(repetition_penalty=1.1, repetition_context_size=10**9),
    *both(presence_penalty=1, presence_context_size=0),
    *both(frequency_penalty=1, frequency_context_size=0),
    *both(repetition_penalty=1.5, repetition_context_size=0),
    *both(num_draft_tokens=3),
    *both(logprobs=True),
    *both(logprobs=True, top_logprobs=20),
    *both(logprobs=True, top_logprobs=0),
    plain(logprobs=5),
    plain(logprobs=0),
    chat(logprobs=True, stream=True),
    *both(stop=""),
    *both(stop=["", "a"]),
    *both(stop=["a"] * 100),
    *both(stop="日本"),
    *both(stop=["\ud83d"]),
    *both(logit_bias={}),
    *both(logit_bias={"1": 100}),
    *both(logit_bias={str(VOCAB - 1): -100, "0": 100}),
    *both(logit_bias={"007": 1}),
    *both(n=3),
    *both(n=1.0),
    plain(prompt=["hi"]),
    plain(prompt=["hi", "you"]),
    plain(prompt=["hi", "you"], stream=True, n=2),
    plain(prompt="\ud83d half of an emoji"),
    plain(prompt="\0"),
    plain(prompt="x" * 3000),
    *both(stream=True, stream_options={}),
    *both(stream=True, stream_options={"include_usage": False}),
    *both(stream=True, stream_options={"include_usage": True, "other": 1}),
    *both(stream_options={"include_usage": True}),
    *both(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}),
    *both(response_format=5),
    chat(tool_choice="required", tools=[tool(name="f")]),
    chat(tool_choice="none", tools=[tool(name="f")]),
    chat(tool_choice={"type": "function", "function": {"name": "f"}}, tools=[tool(name="f", strict=True)]),
    chat(tools=[]),
    chat(tools=[tool(name="f", parameters=None, description=None)]),
    chat(tools=[tool(name="f", parameters={"type": "object", "properties": {"a": True}})]),
    *both(adapters="/etc/passwd"),
    *both(draft_model="org/other"),
    *both(role_mapping={"user": "x"}),
    *both(best_of=5, echo=True, suffix="x", user="me", metadata={"a": nested(30)}, store=True, service_tier="auto"),
    *both(functions=None, parallel_tool_calls=False, reasoning_effort="high", repeat_penalty=2),
    chat(chat_template_kwargs={"enable_thinking": False}),
    chat(
        chat_template_kwargs={
            "chat_template": "{% for a in range(10**9) %}{% for b in range(10**9) %}x{% endfor %}{% endfor %}"
        }
    ),
    chat(chat_template_kwargs={}),
    chat(messages=messages({"role": "developer", "content": "be brief"}, user("hi"))),
    chat(messages=messages(user("hi"), {"role": "system", "content": "late"}, user("you"))),
    chat(messages=messages({"role": "system", "content": "a"}, {"role": "system", "content": "b"}, user("hi"))),
    chat(messages=messages({"role": "system", "content": "alone"})),
    chat(messages=messages({"role": "assistant", "content": "I begin"})),
    chat(messages=messages(user([{"type": "input_text", "text": "hi"}, "you", {"type": "text", "text": ""}]))),
    chat(messages=messages(user([]))),
    chat(messages=messages(user(""))),
    chat(messages=messages(user("half \ud83d"))),
    chat(messages=messages(user("hi", name="me", extra={"deep": nested(20)}))),
    chat(messages=messages(user("hi"), {"role": "tool", "content": None, "tool_call_id": "c1"})),
    chat(messages=messages(user("hi"), {"role": "function", "name": "f", "content": "x"})),
    chat(messages=called("{}")),
    chat(messages=called("")),
    chat(messages=called(None)),
    chat(messages=called({"a": [1, {"b": None}]})),
    chat(messages=called('{"a": 1e308}')),
    chat(messages=messages(user("hi"), {"role": "assistant", "content": None, "tool_calls": []})),
    chat(messages=messages(user("hi"), {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]})),
    chat(messages=messages(*[user("hi"), {"role": "assistant", "content": "yo"}] * 40)),
    chat(unknown_field={"a": nested(40)}, another=[1] * 1000),
    Case(b'\xef\xbb\xbf{"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}'),
    Case(b'{"max_tokens": 9, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}'),
    Case(b'{"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}', path="/chat/completions/"),
    Case(b'{"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}', path=f"{CHAT}/?api-version=1"),
    Case(b'{"prompt": "hi", "max_tokens": 1}', path="/completions"),
    Case(gzip.compress(b'{"prompt": "hi", "max_tokens": 1}'), path=COMPLETION, headers={"content-encoding": "gzip"}),
    Case(b'{"prompt": "hi", "max_tokens": 1}', path=COMPLETION, headers={"content-type": "text/plain"}),
    Case(b'{"prompt": "hi", "max_tokens": 1}', path=COMPLETION, headers={"x-stainless-retry-count": "2"}),
]

# -- what nobody can make sense of, or survive ------------------------------------------------------------------------

REFUSED: list[Case] = [
    *refused("max_tokens", 0, -2, 3.5, "3", True, [1], {}, HUGE),
    *refused("temperature", "0.7", -1, 101, True, [0.5], HUGE, -HUGE),
    *refused("top_p", 1.1, -0.1, "x", False),
    *refused("top_k", -2, 40.5, "40", True),
    *refused("min_p", 2, -1, {}),
    *refused("xtc_probability", 1.5, -1, "1"),
    *refused("xtc_threshold", 1.5, True),
    *refused("presence_penalty", HUGE, 101, "1"),
    *refused("frequency_penalty", -HUGE, [1]),
    *refused("repetition_penalty", -1, 0.001, HUGE, "1"),
    *refused("repetition_context_size", -1, 1.5, "20"),
    *refused("top_logprobs", -2, "5", 1.5),
    *refused("seed", "1", 1.5, True, HUGE, [1]),
    *refused("stop", 5, {}, True, ["x" * 5000], ["a"] * 200),
    *both(400, "stop[0]", stop=[1]),
    *both(400, "stop[1]", stop=["a", None]),
    *refused("logit_bias", {str(VOCAB): 1}, {"99999999": -100}, {"a": 1}, {"-1": 1}, [1], "x", 5),
    *both(400, "logit_bias.1", logit_bias={"1": "x"}),
    *both(400, "logit_bias.1", logit_bias={"1": 101}),
    *refused("n", 0, -1, 17, 1.5, "2", True),
    *refused("stream", "true", 1, []),
    *refused("stream_options", [], True),
    *refused("model", 5, [], {}),
    *refused("num_draft_tokens", -1, "3"),
    plain(400, "prompt", prompt=""),
    plain(400, "prompt", prompt=[]),
    plain(400, "prompt", prompt=[1, 2, 3]),
    plain(400, "prompt", prompt=[[1, 2], [3]]),
    plain(400, "prompt[1]", prompt=["a", ""]),
    plain(400, "prompt", prompt=None),
    plain(400, "prompt", prompt=5),
    plain(400, "prompt", prompt=["a"] * 17),
    plain(400, "logprobs", logprobs=-1),
    plain(400, "logprobs", logprobs="5"),
    chat(400, "messages", messages=[]),
    chat(400, "messages", messages=None),
    chat(400, "messages", messages="hi"),
    chat(400, "messages", messages={"role": "user"}),
    chat(400, "messages[0]", messages=["hi"]),
    chat(400, "messages[0]", messages=[None]),
    chat(400, "messages[0].role", messages=[{"content": "hi"}]),
    chat(400, "messages[0].role", messages=[{"role": "root", "content": "hi"}]),
    chat(400, "messages[0].role", messages=[{"role": ["user"], "content": "hi"}]),
    chat(400, "messages[0].content", messages=[user(None)]),
    chat(400, "messages[0].content", messages=[user(5)]),
    chat(400, "messages[0].content", messages=[user({"text": "hi"})]),
    chat(400, "messages[0].content[0].type", messages=[user([{"type": "image_url", "image_url": {"url": PIXEL}}])]),
    chat(
        400,
        "messages[0].content[0].type",
        messages=[user([{"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/"}}])],
    ),
    chat(400, "messages[0].content[0].type", messages=[user([{"type": "file", "file": {}}])]),
    chat(400, "messages[0].content[0].type", messages=[user([{"text": "hi"}])]),
    chat(400, "messages[0].content[0].text", messages=[user([{"type": "text", "text": 5}])]),
    chat(400, "messages[0].content[0]", messages=[user([5])]),
    chat(400, "messages[1].tool_calls[0].function.arguments", messages=called("{")),
    chat(400, "messages[1].tool_calls[0].function.arguments", messages=called("[1]")),
    chat(400, "messages[1].tool_calls[0].function.arguments", messages=called(5)),
    chat(400, "messages[1].tool_calls[0].function.arguments", messages=called("[" * 5000)),
    chat(400, "messages[1].tool_calls[0].function.name", messages=called("{}", name="")),
    chat(400, "messages[1].tool_calls[0].function.name", messages=called("{}", name=5)),
    chat(400, "messages[0].tool_calls", messages=[{"role": "assistant", "content": "x", "tool_calls": "f"}]),
    chat(400, "messages[0].tool_calls[0]", messages=[{"role": "assistant", "content": "x", "tool_calls": ["f"]}]),
    chat(
        400,
        "messages[0].function_call",
        messages=[{"role": "assistant", "content": "x", "function_call": {"name": "f"}}],
    ),
    chat(400, "functions", functions=[{"name": "f"}]),
    chat(400, "tools", tools={}),
    chat(400, "tools[0]", tools=["f"]),
    chat(400, "tools[0].type", tools=[{"type": "web_search"}]),
    chat(400, "tools[0].function", tools=[{"type": "function"}]),
    chat(400, "tools[0].function.name", tools=[tool()]),
    chat(400, "tools[0].function.parameters", tools=[tool(name="f", parameters=[])]),
    chat(400, "tools[0].function.parameters.properties", tools=[tool(name="f", parameters={"properties": 5})]),
    chat(400, "tools", tools=[tool(name="f", parameters={"a": nested(100)})]),
    chat(400, "tools", tools=[tool(name="f")] * 600),
    chat(400, "chat_template_kwargs", chat_template_kwargs=[]),
    chat(400, "chat_template_kwargs.tokenize", chat_template_kwargs={"tokenize": False}),
    chat(400, "chat_template_kwargs.tools", chat_template_kwargs={"tools": []}),
    chat(400, "chat_template_kwargs.add_generation_prompt", chat_template_kwargs={"add_generation_prompt": False}),
    chat(400, "chat_template_kwargs.x", chat_template_kwargs={"x": {"deep": 1}}),
    chat(400, "chat_template_kwargs.__class__", chat_template_kwargs={"__class__": 1}),
    Case(b"", 400),
    Case(b"{", 400),
    Case(b"[]", 400),
    Case(b"null", 400),
    Case(b'"hi"', 400),
    Case(b"5", 400),
    Case(b"\xff\xfe{}", 400),
    Case(b'{"messages": [{"role": "user", "content": "\xff"}]}', 400),
    Case(b"[" * 100_000, 400),
    Case(b'{"a":' * 100_000, 400),
    Case(b'{"messages": [{"role": "user", "content": "hi"}], "temperature": NaN}', 400, "temperature"),
    Case(b'{"messages": [{"role": "user", "content": "hi"}], "temperature": Infinity}', 400, "temperature"),
    Case(b'{"prompt": "hi", "top_p": -Infinity}', 400, "top_p", COMPLETION),
    Case(b'{"prompt": "hi", "presence_penalty": 1e400}', 400, "presence_penalty", COMPLETION),
    Case(b'{"prompt": "hi"', 400, None, COMPLETION),
    Case(b"prompt=hi", 400, None, COMPLETION),
    Case(b'{"prompt": "hi", "model": "gpt-4o"}', 404, "model", COMPLETION),
    Case(b'{"prompt": "hi", "model": "../../etc"}', 404, "model", COMPLETION),
    Case(b"x" * (1 << 20), 413),
    Case(gzip.compress(b" " * (1 << 24)), 413, None, CHAT, {"content-encoding": "gzip"}),
    Case(b"{}", 400, None, CHAT, {"content-encoding": "gzip"}),
    Case(b"{}", 415, None, CHAT, {"content-encoding": "br"}),
    Case(b"{}", 415, None, CHAT, {"content-type": "multipart/form-data; boundary=x"}),
]


class Witness:
    """That the one process is still the one, and still answers."""

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway
        self.pid = gateway.backend("tiny:0")["pid"]
        self.http = httpx.Client(base_url=gateway.url, timeout=60)

    def send(self, case: Case) -> httpx.Response:
        return self.http.post(case.path, content=case.body, headers=case.headers)

    def testify(self, about: object) -> None:
        answer = self.http.post(CHAT, json={"messages": HI, "max_tokens": 1})
        assert answer.status_code == 200, f"{about}: {answer.text}"
        assert answer.json()["usage"]["completion_tokens"] == 1
        told = self.gateway.backend("tiny:0")
        assert (told["pid"], told["state"], told["restarts"]) == (self.pid, "ready", 0), about


@pytest.fixture(scope="module")
def witness(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Witness]:
    config: Json = {
        "server": {"max_body": 900_000},
        "models": {"tiny": {"model": str(tiny_model), "server_args": {"max-tokens": 3}}},
    }
    with launched(config, tmp_path_factory.mktemp("firewall")) as gateway:
        witness = Witness(gateway)
        yield witness
        witness.http.close()


def test_the_table_is_long_enough() -> None:
    assert len({(case.body, case.path, tuple(case.headers.items())) for case in TAKEN + REFUSED}) >= 150


def test_what_is_taken_is_answered(witness: Witness) -> None:
    for case in TAKEN:
        answer = witness.send(case)
        about = f"{case.body[:300]!r} -> {answer.status_code} {answer.text[:500]}"
        assert answer.status_code == 200, about
        if answer.headers["content-type"].startswith("text/event-stream"):
            assert answer.text.endswith("data: [DONE]\n\n"), about
            assert '"error"' not in answer.text, about
        else:
            assert all(choice["finish_reason"] for choice in answer.json()["choices"]), about
        witness.testify(about)


def test_what_is_refused_names_the_field(witness: Witness) -> None:
    for case in REFUSED:
        answer = witness.send(case)
        about = f"{case.body[:300]!r} -> {answer.status_code} {answer.text[:500]}"
        assert answer.status_code == case.status, about
        error = answer.json()["error"]
        assert error["param"] == case.param, about
        assert error["message"], about
        assert "x-gateway-backend" not in answer.headers or case.param == "logit_bias", about
        witness.testify(about)


# -- and whatever else JSON can say -----------------------------------------------------------------------------------

FIELDS = sorted({*NULLS, "messages", "prompt", "chat_template_kwargs", "presence_context_size", "functions", "min_p"})
ODD: st.SearchStrategy[Any] = st.sampled_from(
    [
        0,
        1,
        -1,
        2**31,
        2**63,
        2**64,
        0.5,
        1e308,
        -0.0,
        "",
        "a",
        "\0",
        "\ud800",
        True,
        False,
        None,
        [],
        {},
        [[]],
        [""],
        [1],
    ]
)
JSON = st.recursive(
    st.one_of(ODD, st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5) | st.sampled_from(FIELDS), inner, max_size=4)
    ),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    kind=st.sampled_from([CHAT, COMPLETION]), odd=st.dictionaries(st.sampled_from(FIELDS), JSON, min_size=1, max_size=4)
)
def test_any_value_of_any_field(witness: Witness, kind: str, odd: Json) -> None:
    body = {"messages": HI, "prompt": "hi", **odd}
    if not isinstance(body.get("max_tokens"), int) or not 0 < body["max_tokens"] < 5:
        body["max_completion_tokens"] = 2  # it wins, and keeps what is let through short
    answer = witness.http.post(kind, content=json.dumps(body).encode())
    assert answer.status_code in (200, 400, 404), answer.text
    if answer.status_code != 200:
        assert answer.json()["error"]["code"] in ("invalid_request", "model_not_found")
    witness.testify(body)

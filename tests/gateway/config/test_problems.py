"""Wrong configs: every problem, with its line, what was expected, what was got, and what to do."""

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gateway.config import Config, ConfigError, Problem, parse, schema


def model(keys: str) -> str:
    return f"models: {{a: {{model: m, {keys}}}}}"


def server(keys: str) -> str:
    return f"models: {{a: {{model: m}}}}\nserver: {{{keys}}}"


# Each case: a config, then the line and the path of its one problem, then what the message has to say.
CASES: list[tuple[str, int, str, list[str]]] = [
    # The file as a whole
    ("", 1, "(file)", ["empty file"]),
    ("# only a comment\n", 1, "(file)", ["empty file"]),
    ("~", 1, "(file)", ["empty file"]),
    ("- a", 1, "(file)", ["expected a mapping", "got a list"]),
    ("just text", 1, "(file)", ["expected a mapping", "'just text'"]),
    ("server:\n  port: [1", 2, "(file)", ["expected YAML", "flow sequence"]),
    ("server:\n\tport: 1", 2, "(file)", ["spaces, not with tabs"]),
    ("models:\n  a: b: c", 2, "(file)", ["quotes"]),
    ("models: {a: {model: ${X}}}", 1, "(file)", ["${…} has to be in quotes"]),
    ("a: 1\n---\nb: 2", 2, "(file)", ["one document"]),
    ("a: 1\nb: \x07", 2, "(file)", ["U+0007"]),
    ('a: "\\UFFFFFFFF"', 1, "(file)", ["escape"]),
    ("[" * 5000, 1, "(file)", ["64 levels"]),
    ("models: *nobody", 1, "(file)", ["undefined alias"]),
    ("models: &a\n  x: *a\n", 1, "models.x", ["alias of a value that it is part of"]),
    ("models:\n  a: &a\n    <<: *a\n    model: m\n", 2, "models.a", ["alias of a value that it is part of"]),
    ("models:\n  a:\n    <<: 5\n    model: m\n", 3, "models.a.<<", ["expected a mapping"]),
    (model("max_queue: !!str 5"), 1, "models.a.max_queue", ["without a tag", "!!str"]),
    ("models: {a: {model: !!python/name:os.system x}}", 1, "models.a.model", ["without a tag"]),
    # Keys
    ("models: {a: {model: m}}\nserver:\n  prot: 1", 3, "server.prot", ["known key", 'did you mean "port"?']),
    ("models: {a: {model: m}}\nport: 1", 2, "port", ["port goes into server"]),
    (model("min_backoff: 1"), 1, "models.a.min_backoff", ["goes into models.NAME.restart"]),
    (model("zzzz: 1"), 1, "models.a.zzzz", ["the keys here are model, command"]),
    ("models: {a: {modle: m}}", 1, "models.a.modle", ['did you mean "model"?']),
    ("models:\n  a:\n    model: m\n    model: n", 4, "models.a.model", ["line 3", "remove one"]),
    ("models:\n  a: {model: m}\n  a: {model: m}", 3, "models.a", ["line 2"]),
    ("models: {a: {model: m}}\nserver: {port: 1}\nserver: {port: 2}", 3, "server", ["line 2"]),
    ("models:\n  a: {model: m}\n  no: {model: m}", 3, "models", ['"no"', "boolean false"]),
    ("models:\n  a: {model: m}\n  ~: {model: m}", 3, "models", ["null"]),
    ("models:\n  a: {model: m}\n  [x]: {model: m}", 3, "models", ["text as key"]),
    ("models:\n  a: {model: m}\n  ${X}: {model: m}", 3, "models", ["values only"]),
    (model('env: {"\\ud800": x}'), 1, "models.a.env", ["key of Unicode characters", "lone surrogates"]),
    (model('request: {defaults: {x: {"\\0": 1}}}'), 1, "models.a.request.defaults.x", ["NUL"]),
    # Requests: what each client would be refused for
    (model("request: {defaults: {temperature: hot}}"), 1, "models.a.request.defaults.temperature", ["from 0", "hot"]),
    (model("request: {force: {max_tokens: x}}"), 1, "models.a.request.force.max_tokens", ["expected"]),
    (model("request: {force: {stop: [1]}}"), 1, "models.a.request.force.stop", ["expected a string"]),
    (model("request: {force: {tools: 5}}"), 1, "models.a.request.force.tools", ["expected"]),
    (
        model("request: {defaults: {chat_template_kwargs: {tokenize: false}}}"),
        1,
        "models.a.request.defaults.chat_template_kwargs",
        ["tokenize: not a variable of a chat template"],
    ),
    (
        "defaults:\n  request: {force: {top_p: 3}}\nmodels: {a: {model: m}, b: {model: n}}",
        2,
        "defaults.request.force.top_p",
        ["from 0 to 1", "the number 3"],
    ),
    # Models and their names
    ("server: {port: 1}", 1, "models", ["at least one model"]),
    ("models:\n", 1, "models", ["at least one model"]),
    ("models: [a]", 1, "models", ["expected a mapping of models", "got a list"]),
    ("models: {a: m}", 1, "models.a", ["expected a mapping", "'m'"]),
    ("models: {/a: {model: m}}", 1, "models./a", ["expected a name"]),
    ("models: {a b: {model: m}}", 1, "models.'a b'", ["expected a name"]),
    ('models: {"a\\u0007": {model: m}}', 1, "models.'a\\x07'", ["control characters"]),
    ("models:\n  a: {model: m}\n  b:\n    model: m\n    aliases: [a]", 5, "models.b.aliases[0]", ["model on line 2"]),
    (
        "models:\n  a: {model: m, aliases: [x]}\n  b: {model: m, aliases: [x]}",
        3, "models.b.aliases[0]", ["alias of a on line 2"],
    ),
    (model("aliases: [a]"), 1, "models.a.aliases[0]", ["used once"]),
    (model("aliases: x"), 1, "models.a.aliases", ['["x"]']),
    (
        "models:\n  a:\n    model: m\n    aliases:\n      - x\n      - off",
        6, "models.a.aliases[1]", ['"off"', "boolean false"],
    ),
    # Sources
    ("models:\n  a: {replicas: 2}", 2, "models.a", ["a source: model, command or urls", "got none"]),
    ("models:\n  a:\n", 2, "models.a", ["a source"]),
    (
        'models:\n  a:\n    command: ["{port}"]\n    urls: [http://h]',
        4, "models.a.urls", ["line 3", "line 4", "one of the two"],
    ),
    ("models: {a: {model:}}", 1, "models.a.model", ["nothing (null)"]),
    ('models: {a: {model: ""}}', 1, "models.a.model", ["not empty"]),
    ("models: {a: {model: yes}}", 1, "models.a.model", ['"yes"', "boolean true"]),
    ('models: {a: {model: "a\\0b"}}', 1, "models.a.model", ["NUL"]),
    ("models: {a: {model: [m]}}", 1, "models.a.model", ["got a list"]),
    ("models: {a: {command: [serve]}}", 1, "models.a.command", ["{port}"]),
    ("models: {a: {command: serve it}}", 1, "models.a.command", ['["serve", "it"]']),
    ("models: {a: {command: []}}", 1, "models.a.command", ["at least one"]),
    ("models: {a: {command: [x, {port}]}}", 1, "models.a.command[1]", ['"{port}"', "mapping"]),
    ("models: {a: {urls: [http://u:secret@h]}}", 1, "models.a.urls[0]", ["without credentials", "api_key"]),
    ("models: {a: {urls: [ftp://h]}}", 1, "models.a.urls[0]", ["http://host", "'ftp://h'"]),
    (
        "models:\n  a:\n    urls:\n    - http://h\n    - http://H/v1/",
        5, "models.a.urls[1]", ["each URL once", "line 4"],
    ),
    ("models: {a: {urls: [http://h], replicas: 1}}", 1, "models.a.replicas", ["each URL is one replica"]),
    ("models: {a: {urls: [http://h], server_args: {}}}", 1, "models.a.server_args", ["started elsewhere"]),
    ("models: {a: {urls: [http://h], env: {}}}", 1, "models.a.env", ["started elsewhere"]),
    ('models: {a: {command: ["{port}"], server_args: {}}}', 1, "models.a.server_args", ["the command itself"]),
    (model("api_key: k"), 1, "models.a.api_key", ["servers in urls"]),
    # Values
    (server("port: 65536"), 2, "server.port", ["from 0 to 65535", "got 65536"]),
    (server('port: "1"'), 2, "server.port", ["remove the quotes"]),
    (server("port: 80.5"), 2, "server.port", ["whole number", "80.5"]),
    (server("port: 010"), 2, "server.port", ["whole number", "'010'"]),
    (server("port: true"), 2, "server.port", ["whole number"]),
    (server("port: .inf"), 2, "server.port", ["whole number"]),
    (server("port: 1e999"), 2, "server.port", ["from 0 to 65535"]),
    (server("max_body: lots"), 2, "server.max_body", ["512MiB"]),
    (server("max_body: 5"), 2, "server.max_body", ["from 1KiB"]),
    (server("keepalive: 1:30"), 2, "server.keepalive", ["500ms, 30s"]),
    (server("keepalive: .nan"), 2, "server.keepalive", ["expected a duration"]),
    (server("keepalive: 99999h"), 2, "server.keepalive", ["from 0 to 720h"]),
    (server("keepalive: "), 2, "server.keepalive", ["nothing (null)"]),
    (server("expose_backend_output: 1"), 2, "server.expose_backend_output", ["true or false"]),
    (server("host: 0.0.0.0"), 2, "server.host", ["api_keys", "not loopback"]),
    ("models: {a: {model: m}}\nserver:\n  host: '::'\n  api_keys: []", 4, "server.api_keys", ["host ::"]),
    (server("host: a:80"), 2, "server.host", ["the port goes into port"]),
    (server('api_keys: [""]'), 2, "server.api_keys[0]", ["not empty"]),
    (server('api_keys: ["a b"]'), 2, "server.api_keys[0]", ["printable ASCII"]),
    (server("cors_origins: [https://x/]"), 2, "server.cors_origins[0]", ["no / at the end"]),
    (server("allowed_hosts: [studio.local:8080]"), 2, "server.allowed_hosts[0]", ["without scheme, port and path"]),
    (server('allowed_hosts: ["*"]'), 2, "server.allowed_hosts[0]", ["wildcards are not supported"]),
    (server('cors_origins: ["*", "http://x"]'), 2, "server.cors_origins", ["alone"]),
    (model("replicas: 0"), 1, "models.a.replicas", ["from 1 to 64"]),
    (model("replicas: 65"), 1, "models.a.replicas", ["from 1 to 64"]),
    (model("max_inflight: 0"), 1, "models.a.max_inflight", ["auto or a whole number from 1 to"]),
    (model("max_inflight: of"), 1, "models.a.max_inflight", ["auto or a whole number", "got 'of'"]),
    (model("max_inflight: '9'"), 1, "models.a.max_inflight", ["auto or a whole number", "remove the quotes"]),
    (model("env: {A: no}"), 1, "models.a.env.A", ['"no"']),
    (model('env: {"A=B": x}'), 1, "models.a.env.'A=B'", ["environment variable"]),
    (model("resume: yes"), 1, "models.a.resume", ["auto or off", "got 'yes'; write one of these"]),
    (model("resume: of"), 1, "models.a.resume", ["auto or off", 'did you mean "off"?']),
    (model("timeouts: {start: 0}"), 1, "models.a.timeouts.start", ["from 1ms"]),
    (model("restart: {min_backoff: 2m}"), 1, "models.a.restart.min_backoff", ["120s and max_backoff 60s"]),
    (model("request: {force: {model: x}}"), 1, "models.a.request.force.model", ["the gateway sets it"]),
    (model("request: {drop: [messages]}"), 1, "models.a.request.drop[0]", ["do without"]),
    (model("request: {defaults: {x: [1, .inf]}}"), 1, "models.a.request.defaults.x[1]", ["finite"]),
    (model("request: {defaults: {x: off}}"), 1, "models.a.request.defaults.x", ['"off"']),
    (model("request: {defaults: {x: 99999999999999999999}}"), 1, "models.a.request.defaults.x", ["64 bits"]),
    # Fallbacks
    (
        "models:\n  alpha:\n    model: m\n    fallbacks: [alhpa]",
        4, "models.alpha.fallbacks[0]", ['did you mean "alpha"?'],
    ),
    (model("fallbacks: [a]"), 1, "models.a.fallbacks[0]", ["another model"]),
    (model("aliases: [x], fallbacks: [x]"), 1, "models.a.fallbacks[0]", ["another model"]),
    ("models: {a: {model: m}}\ndefaults: {fallbacks: [zz]}", 2, "defaults.fallbacks[0]", ["a model of this file"]),
    # Defaults
    ("models: {a: {model: m}}\ndefaults: {aliases: [x]}", 2, "defaults.aliases", ["each model names its own"]),
    ("models: {a: {model: m}}\ndefaults: {model: x}", 2, "defaults.model", ["each model names its own"]),
    ("models: {a: {model: m}}\ndefaults: {urls: [http://h]}", 2, "defaults.urls", ["each model names its own"]),
    ("models: {a: {model: m}}\ndefaults: {replica: 2}", 2, "defaults.replica", ['did you mean "replicas"?']),
    ("models: {a: {model: m}, b: {model: m}}\ndefaults: {replicas: 0}", 2, "defaults.replicas", ["from 1 to 64"]),
    (
        "models: {a: {model: m}, b: {model: m}}\ndefaults:\n  restart: {min_backoff: 2m}",
        3, "defaults.restart.min_backoff", ["at most max_backoff"],
    ),
    # Variables
    ('models: {a: {model: "${NOPE}"}}', 1, "models.a.model", ["environment variable NOPE", "set NOPE"]),
    ('models:\n  a:\n    model: m\n    env:\n      X: "${NOPE}"', 5, "models.a.env.X", ["NOPE"]),
    ('models: {a: {model: "${x y}"}}', 1, "models.a.model", ["${NAME:-default}"]),
    (model('replicas: "${TEN}x"'), 1, "models.a.replicas", ["'10x' (from '${TEN}x')"]),
    # Flags of mlx_lm.server
    (model("server_args: {max-token: 5}"), 1, "models.a.server_args.max-token", ['"max-tokens"']),
    (model("server_args: {--zzz: 5}"), 1, "models.a.server_args.zzz", ["the flags are adapter-path"]),
    (model("server_args: {model: x}"), 1, "models.a.server_args.model", ["name the model in model:"]),
    (model("server_args: {log-level: DEBUG}"), 1, "models.a.server_args.log-level", ["prints requests"]),
    (model("server_args: {host: 0.0.0.0}"), 1, "models.a.server_args.host", ["loopback"]),
    (model("replicas: 2, server_args: {port: 9}"), 1, "models.a.server_args.port", ["one replica only"]),
    (model("server_args: {port: 8080}"), 1, "models.a.server_args.port", ["the gateway itself"]),
    (model("server_args: {max-tokens: many}"), 1, "models.a.server_args.max-tokens", ["whole number"]),
    (model("server_args: {kv-bits: 4.5}"), 1, "models.a.server_args.kv-bits", ["whole number"]),
    (model("server_args: {top-p: 2}"), 1, "models.a.server_args.top-p", ["from 0 to 1"]),
    (model("server_args: {pipeline: maybe}"), 1, "models.a.server_args.pipeline", ["true or false"]),
    (model("server_args: {prompt-cache-bytes: 4XB}"), 1, "models.a.server_args.prompt-cache-bytes", ["8GB"]),
    (model("server_args: {chat-template-args: x}"), 1, "models.a.server_args.chat-template-args", ["JSON object"]),
    (
        "models:\n  a:\n    model: m\n    server_args:\n      max-tokens: 5\n      --max_tokens: 6",
        6, "models.a.server_args.max-tokens", ["each flag once", "line 5"],
    ),
]  # fmt: skip

UNSUPPORTED = [
    (model("distributed: {processes: 2}"), "models.a.distributed", "expected null"),
    ("models: {a: {model: m}}\ndefaults: {distributed: {processes: 2}}", "defaults.distributed", "expected null"),
]


def problems(text: str) -> tuple[Problem, ...]:
    with pytest.raises(ConfigError) as caught:
        parse(text, "c.yaml", {"TEN": "10"})
    assert str(caught.value) == "\n".join(str(problem) for problem in caught.value.problems)
    return caught.value.problems


def outcome(text: str) -> Config | tuple[Problem, ...]:
    try:
        return parse(text, "c.yaml", {"A": "x"})
    except ConfigError as error:
        return error.problems


@pytest.mark.parametrize(("text", "line", "path", "says"), CASES)
def test_one_problem(text: str, line: int, path: str, says: list[str]) -> None:
    (problem,) = problems(text)
    assert (problem.file, problem.line, problem.path) == ("c.yaml", line, path)
    for words in says:
        assert words in str(problem)
    assert str(problem).startswith(f"c.yaml:{line}: {path}: expected ")
    assert ", got " in str(problem)
    assert problem.remedy


@pytest.mark.parametrize(("text", "path", "says"), UNSUPPORTED)
def test_what_is_not_yet_supported_says_so(text: str, path: str, says: str) -> None:
    (problem,) = problems(text)
    assert problem.path == path
    assert says in str(problem)
    assert "not yet supported" in str(problem)
    assert "remove it" in problem.remedy


def test_what_is_not_yet_supported_is_still_checked() -> None:
    found = problems("models: {a: {model: m, distributed: {backend: rign}}}")
    assert [problem.path for problem in found] == ["models.a.distributed.backend", "models.a.distributed"]
    found = problems("models: {a: {model: m, idle_unload: never, load: sometimes}}")
    assert [problem.path for problem in found] == ["models.a.idle_unload", "models.a.load"]
    assert all("not yet supported" not in str(problem) for problem in found)


def test_a_wrong_name_hides_no_problem_below_it() -> None:
    found = [problem.path for problem in problems("models: {a b: {command: [x], replica: 2}, /c: {}}")]
    assert found == ["models.'a b'", "models.'a b'.replica", "models./c", "models.'a b'.command", "models./c"]


def test_all_problems_are_reported_in_the_order_of_the_lines() -> None:
    text = """\
server:
  port: 99999
  prot: 1
defaults:
  timeouts: {strat: 5s}
models:
  a:
    model: ${NOPE}
    replicas: 0
    aliases: [b]
  b:
    command: [x]
    fallbacks: [c]
"""
    found = [(problem.line, problem.path) for problem in problems(text)]
    assert found == [
        (2, "server.port"),
        (3, "server.prot"),
        (5, "defaults.timeouts.strat"),
        (8, "models.a.model"),
        (9, "models.a.replicas"),
        (10, "models.a.aliases[0]"),
        (12, "models.b.command"),
        (13, "models.b.fallbacks[0]"),
    ]


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        (
            model("restart: {min_backoff: nonsense, max_backoff: 10ms}, replicas: x, server_args: {port: 9}"),
            ["models.a.restart.min_backoff", "models.a.replicas"],
        ),
        (server("host: 0.0.0.0, api_keys: ['${NOPE}']"), ["server.api_keys[0]"]),
        (server("port: x") + "\ndefaults: {server_args: {port: 8080}}", ["server.port"]),
        ("models: {a: {model: m}}\nserver: 5\ndefaults: {server_args: {port: 8080}}", ["server"]),
        # The source is the one that is written, right or wrong; what goes with the others is not inherited.
        ("models: {a: {urls: 5}}\ndefaults: {server_args: {port: 8080}, replicas: 2}", ["models.a.urls"]),
        ("models: {a: {command: 5}}\ndefaults: {server_args: {port: 8080}}", ["models.a.command"]),
        # The section that cannot be read may have held the other of the two values.
        ("models: {a: {model: m, restart: 5}}\ndefaults: {restart: {min_backoff: 2m}}", ["models.a.restart"]),
        (
            model("restart: {min_backoff: 2m}") + "\ndefaults: {restart: {max_backoff: x}}",
            ["defaults.restart.max_backoff"],
        ),
    ],
)
def test_a_wrong_value_has_no_consequences(text: str, wrong: list[str]) -> None:
    """Nothing is judged by the default that would stand in place of a wrong value."""
    assert [problem.path for problem in problems(text)] == wrong


@pytest.mark.parametrize(
    "text",
    [
        "models: {a: {model: m}}\nserver: {api_keys: hunter2secret}",
        "models: {a: {model: m}}\nserver: {api_keys: ['hunter2 secret']}",
        "models: {a: {urls: [http://h], api_key: hunter2 secret}}",
        "models: {a: {urls: ['http://u:hunter2@h']}}",
    ],
)
def test_secrets_are_not_shown(text: str) -> None:
    (problem,) = problems(text)
    assert "hunter2" not in str(problem)


def test_doubling_aliases_end() -> None:
    lines = ["x0: &x0 [a, b]"] + [f"x{n}: &x{n} [*x{n - 1}, *x{n - 1}]" for n in range(1, 60)]
    (problem,) = problems("\n".join(lines))
    assert "fewer aliases" in problem.remedy


TOKENS = st.sampled_from(
    ["models:", "server:", "defaults:", " a: ", "{", "}", "[", "]", "&x ", "*x", "<<: ", "- ", "\n", "\n  ", "\n    ",
     "model: m", ", ", "port: ", "${", "}", "${A:-1}", "1", "no", "~", "'", '"', "!!str ", "|", ": ", "urls: ", "http://",
     "command: ", "env: ", "server_args: ", "request: ", "fallbacks: ", "aliases: ", "restart: ", "timeouts: ",
     "replicas: ", "%", "---"]
)  # fmt: skip


@given(st.text(max_size=80) | st.lists(TOKENS, max_size=25).map("".join))
@example("models: {a: {model: m}}")
@example("\ufeffmodels: {a: {model: m}}")
@example("%YAML 99999999999999999999.1\n---\na")
@settings(max_examples=400, deadline=None)
def test_any_text_gives_a_config_or_problems(text: str) -> None:
    found = outcome(text)
    if isinstance(found, Config):
        assert found.models
        return
    assert found
    for problem in found:
        assert problem.line >= 1
        assert "\n" not in str(problem)
        assert all([problem.expected, problem.got, problem.remedy, problem.path])
        str(problem).encode()


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["5s", "1GB", "${A}", "*"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)
SECTIONS = {"server": schema.SERVER, "memory": schema.MEMORY, "defaults": schema.DEFAULTS, "a": schema.MODEL}
KEYS = st.sampled_from([(where, field.key) for where, section in SECTIONS.items() for field in section.fields])


@given(KEYS, VALUES)
@settings(max_examples=400, deadline=None)
def test_any_value_under_any_key_gives_a_config_or_problems_there(key: tuple[str, str], value: object) -> None:
    where, name = key
    if where == "a":
        keys = {name: value} if name in {"command", "urls"} else {"model": "m", name: value}
        tree: dict[str, object] = {"models": {"a": keys}}
    else:
        tree = {"models": {"a": {"model": "m"}}, where: {name: value}}
    prefix = f"models.a.{name}" if where == "a" else f"{where}.{name}"
    found = outcome(yaml.safe_dump(tree))
    if not isinstance(found, Config):
        assert [problem.path for problem in found if not problem.path.startswith(prefix)] == []

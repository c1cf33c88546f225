"""Right configs: what comes out of them."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from backends.domain.spec import RestartPolicy, Timeouts
from gateway.config import Config, ConfigError, ModelConfig, RequestRules, ServerConfig, load, parse

# The example of the public contract, with the values that this version supports.
EXAMPLE = """\
server:
  host: 127.0.0.1
  port: 8080
  api_keys: []              # required when host is not loopback
  cors_origins: []          # exact origins, or ["*"]
  max_body: 32MiB
  body_memory: 512MiB
  max_connections: 2048
  drain_timeout: 30s
  keepalive: 15s
  expose_backend_output: true
memory:
  budget: auto
defaults: {}
models:
  qwen3-4b:
    model: mlx-community/Qwen3-4B-4bit
    aliases: [default, gpt-4o-mini]
    replicas: 2
    load: eager
    idle_unload: 0
    max_inflight: auto
    max_queue: 64
    queue_timeout: 60s
    max_context: null
    server_args: {prompt-cache-bytes: 4GB, max-tokens: 8192}
    env: {}
    fallbacks: [qwen3-0.6b]
    request: {defaults: {}, force: {}, drop: []}
    memory: null
    resume: auto
    timeouts: {start: 10m, progress: 2m, total: 0, stop: 20s}
    restart: {min_backoff: 1s, max_backoff: 60s, max_failures: 5, window: 5m}
  qwen3-0.6b:
    model: mlx-community/Qwen3-0.6B-4bit
  any-server:
    command: [python, -m, my_server, --port, "{port}"]
  other-mac:
    urls: [http://studio.local:8080, http://mini.local:8080]
    api_key: ${STUDIO_KEY:-}
    model: qwen3-4b
"""


def config(text: str, environ: Mapping[str, str] | None = None) -> Config:
    return parse(text, "c.yaml", environ or {})


def model(body: str, environ: Mapping[str, str] | None = None, more: str = "") -> ModelConfig:
    """The model ``a`` with these lines in it."""
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    return config(f"models:\n  a:\n{lines}{more}", environ).models[0]


def test_the_example() -> None:
    found = config(EXAMPLE)
    assert found.server == ServerConfig(
        host="127.0.0.1",
        port=8080,
        api_keys=(),
        cors_origins=(),
        allowed_hosts=(),
        max_body=32 * 2**20,
        body_memory=512 * 2**20,
        max_connections=2048,
        drain_timeout=30.0,
        keepalive=15.0,
        expose_backend_output=True,
    )
    assert found.memory.budget == "auto"
    assert found.path is None
    assert [each.name for each in found.models] == ["qwen3-4b", "qwen3-0.6b", "any-server", "other-mac"]
    assert found.models[0] == ModelConfig(
        name="qwen3-4b",
        model="mlx-community/Qwen3-4B-4bit",
        command=(),
        urls=(),
        api_key="",
        aliases=("default", "gpt-4o-mini"),
        replicas=2,
        load="eager",
        idle_unload=0.0,
        max_inflight="auto",
        priority="interactive",
        admission="auto",
        max_queue=64,
        queue_timeout=60.0,
        max_context=None,
        server_args={"prompt-cache-bytes": "4GB", "max-tokens": 8192},
        env={},
        fallbacks=("qwen3-0.6b",),
        request=RequestRules({}, {}, (), ()),
        memory=None,
        resume="auto",
        instrument="auto",
        engine_fixes="auto",
        timeouts=Timeouts(600.0, 120.0, 0.0, 20.0),
        restart=RestartPolicy(1.0, 60.0, 5, 300.0),
        distributed=None,
        line=16,
    )
    assert found.models[2].command == ("python", "-m", "my_server", "--port", "{port}")
    assert found.models[3].urls == ("http://studio.local:8080", "http://mini.local:8080")
    assert (found.models[3].replicas, found.models[3].model, found.models[3].api_key) == (2, "qwen3-4b", "")


def test_what_is_left_out_has_the_values_of_the_example() -> None:
    full, bare = config(EXAMPLE), config("models: {qwen3-0.6b: {model: mlx-community/Qwen3-0.6B-4bit}}")
    assert bare.server == full.server
    assert bare.memory == full.memory
    left_out = full.models[1]
    assert bare.models == (
        ModelConfig(**{name: getattr(left_out, name) for name in left_out.__slots__ if name != "line"}, line=1),
    )


def test_resume() -> None:
    assert config("models: {a: {model: m}}").models[0].resume == "auto"
    assert config("models: {a: {model: m, resume: off}}").models[0].resume == "off"
    assert config('models: {a: {model: m, resume: "off"}}').models[0].resume == "off"
    assert config(EXAMPLE).notes == ()


def test_variables_become_what_is_wanted() -> None:
    text = """\
server: {port: "${PORT:-8080}", keepalive: "${NONE:-5s}", api_keys: ["${KEY}", "x-${KEY}"], host: "${HOST}"}
models:
  a:
    model: ${OWNER}/${NAME:-m}
    replicas: ${COUNT}
    env: {A: "${NO}", B: $${KEY}, C: 5, D: "${NONE:-}"}
    server_args: {trust-remote-code: "${YES}"}
    request:
      defaults:
        temperature: ${T:-0.5}
        user: "${COUNT}"
"""
    environ = {"PORT": "9000", "KEY": "123", "HOST": "0.0.0.0", "OWNER": "o", "COUNT": "3", "NO": "no", "YES": "true"}  # noqa: S104
    with pytest.raises(ConfigError):
        config(text, environ)  # a bare $${ within { } is not YAML
    found = config(text.replace("$${KEY}", '"$${KEY}"'), environ)
    assert (found.server.port, found.server.keepalive, found.server.host) == (9000, 5.0, "0.0.0.0")  # noqa: S104
    assert found.server.api_keys == ("123", "x-123")
    (only,) = found.models
    assert (only.model, only.replicas) == ("o/m", 3)
    assert only.env == {"A": "no", "B": "${KEY}", "C": "5", "D": ""}
    assert only.server_args == {"trust-remote-code": True}
    assert only.request.defaults == {"temperature": 0.5, "user": "3"}


def test_defaults_lie_under_each_model() -> None:
    text = """\
defaults:
  replicas: 3
  max_queue: 7
  timeouts: {start: 1m, stop: 1s}
  restart: {max_failures: 2}
  server_args: {max_tokens: 5, top-k: 3, temp: 0.5}
  env: {A: "1", B: "2"}
  request: {defaults: {temperature: 0.5, stop: [x, y]}, drop: [user]}
  fallbacks: [c, b]
  api_key: k
models:
  a:
    model: m
    replicas: 1
    timeouts: {stop: 2s}
    server_args: {--max-tokens: 9, temp: null}
    env: {B: "3"}
    request: {defaults: {stop: [z]}, drop: []}
  b:
    command: [serve, "{port}"]
  c:
    urls: [http://h, http://i]
"""
    a, b, c = config(text).models
    assert (a.replicas, b.replicas, c.replicas) == (1, 3, 2)
    assert (a.max_queue, b.max_queue, c.max_queue) == (7, 7, 7)
    assert a.timeouts == Timeouts(start=60, stop=2)
    assert b.timeouts == Timeouts(start=60, stop=1)
    assert a.restart == c.restart == RestartPolicy(max_failures=2)
    assert a.server_args == {"max-tokens": 9, "top-k": 3, "temp": None}
    assert (b.server_args, c.server_args) == ({}, {})
    assert a.env == {"A": "1", "B": "3"}
    assert b.env == {"A": "1", "B": "2"}
    assert c.env == {}
    assert a.request == RequestRules({"temperature": 0.5, "stop": ["z"]}, {}, (), ())
    assert b.request == RequestRules({"temperature": 0.5, "stop": ["x", "y"]}, {}, ("user",), ())
    assert (a.fallbacks, b.fallbacks, c.fallbacks) == (("c", "b"), ("c",), ("b",))
    assert (a.api_key, b.api_key, c.api_key) == ("", "", "k")


def test_merge_keys_and_aliases() -> None:
    text = """\
models:
  a: &a
    model: &m some/model
    replicas: 2
    env: &env {X: "1"}
  b:
    <<: *a
    replicas: 3
  c:
    model: *m
    env: {<<: [{Y: "5", Z: "6"}, *env, {Y: "7"}], Z: "8"}
"""
    a, b, c = config(text).models
    assert (a.model, b.model, c.model) == ("some/model",) * 3
    assert (a.replicas, b.replicas, c.replicas) == (2, 3, 1)
    assert b.env == {"X": "1"}
    assert c.env == {"X": "1", "Y": "5", "Z": "8"}


def test_fallbacks_may_name_aliases_and_are_resolved() -> None:
    found = config(
        "models: {a: {model: m, fallbacks: [x, b, y]}, b: {model: m, aliases: [x]}, c: {model: m, aliases: [y]}}"
    )
    assert found.models[0].fallbacks == ("b", "c")


def test_fallbacks_may_go_round() -> None:
    found = config("models: {a: {model: m, fallbacks: [b]}, b: {model: m, fallbacks: [a]}}")
    assert [each.fallbacks for each in found.models] == [("b",), ("a",)]


@pytest.mark.parametrize("name", ["qwen3:4b", "mlx-community/Qwen3-4B", "a.b_c+d@e", "模型", "4"])
def test_names(name: str) -> None:
    assert config(f"models: {{ {json.dumps(name)} : {{model: m}}}}").models[0].name == name


def test_numbers_are_texts_where_texts_are_wanted() -> None:
    found = model("model: 1e3\naliases: [4, 1:30, 2020-01-01]\nenv: {N: 010}")
    assert found.model == "1e3"
    assert found.aliases == ("4", "1:30", "2020-01-01")
    assert found.env == {"N": "010"}


def test_request_values_keep_their_types() -> None:
    body = 'request: {defaults: {a: 1, b: 1e-3, c: "1", d: null, e: true, f: [x, {g: 2.5}], h: text}}'
    expected = {"a": 1, "b": 0.001, "c": "1", "d": None, "e": True, "f": ["x", {"g": 2.5}], "h": "text"}
    assert model(f"model: m\n{body}").request.defaults == expected


def test_server_args() -> None:
    body = """\
model: m
server_args:
  --prompt-cache-bytes: 512MiB
  max_tokens: 16
  temp: 0.5
  top-k: null
  trust-remote-code: yes
  pipeline: false
  log-level: WARNING
  chat-template-args: {enable_thinking: false}
  allowed-origins: http://a,http://b
  port: 9000
"""
    assert model(body).server_args == {
        "prompt-cache-bytes": 512 * 2**20,
        "max-tokens": 16,
        "temp": 0.5,
        "top-k": None,
        "trust-remote-code": True,
        "pipeline": False,
        "log-level": "WARNING",
        "chat-template-args": '{"enable_thinking": false}',
        "allowed-origins": "http://a,http://b",
        "port": 9000,
    }


def test_keys_with_nothing_below_them_are_empty() -> None:
    found = config("models: {a: {model: m, env: , aliases: , timeouts: , server_args: }}\nserver:\nmemory:\ndefaults:")
    assert found == config("models: {a: {model: m}}")


def test_keys_guard_a_gateway_that_others_can_reach() -> None:
    found = config("server: {host: '::', api_keys: [k]}\nmodels: {a: {model: m}}")
    assert found.server.api_keys == ("k",)


@pytest.mark.parametrize(
    ("text", "folder"),
    [
        ("./m", "{base}/m"),
        ("../m", "{parent}/m"),
        ("/x/../m", "/m"),
        ("~/m", "/home/me/m"),
        ("here/m", "{base}/here/m"),
        ("owner/m", "owner/m"),
        ("~m", "{base}/~m"),
    ],
)
def test_folders(tmp_path: Path, text: str, folder: str) -> None:
    base = tmp_path / "conf"
    (base / "here" / "m").mkdir(parents=True)
    path = base / "config.yaml"
    path.write_text(f"models:\n  a:\n    model: {text}\n    server_args: {{adapter-path: ad, draft-model: {text}}}\n")
    found = load(path, {"HOME": "/home/me"})
    expected = folder.format(base=base, parent=tmp_path)
    assert found.path == path
    assert found.models[0].model == expected
    assert found.models[0].server_args == {"adapter-path": str(base / "ad"), "draft-model": expected}
    missing = expected.startswith("/") and "here" not in expected
    assert found.notes == ((f"{path}:3: models.a.model: there is no {expected} yet",) if missing else ())


def test_a_text_that_came_from_no_file_reads_nothing(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    text = "models: {a: {model: m}, b: {model: ./m}, c: {model: ./n}, d: {urls: [http://h], model: ./m}}"
    found = parse(text, str(tmp_path / "c.yaml"), {})
    assert [each.model for each in found.models] == ["m", str(tmp_path / "m"), str(tmp_path / "n"), "./m"]
    assert found.notes == ()


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"models:\n  a: {model: m}\n# caf\xe9\n")
    cases = [
        (tmp_path / "none.yaml", 1, "no such file"),
        (tmp_path, 1, "a directory"),
        (latin, 3, "byte 0xe9"),
        (tmp_path / ("x" * 300), 1, "an error"),
        (tmp_path / "nul\0", 1, "an error"),
    ]
    for path, line, got in cases:
        with pytest.raises(ConfigError) as caught:
            load(path, {})
        (problem,) = caught.value.problems
        assert str(problem).startswith(f"{path}:{line}: (file): expected ")
        assert got in problem.got
        assert problem.remedy


def test_a_file_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Path) -> bytes:
        raise PermissionError

    monkeypatch.setattr(Path, "read_bytes", refuse)  # root may read everything, so a mode would prove nothing
    with pytest.raises(ConfigError, match="may not be read"):
        load(tmp_path / "c.yaml", {})


def test_a_byte_order_mark_is_no_problem(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(b"\xef\xbb\xbfmodels: {a: {model: m}}\r\n")
    assert load(path, {}).models[0].name == "a"

"""From a config to the fleet: every replica's spec, the names, and the rules of each model."""

import asyncio
import json
import os
import sys
from pathlib import Path

import pytest

from backends import mlx_server
from backends.domain.engine import Engine
from backends.domain.inflight_limit import inflight_limits
from backends.domain.spec import Launch, Remote, RestartPolicy, Timeouts
from backends.fleet import ModelPlan
from backends.instrument.instrument import ENGINE_FIXES
from gateway import plan
from gateway.api.error_mapping import CODES
from gateway.config import Config, parse
from gateway.forward.body_workers import BodyWorkers
from gateway.plan import FromConfigJson, vocab_size

TEXT = """\
models:
  big:
    model: org/big
    aliases: [default, gpt-4o]
    replicas: 2
    max_inflight: 3
    max_queue: 7
    queue_timeout: 9s
    fallbacks: [other, far]
    timeouts: {start: 1m, progress: 5s, total: 8s, stop: 2s}
    restart: {min_backoff: 2s, max_backoff: 4s, max_failures: 3, window: 1m}
    env: {PYTHONUNBUFFERED: "0", MINE: "1"}
    server_args: {max-tokens: 5, trust-remote-code: true}
    request: {drop: [seed]}
  fixed:
    model: /models/tiny
    server_args: {port: 9123, host: 127.0.0.2}
  other:
    command: [my-server, --port, "{port}", --name, "{model}"]
    env: {A: b}
  named:
    command: [my-server, --port, "{port}"]
    model: inner-name
  far:
    urls: [http://one:8080, http://two:8080]
    api_key: secret
    model: upstream
  near:
    urls: [http://three:8080]
"""


def config(text: str = TEXT) -> Config:
    return parse(text, "/etc/gateway/config.yaml", {})


def specs(name: str) -> ModelPlan:
    return next(p for p in plan.plans(config()) if p.name == name)


def test_models_come_in_the_order_of_the_config_with_the_bounds_of_their_queues() -> None:
    plans = plan.plans(config())
    assert [p.name for p in plans] == ["big", "fixed", "other", "named", "far", "near"]
    assert (plans[0].max_queue, plans[0].queue_timeout) == (7, 9.0)


def test_replicas_of_mlx_lm_server() -> None:
    first, second = specs("big").replicas
    assert (first.id, second.id, first.index, second.index) == ("big:0", "big:1", 0, 1)
    assert first.target == second.target
    for spec in (first, second):
        assert (spec.model, spec.upstream_model, spec.engine) == ("big", mlx_server.CANONICAL_MODEL, Engine.MLX_LM)
        assert spec.max_inflight == 3
        assert spec.timeouts == Timeouts(start=60.0, progress=5.0, total=8.0, stop=2.0)
        assert spec.restart == RestartPolicy(min_backoff=2.0, max_backoff=4.0, max_failures=3, window=60.0)


def test_the_launch_of_a_hub_model() -> None:
    launch = specs("big").replicas[0].target
    assert isinstance(launch, Launch)
    assert launch.argv[:6] == (sys.executable, "-P", str(mlx_server.INSTRUMENT), "server", "--model", "org/big")
    assert launch.instrumented
    assert ("--max-tokens", "5") in zip(launch.argv, launch.argv[1:], strict=False)
    assert "--trust-remote-code" in launch.argv
    assert (launch.host, launch.port, launch.model_folder) == ("127.0.0.1", 0, None)
    assert launch.env["PYTHONUNBUFFERED"] == "0", "the operator wins"
    assert launch.env["MINE"] == "1"
    assert "HF_HUB_OFFLINE" not in launch.env


def test_without_the_instrument_the_command_is_that_of_the_server() -> None:
    (model,) = config("models: {a: {model: org/big, instrument: off}}").models
    launch = plan.launch_of(model)
    assert launch.argv == mlx_server.argv("org/big", {}, instrumented=False)
    assert launch.argv[:6] == (sys.executable, "-P", "-m", "mlx_lm", "server", "--model")
    assert not launch.instrumented


@pytest.mark.parametrize(
    ("settings", "variable", "applied"),
    [("", None, True), (", engine_fixes: off", "off", False), (", instrument: off", None, False)],
)
def test_engine_fixes(settings: str, variable: str | None, applied: bool) -> None:
    (model,) = config(f"models: {{a: {{model: org/big{settings}}}}}").models
    assert plan.launch_of(model).env.get(ENGINE_FIXES) == variable
    assert plan.applies_engine_fixes(model) is applied


def test_the_launch_of_a_local_folder_with_a_port_of_its_own() -> None:
    launch = specs("fixed").replicas[0].target
    assert isinstance(launch, Launch)
    assert (launch.host, launch.port, launch.model_folder) == ("127.0.0.2", 9123, "/models/tiny")
    assert launch.env["HF_HUB_OFFLINE"] == "1"
    assert "9123" not in launch.argv


def test_a_command_is_taken_as_it_is() -> None:
    (spec,) = specs("other").replicas
    assert (spec.engine, spec.upstream_model) == (Engine.OTHER, "other")
    argv = ("my-server", "--port", "{port}", "--name", "{model}")
    assert spec.target == Launch(argv=argv, env={"PYTHONUNBUFFERED": "1", "A": "b"})
    assert specs("named").replicas[0].upstream_model == "inner-name"


def test_each_url_is_a_replica() -> None:
    first, second = specs("far").replicas
    assert first.target == Remote("http://one:8080", "secret")
    assert second.target == Remote("http://two:8080", "secret")
    assert [s.id for s in (first, second)] == ["far:0", "far:1"]
    assert (first.upstream_model, first.engine) == ("upstream", Engine.OTHER)
    (near,) = specs("near").replicas
    assert (near.upstream_model, near.target) == ("near", Remote("http://three:8080", ""))


def test_the_meanings_of_our_error_codes_are_handed_to_every_replica() -> None:
    assert all(spec.codes is CODES for made in plan.plans(config()) for spec in made.replicas)


def test_the_secrets_of_the_whole_config_are_handed_to_every_replica() -> None:
    text = """
server: {api_keys: [our-key]}
models:
  far: {urls: [http://far], api_key: far-key, proxy: "http://me:pass-word@proxy:1"}
  near: {model: m, env: {HF_TOKEN: hub-token, HOME: /home/me}}
"""
    for made in plan.plans(parse(text, "c.yaml", {})):
        hide = made.replicas[0].secrets.hide
        assert hide("our-key far-key pass-word hub-token /home/me") == "*** *** *** *** /home/me"


def test_routes() -> None:
    routes = plan.routes(config())
    names = {name: name for name in ("big", "fixed", "other", "named", "far", "near")}
    assert routes.names == {**names, "default": "big", "gpt-4o": "big"}
    assert routes.chain("big") == ("big", "other", "far")
    assert routes.chain("far") == ("far",)


def test_rules() -> None:
    rules = plan.rules(config(), BodyWorkers())
    assert set(rules) == {"big", "fixed", "other", "named", "far", "near"}
    assert (rules["big"].total, rules["far"].total) == (8.0, 0.0)
    assert rules["big"].request.drop == ("seed",)


# -- the vocabulary --------------------------------------------------------------------------------------------------


NO_SIZES: tuple[object, ...] = (None, 0, -1, "9", 1.5, [])


def put(folder: Path, content: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.mark.parametrize(
    ("content", "size"),
    [
        ({"vocab_size": 151936}, 151936),
        ({"text_config": {"vocab_size": 5}}, 5),
        ({"vocab_size": 7, "text_config": {"vocab_size": 5}}, 7),
        *[({"vocab_size": bad}, None) for bad in NO_SIZES],
        *[({"text_config": bad}, None) for bad in NO_SIZES],
        ({}, None),
        ([], None),
        ("not JSON", None),
        ("", None),
    ],
)
async def test_the_size_in_a_local_folder(tmp_path: Path, content: object, size: int | None) -> None:
    put(tmp_path, content)
    assert await FromConfigJson(vocab_size, str(tmp_path))() == size


async def test_a_folder_that_is_not_there_yet_is_looked_at_again_and_then_no_more(tmp_path: Path) -> None:
    vocab = FromConfigJson(vocab_size, str(tmp_path / "m"))
    assert await vocab() is None
    put(tmp_path / "m", {"vocab_size": 5})
    assert await vocab() == 5
    put(tmp_path / "m", {"vocab_size": 6})
    assert await vocab() == 5


async def test_a_slow_disk_does_not_hold_up_the_event_loop(tmp_path: Path) -> None:
    """A named pipe is read to its end only when somebody has written to it: here, the event loop itself."""
    os.mkfifo(tmp_path / "config.json")
    reading = asyncio.ensure_future(FromConfigJson(vocab_size, str(tmp_path))())
    await asyncio.sleep(0)
    assert not reading.done()
    (tmp_path / "config.json").write_text('{"vocab_size": 5}')
    assert await reading == 5


@pytest.mark.parametrize(("variable", "under"), [("HF_HUB_CACHE", ""), ("HF_HOME", "hub")])
async def test_the_size_in_the_cache_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, under: str
) -> None:
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    vocab = FromConfigJson(vocab_size, "org/m")
    assert await vocab() is None
    snapshots = tmp_path / under / "models--org--m" / "snapshots"
    put(snapshots / "aaa", "not JSON")
    assert await vocab() is None
    put(snapshots / "bbb", {"vocab_size": 32})
    put(tmp_path / under / "models--org--m2" / "snapshots" / "ccc", {"vocab_size": 64})
    assert await vocab() == 32


# -- the context that a model was trained for --------------------------------------------------------------------------


async def test_only_a_model_that_is_served_here_has_a_bound_of_its_own(tmp_path: Path) -> None:
    put(tmp_path / "m", {"max_position_embeddings": 4096})
    put(tmp_path / "silent", {"vocab_size": 5})
    text = (
        f"models: {{own: {{model: {tmp_path}/m}}, said: {{model: {tmp_path}/m, max_context: 9000}}, "
        f"silent: {{model: {tmp_path}/silent}}, other: {{command: [x, '{{port}}'], model: {tmp_path}/m}}}}"
    )
    rules = plan.rules(parse(text, "c.yaml", {}), BodyWorkers())
    contexts = {name: await rule.trained_context() for name, rule in rules.items()}
    assert {name: context or None for name, context in contexts.items()} == {
        "own": 4096,
        "said": None,
        "silent": None,
        "other": None,
    }


@pytest.mark.parametrize(("flags", "slots"), [("{kv-bits: 8}", 1), ("{draft-model: small}", 1), ("{max-tokens: 9}", 7)])
def test_a_server_that_answers_one_request_at_a_time_gets_one(flags: str, slots: int) -> None:
    text = f"models: {{m: {{model: hub/name, max_inflight: 7, server_args: {flags}}}}}"
    (spec,) = plan.plans(config(text))[0].replicas
    assert (inflight_limits(spec).usual.requests, spec.batches) == (slots, slots > 1)
    assert inflight_limits(spec).most == slots

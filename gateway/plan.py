"""Builds from the config one spec for each replica, the rules of each model, and the routes from names to models."""

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from backends import mlx_server
from backends.domain.engine import Engine
from backends.domain.priority import Priority
from backends.domain.secrets import Secrets
from backends.domain.spec import BackendSpec, EngineBatch, Launch, Remote
from backends.fleet import ModelPlan
from backends.instrument.instrument import ENGINE_FIXES
from backends.memory.estimate import Layer, layers
from backends.memory.hub_cache import folders
from gateway.api import error_mapping
from gateway.config import Config, ModelConfig, is_loopback
from gateway.forward.body_workers import BodyWorkers
from gateway.forward.request_state import ModelRules
from gateway.forward.token_counter import Templating, TokenCounter
from gateway.policy.context_limit import trained_context
from gateway.policy.routing import Routes

_SECRET_VARIABLE = re.compile(r"(?:KEY|TOKEN|SECRET|PASSWORD|PASS)S?$", re.IGNORECASE)


def plans(config: Config) -> list[ModelPlan]:
    hidden = Secrets(_secrets(config))
    return [
        ModelPlan(
            name=model.name,
            replicas=tuple(_specs(model, hidden)),
            max_queue=model.max_queue,
            queue_timeout=model.queue_timeout,
        )
        for model in config.models
    ]


def _secrets(config: Config) -> Iterator[str]:
    """The keys, and what is handed to a process in a variable with the name of a secret."""
    yield from config.server.api_keys
    for model in config.models:
        yield model.api_key
        yield urlsplit(model.proxy).password or ""
        yield from (value for name, value in model.env.items() if _SECRET_VARIABLE.search(name))


def routes(config: Config) -> Routes:
    names = {name: model.name for model in config.models for name in (*model.aliases, model.name)}
    return Routes(names, {model.name: model.fallbacks for model in config.models})


def rules(config: Config, workers: BodyWorkers) -> dict[str, ModelRules]:
    return {
        model.name: ModelRules(
            request=model.request,
            allow=frozenset(model.request.allow),
            vocab_size=FromConfigJson(vocab_size, model.model or "", model.env),
            trained_context=_trained_context(model),
            counter=TokenCounter(
                partial(folders, (model.model or "") if _is_mlx(model) else "", model.env),
                workers,
                _templating(model.server_args),
            ),
            priority=Priority.of(model.priority),
            temperature=float(_text(model.server_args, "temp", "0")) if _is_mlx(model) else 1.0,
            total=model.timeouts.total,
            max_context=model.max_context,
            max_tokens=mlx_server.max_tokens(model.server_args) if _is_mlx(model) else None,
            trims=FromConfigJson(trims, (model.model or "") if _is_mlx(model) else "", model.env),
        )
        for model in config.models
    }


class FromConfigJson:
    """A number from a model's config.json. ``find`` gives None where it is not there, and may raise AttributeError.

    Read on first use, since a hub model may not have been downloaded yet; None as long as it cannot be read.
    """

    def __init__(self, find: Callable[[Any], int | None], model: str, env: Mapping[str, str] | None = None) -> None:
        """``env``: of the model's process; may set the location of the hub cache."""
        self._find = find
        self._model = model
        self._env = env
        self._value: int | None = None

    async def __call__(self) -> int | None:
        if self._value is None:
            self._value = await asyncio.to_thread(self._read)  # the disk may be slow, or have to spin up
        return self._value

    def _read(self) -> int | None:
        values = (self._of(folder / "config.json") for folder in folders(self._model, self._env))
        return next((value for value in values if value is not None), None)

    def _of(self, path: Path) -> int | None:
        try:
            return self._find(json.loads(path.read_bytes()))
        except (OSError, ValueError, AttributeError):
            return None


def vocab_size(config: Any) -> int | None:
    """The width of the logits."""
    size = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
    return size if isinstance(size, int) and size > 0 else None


def trims(config: Any) -> bool:
    """The prompt cache can be cut back to a beginning: it is made of no recurrent states and no windows."""
    return set(layers(config)) <= {Layer.FULL, Layer.MLA, Layer.SHARED}


async def _unknown() -> None:
    """The context of a model that runs elsewhere, or under a command."""


def _trained_context(model: ModelConfig) -> Callable[[], Awaitable[int | None]]:
    if not _is_mlx(model) or model.max_context is not None:
        return _unknown
    return FromConfigJson(lambda config: trained_context(config) or 0, model.model or "", model.env)


def _is_mlx(model: ModelConfig) -> bool:
    return not model.command and not model.urls


def _specs(model: ModelConfig, secrets: Secrets) -> list[BackendSpec]:
    remotes: list[Launch | Remote] = [Remote(url, model.api_key, model.proxy) for url in model.urls]
    targets = remotes or [launch_of(model)] * model.replicas
    batches = _is_mlx(model) and mlx_server.batches(model.server_args)
    return [
        BackendSpec(
            id=f"{model.name}:{index}",
            model=model.name,
            index=index,
            upstream_model=mlx_server.CANONICAL_MODEL if _is_mlx(model) else model.model or model.name,
            target=target,
            engine=Engine.MLX_LM if _is_mlx(model) else Engine.OTHER,
            max_inflight=None if isinstance(model.max_inflight, str) else model.max_inflight,
            engine_batch=EngineBatch(*mlx_server.concurrency(model.server_args)) if _is_mlx(model) else None,
            batches=batches,
            admission=model.admission == "auto",
            timeouts=model.timeouts,
            restart=model.restart,
            codes=error_mapping.CODES,
            named=bool(model.model),
            secrets=secrets,
            memory_host=_machine(target),
            on_demand=model.load == "on_demand",
            idle_unload=model.idle_unload,
            memory=model.memory,
        )
        for index, target in enumerate(targets)
    ]


def _machine(target: Launch | Remote) -> str:
    host = urlsplit(target.url).hostname or "" if isinstance(target, Remote) else ""
    return "" if is_loopback(host) else host


def launch_of(model: ModelConfig) -> Launch:
    """How a model that is not at ``urls:`` is started."""
    if model.command:
        return Launch(argv=model.command, env={"PYTHONUNBUFFERED": "1", **model.env})
    name = model.model or ""
    local = Path(name).is_absolute()
    return Launch(
        argv=mlx_server.argv(name, model.server_args, instrumented=model.instrument == "auto"),
        env={
            **mlx_server.environment(local_folder=local),
            **({} if model.engine_fixes == "auto" else {ENGINE_FIXES: model.engine_fixes}),
            **model.env,
        },
        host=_text(model.server_args, "host", "127.0.0.1"),
        port=int(_text(model.server_args, "port", "0")),
        model_folder=name if local else None,
        model="" if local else name,
        instrumented=model.instrument == "auto",
    )


def applies_engine_fixes(model: ModelConfig) -> bool:
    """Its processes run under the instrument, and are to have its fixes."""
    return _is_mlx(model) and model.instrument == model.engine_fixes == "auto"


def _templating(server_args: Mapping[str, Any]) -> Templating:
    """``use-default-chat-template`` is only for models without a template, whose prompts are not counted."""
    return Templating(
        source=_text(server_args, "chat-template", ""),
        variables=json.loads(_text(server_args, "chat-template-args", "{}")),
        own_code=bool(server_args.get("trust-remote-code")),
    )


def _text(args: Mapping[str, Any], name: str, default: str) -> str:
    value = args.get(name)
    return default if value is None else str(value)

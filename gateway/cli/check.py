"""``check``: validates a config, prints the memory that its models will need, and advises on replicas. Other commands
use ``read`` too."""

import os
import sys
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

from backends.domain.inflight_limit import InflightLimits, inflight_limits
from backends.domain.share import Share
from backends.instrument import engine_source
from backends.memory import host, units
from backends.process.run_record import state_dir
from backends.replica import load_times
from gateway.cli import standby
from gateway.cli.terminal import printable
from gateway.config import Config, ConfigError, ModelConfig, load
from gateway.plan import applies_engine_fixes, launch_of, plans
from gateway.sizing import Need, budget, need, shares

HEADINGS = (
    "model",
    "weights",
    "KV cache",
    "one replica",
    "replicas",
    "in flight",
    "share of one",
    "prompt cache",
    "load",
)
CACHE_RULE = (
    "prompt cache: what the share of a replica leaves beside weights, runtime and the requests in flight; measured and "
    "changed while it runs, unless server_args has prompt-cache-bytes"
)


def check(path: Path) -> int:
    """Exit status: 0 ok, 1 if a model is on the disk but cannot be loaded, 2 for an invalid config."""
    config = read(path)
    if config is None:
        return 2
    replicas = sum(model.replicas for model in config.models)
    print(f"{path}: ok, {len(config.models)} model(s), {replicas} backend(s)\n")
    needs = [(model, need(model)) for model in config.models]
    of_one = shares(config, needs)
    limits = {model.name: inflight_limits(model.replicas[0]) for model in plans(config)}
    rows = (_row(model, each, of_one.get(model.name), limits[model.name]) for model, each in needs)
    print(printable(_table([HEADINGS, *rows])))
    print(printable(_verdict(config, needs)))
    if of_one:
        print(CACHE_RULE)
    for line in (*_standby(config, needs), *_engine_fixes(config)):
        print(printable(line))
    broken = [f"{model.name}: {each.why}" for model, each in needs if each.broken]
    for line in broken:
        print(printable(line), file=sys.stderr)
    return 1 if broken else 0


def read(path: Path) -> Config | None:
    """None for an invalid config, after all its problems were printed. Notes are printed too."""
    try:
        config = load(path, os.environ)
    except ConfigError as error:
        print(printable(str(error)), file=sys.stderr)
        return None
    for note in config.notes:
        print(printable(f"note: {note}"), file=sys.stderr)
    return config


def _row(model: ModelConfig, found: Need, share: Share | None, limits: InflightLimits) -> tuple[str, ...]:
    parts = found.parts
    columns = ("-", "-") if parts is None else (_shown(parts.weights), f"{_shown(parts.kv)} at {parts.context}")
    shared = ("-", "-") if share is None else (_shown(share.total), _cache(model, share))
    one = "?" if found.size is None else _shown(found.size)
    if found.why and not found.broken:
        one += f" ({found.why})"
    size = "cannot be loaded" if found.broken else one
    in_flight = _in_flight(limits, known=share is not None and parts is not None and parts.batch is not None)
    return (model.name, *columns, size, str(model.replicas), in_flight, *shared, _load(model))


def _in_flight(limits: InflightLimits, *, known: bool) -> str:
    """At most, on one replica. ``known``: what a batch needs, and what it may take."""
    if not known or limits.by_memory == limits.usual:
        return str(limits.usual.requests)
    return f"{limits.by_memory.requests}, by memory"


def _cache(model: ModelConfig, share: Share) -> str:
    if "prompt-cache-bytes" not in model.server_args:
        return f"{_shown(share.prompt_cache)}, {share.entries} prompts"
    written = model.server_args["prompt-cache-bytes"]
    return "no bound (server_args)" if written is None else f"{_shown(share.prompt_cache)} (server_args)"


def _load(model: ModelConfig) -> str:
    if model.urls:
        return "-"
    return f"{model.load}, idle_unload" if model.idle_unload else model.load


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def _verdict(config: Config, needs: Sequence[tuple[ModelConfig, Need]]) -> str:
    eager = [(model, each) for model, each in needs if model.load == "eager" and not model.urls]
    total = sum((each.size or 0) * model.replicas for model, each in eager)
    limit = budget(config)
    source = "memory.budget" if limit is not None else "what this machine can give now"
    available = host.available() if limit is None else limit
    unknown = [model.name for model, each in eager if each.size is None]
    fits = "fits" if total <= available else "does NOT fit"
    lines = [f"\neager models: {_shown(total)} of {_shown(available)} ({source}): {fits}"]
    if unknown:
        lines.append(f"not counted, for lack of an estimate: {', '.join(unknown)}")
    lines += _too_large(needs, available)
    return "\n".join(lines)


def _too_large(needs: Sequence[tuple[ModelConfig, Need]], available: int) -> Iterator[str]:
    for model, each in needs:
        if model.load == "on_demand" and (each.size or 0) > available:
            yield f"{model.name} alone does NOT fit"


def _standby(config: Config, needs: Sequence[tuple[ModelConfig, Need]]) -> Iterator[str]:
    """For models of this machine. The load times are those that gateways of this user have measured."""
    memory = budget(config) or host.memory().total
    for model, each in needs:
        if model.urls or each.broken:
            continue
        yield from standby.advice(
            standby.Standby(
                model=model.name,
                replicas=model.replicas,
                weights=each.parts.weights if each.parts else 0,
                memory=memory,
                backoff=model.restart.min_backoff,
                load=load_times.known(state_dir(os.environ), launch_of(model)),
                patience=_patience(model),
            )
        )


def _engine_fixes(config: Config) -> Iterator[str]:
    """For models that run under the instrument: which of its fixes do not fit the mlx-lm of this environment."""
    package = engine_source.installed()
    if package is None or not any(applies_engine_fixes(model) for model in config.models):
        return
    if unfit := engine_source.unfit(package):
        version = metadata.version("mlx-lm")
        yield f"engine fixes not applied, since mlx-lm {version} has another source there: {', '.join(unfit)}"


def _patience(model: ModelConfig) -> float:
    total = model.timeouts.total
    return min(model.queue_timeout, total) if total else model.queue_timeout


def _shown(count: int) -> str:
    return units.memory(count, 2)

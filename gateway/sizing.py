"""Memory that each model of a config will need, estimated from its files before the launch."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from backends import mlx_server
from backends.domain.share import Share
from backends.memory import host, safetensors
from backends.memory.access import denied, unreadable
from backends.memory.estimate import Estimate, Flags, estimate
from backends.memory.hub_cache import folders
from backends.memory.kv_cost import KvCost
from backends.memory.share import Appetite, Claimant, capacity, divide, split
from gateway.config import Config, ModelConfig
from gateway.config.parsers import size as bytes_of


@dataclass(frozen=True, slots=True)
class Need:
    """Memory of one replica. ``size``: bytes, None = not known. ``why``: source of the size, or reason for None.
    ``broken``: the model cannot be loaded. ``appetite``: what it would use of more."""

    size: int | None
    parts: Estimate | None = None
    appetite: Appetite | None = None
    why: str = ""
    broken: bool = False


def budget(config: Config) -> int | None:
    """Bytes for all models; None = what the machine can give now."""
    configured = config.memory.budget
    if configured == "auto":
        return None
    if isinstance(configured, str):
        return int(host.memory().total * float(configured.rstrip("%")) / 100)
    return configured


def need(model: ModelConfig) -> Need:
    """The configured ``memory`` takes precedence over the estimate."""
    found = _estimated(model)
    if model.memory is not None and not found.broken:
        return replace(found, size=model.memory, why="as the config says")
    return found


class SizeCache:
    """By model, what one replica will take. ``measure`` reads the model's files and blocks: it is called in a
    thread before each launch, since the files may still be downloading. The look-ups do not block."""

    def __init__(self, config: Config) -> None:
        self._models = {model.name: model for model in config.models}
        self._needs: dict[str, Need] = {}

    def measure(self, model: str) -> None:
        self._needs[model] = need(self._models[model])

    def batch_cost(self, model: str) -> KvCost | None:
        """None = not known, or not measured yet."""
        found = self._needs.get(model)
        return None if found is None or found.parts is None else found.parts.batch

    def doubled(self, model: str) -> float | None:
        """Tokens after which one takes twice as long to read; None = not known, or not measured yet."""
        found = self._needs.get(model)
        return None if found is None or found.parts is None else found.parts.doubled

    def estimates(self) -> dict[str, Callable[[], int | None]]:
        """Bytes; None = not known, or not measured yet."""
        return {name: partial(self._size, name) for name in self._models}

    def appetites(self) -> dict[str, Callable[[], Appetite | None]]:
        """Likewise."""
        return {name: partial(self._appetite, name) for name in self._models}

    def _size(self, name: str) -> int | None:
        found = self._needs.get(name)
        return None if found is None else found.size

    def _appetite(self, name: str) -> Appetite | None:
        found = self._needs.get(name)
        return None if found is None else found.appetite


def shares(config: Config, needs: Sequence[tuple[ModelConfig, Need]]) -> dict[str, Share]:
    """By model, what one replica of it may use beside the models that are never unloaded, before any process has told
    what it holds. Without those whose size is not known."""
    seen = host.memory()
    whole = capacity(total=seen.total, available=seen.available, held=0, budget=budget(config), working_set=None)
    whole -= sum((each.size or 0) * model.replicas for model, each in needs if each.appetite is None)
    known = [(model, each.appetite) for model, each in needs if each.appetite is not None]
    pinned = [one for model, appetite in known for one in _claimants(model, appetite) if one.resident]
    found: dict[str, Share] = {}
    for model, appetite in known:
        others = [one for one in pinned if one.model != model.name]
        own = [replace(one, resident=True) for one in _claimants(model, appetite)]
        on_demand = [one for other, wants in known for one in _claimants(other, wants) if not one.resident]
        whom = [*others, *own, *(one for one in on_demand if one.model != model.name)]
        found[model.name] = split(divide(whole, whom)[own[0].id], appetite)
    return found


def _claimants(model: ModelConfig, appetite: Appetite) -> list[Claimant]:
    pinned = model.load == "eager" and not model.idle_unload
    ids = (f"{model.name}:{index}" for index in range(model.replicas))
    return [Claimant(name, model.name, appetite, resident=pinned) for name in ids]


def _estimated(model: ModelConfig) -> Need:
    if model.urls:
        return Need(0, why="runs elsewhere")
    if model.command or model.model is None:
        return Need(None, why="not known for a command; give it with memory:")
    folder = next(folders(model.model, model.env), None)
    try:
        if folder is None or not (folder / "config.json").exists():
            return Need(None, why="not downloaded yet")
        parts = _of_folder(model, folder)
    except safetensors.BadWeights as bad:
        return Need(None, why=str(bad), broken=Path(model.model).is_absolute())  # a hub download is completed at launch
    except PermissionError as error:
        return Need(None, why=denied(error), broken=True)
    except OSError as error:
        return Need(None, why=unreadable(error, folder))
    except ValueError as error:
        return Need(None, why=str(error))
    return Need(parts.total, parts, _appetite(model, parts))


def _appetite(model: ModelConfig, parts: Estimate) -> Appetite:
    return Appetite(
        base=parts.base,
        sequence=parts.kv + parts.prefill,
        token=parts.per_token,
        most=model.memory,
        prompt_cache=_written(model.server_args, parts.kv),
        entries=_entries(model.server_args),
    )


def _entries(args: Mapping[str, Any]) -> int | None:
    """As the user wrote them, or left to the server where no bound in bytes is wanted; None = ours to choose."""
    unbounded = "prompt-cache-bytes" in args and args["prompt-cache-bytes"] is None
    if "prompt-cache-size" not in args and not unbounded:
        return None
    return _or(args.get("prompt-cache-size"), mlx_server.PROMPT_CACHE_ENTRIES)


def _written(args: Mapping[str, Any], kv: int) -> int | None:
    """Bytes of the prompt cache, as the user wrote them; None = ours to choose. ``kv``: of one prompt, in bytes."""
    if "prompt-cache-bytes" not in args:
        return None
    if (written := args["prompt-cache-bytes"]) is not None:
        return bytes_of(str(written))
    return _or(args.get("prompt-cache-size"), mlx_server.PROMPT_CACHE_ENTRIES) * kv  # no bound


def _of_folder(model: ModelConfig, folder: Path) -> Estimate:
    """Raises BadWeights, OSError, ValueError."""
    config: Any = json.loads((folder / "config.json").read_bytes())
    if not isinstance(config, dict):
        raise ValueError("config.json: expected an object")  # noqa: TRY004 - as other contents that do not fit
    args = model.server_args
    size = safetensors.size_of(folder)
    if draft := args.get("draft-model"):
        size += sum(safetensors.size_of(each) for each in islice(folders(str(draft), model.env), 1))
    if adapter := args.get("adapter-path"):
        size += safetensors.size_of_adapters(Path(str(adapter)))
    return estimate(config, size, max_context=model.max_context, flags=_flags(args))


def _flags(args: Mapping[str, Any]) -> Flags:
    default = Flags()
    return Flags(
        fused=sys.platform == "darwin",
        prefill_step=int(args.get("prefill-step-size") or default.prefill_step),
        kv_bits=int(args["kv-bits"]) if args.get("kv-bits") else None,
        kv_group=int(args.get("kv-group-size") or default.kv_group),
        quantized_from=_or(args.get("quantized-kv-start"), default.quantized_from),
        readers=mlx_server.prompt_concurrency(args),
    )


def _or(value: Any, default: int) -> int:
    return default if value is None else int(value)

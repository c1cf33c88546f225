"""Memory that each model of a config will need, estimated from its files before the launch."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from backends import mlx_server
from backends.memory import host, safetensors
from backends.memory.access import denied, unreadable
from backends.memory.estimate import Estimate, Flags, estimate
from backends.memory.hub_cache import folders
from gateway.config import Config, ModelConfig
from gateway.config.parsers import size as bytes_of


@dataclass(frozen=True, slots=True)
class Need:
    """Memory of one replica. ``size``: bytes, None = not known. ``why``: source of the size, or reason for None.
    ``broken``: the model cannot be loaded."""

    size: int | None
    parts: Estimate | None = None
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
        return Need(model.memory, found.parts, why="as the config says")
    return found


class SizeCache:
    """By model, the bytes that one replica will take. ``measure`` reads the model's files and blocks: it is called in a
    thread before each launch, since the files may still be downloading. The look-ups do not block."""

    def __init__(self, config: Config) -> None:
        self._models = {model.name: model for model in config.models}
        self._sizes: dict[str, int | None] = {}

    def measure(self, model: str) -> None:
        self._sizes[model] = need(self._models[model]).size

    def estimates(self) -> dict[str, Callable[[], int | None]]:
        """None = not known, or not measured yet."""
        return {name: partial(self._sizes.get, name) for name in self._models}


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
    return Need(parts.total, parts)


def _of_folder(model: ModelConfig, folder: Path) -> Estimate:
    """Raises BadWeights, OSError, ValueError."""
    config: Any = json.loads((folder / "config.json").read_bytes())
    if not isinstance(config, dict):
        raise ValueError("config.json: expected an object")  # noqa: TRY004 - as other contents that do not fit
    args = {**mlx_server.DEFAULT_ARGS, **model.server_args}
    size = safetensors.size_of(folder)
    if draft := args.get("draft-model"):
        size += sum(safetensors.size_of(each) for each in islice(folders(str(draft), model.env), 1))
    if adapter := args.get("adapter-path"):
        size += safetensors.size_of_adapters(Path(str(adapter)))
    return estimate(config, size, max_context=model.max_context, flags=_flags(args))


def _flags(args: Mapping[str, Any]) -> Flags:
    default = Flags()
    limit = args.get("prompt-cache-bytes")
    return Flags(
        prefill_step=int(args.get("prefill-step-size") or default.prefill_step),
        prompt_cache=None if limit is None else bytes_of(str(limit)),
        kept_prompts=_or(args.get("prompt-cache-size"), default.kept_prompts),
        kv_bits=int(args["kv-bits"]) if args.get("kv-bits") else None,
        kv_group=int(args.get("kv-group-size") or default.kv_group),
        quantized_from=_or(args.get("quantized-kv-start"), default.quantized_from),
    )


def _or(value: Any, default: int) -> int:
    return default if value is None else int(value)

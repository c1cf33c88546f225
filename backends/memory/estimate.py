"""How much memory a model needs, told before it is launched: from its weights and its config.json.

    weights                 exactly, by the headers of the files (``weights``)
    KV cache                of one sequence, by kind of layer: full, sliding window, MLA, linear, shared, quantised
    prompt cache            what the server keeps of earlier prompts, at most; told, but not counted
    prefill                 the scores that are written out where attention is not fused
    runtime                 Python, mlx, its pool of buffers

The formulas for the cache give the real bytes on llama, qwen3, gemma3, deepseek_v3 and qwen3_next under mlx-lm 0.32;
a kind of layer that is not known counts as full attention, which errs high.

Pure.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

Json = Mapping[str, Any]

STEP = 256  # tokens by which mlx_lm lets a cache grow
PREFILL = 2048  # tokens of a prompt at a time (--prefill-step-size)
KEPT_PROMPTS = 10  # of the server's prompt cache (--prompt-cache-size)
QUANTIZED_FROM = 5000  # tokens that stay as they are (--quantized-kv-start)
GROUP = 64  # of a quantised cache (--kv-group-size)
FUSED_UP_TO = 128  # size of a head, beyond which attention over a prompt is not fused
LOADING = 1.08  # the weights, and what loading takes on top
RUNTIME = 512 << 20  # bytes; the least that is told of Macs; with a tiny model on Linux 0.1 GiB was measured
USUAL_CONTEXT = 8192  # tokens, where nobody has said


class Layer(StrEnum):
    FULL = "full"
    SLIDING = "sliding"
    MLA = "mla"
    LINEAR = "linear"
    SHARED = "shared"  # it uses the cache of another


@dataclass(frozen=True, slots=True)
class Flags:
    """Those of mlx_lm.server that matter here. ``prompt_cache``: bytes, None = no bound."""

    prefill_step: int = PREFILL
    prompt_cache: int | None = None
    kept_prompts: int = KEPT_PROMPTS
    kv_bits: int | None = None
    kv_group: int = GROUP
    quantized_from: int = QUANTIZED_FROM


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes, of one replica. ``kv`` is for one sequence of ``context`` tokens."""

    weights: int
    context: int
    kv: int
    prompt_cache: int
    prefill: int

    @property
    def total(self) -> int:
        """Without the prompt cache, which may never fill, and is the first thing that can be made smaller."""
        return int(self.weights * LOADING) + self.kv + self.prefill + RUNTIME


def estimate(config: Json, weights: int, *, max_context: int | None = None, flags: Flags | None = None) -> Estimate:
    """``config``: config.json. Raises ValueError that names the key where it is not one of a language model."""
    flags = flags or Flags()
    text = _text(config)
    longest = text.get("max_position_embeddings")
    context = max_context or min(USUAL_CONTEXT, longest if isinstance(longest, int) and longest > 0 else USUAL_CONTEXT)
    kv = kv_bytes(config, context, flags=flags, prefilling=True)
    kept = flags.kept_prompts * kv_bytes(config, context, flags=flags)
    return Estimate(
        weights=weights,
        context=context,
        kv=kv,
        prompt_cache=kept if flags.prompt_cache is None else min(kept, flags.prompt_cache),
        prefill=_scores(text, context, flags),
    )


def kv_bytes(config: Json, tokens: int, *, flags: Flags | None = None, prefilling: bool = False) -> int:
    """Of one sequence. ``prefilling``: a window layer holds the last chunk of the prompt too. Raises ValueError."""
    text, flags = _text(config), flags or Flags()
    return sum(_layer_bytes(kind, text, tokens, flags, prefilling=prefilling) for kind in layers(text))


def layers(text: Json) -> list[Layer]:
    """The kind of each. Raises ValueError."""
    count = _whole(text, "num_hidden_layers")
    shared = _whole(text, "num_kv_shared_layers", 0)
    return [*_kinds(text, count)[: count - shared], *[Layer.SHARED] * shared]


def _kinds(text: Json, count: int) -> list[Layer]:
    if text.get("kv_lora_rank"):
        return [Layer.MLA] * count
    told = text.get("layer_types")
    if isinstance(told, Sequence) and len(told) == count:
        return [_kind_named(str(name)) for name in told]
    if interval := _whole(text, "full_attention_interval", 0):  # qwen3_next: every so many is full, the last of them
        return [Layer.FULL if (i + 1) % interval == 0 else Layer.LINEAR for i in range(count)]
    if text.get("sliding_window") and (pattern := _whole(text, "sliding_window_pattern", _pattern(text))):
        return [Layer.FULL if (i + 1) % pattern == 0 else Layer.SLIDING for i in range(count)]
    return [Layer.FULL] * count


def _pattern(text: Json) -> int:
    """mlx_lm's own default, for a model that has windows by its nature; else 0."""
    return 6 if str(text.get("model_type", "")).startswith("gemma3") else 0


def _kind_named(name: str) -> Layer:
    if "sliding" in name:
        return Layer.SLIDING
    return Layer.LINEAR if "linear" in name or "recurrent" in name else Layer.FULL


def _layer_bytes(kind: Layer, text: Json, tokens: int, flags: Flags, *, prefilling: bool) -> int:
    size, grown = _dtype_bytes(text), -(-tokens // STEP) * STEP
    match kind:
        case Layer.SHARED:
            return 0
        case Layer.MLA:
            return (_whole(text, "kv_lora_rank") + _whole(text, "qk_rope_head_dim")) * size * grown
        case Layer.LINEAR:
            return _linear_bytes(text, size)
        case Layer.SLIDING:
            window = _whole(text, "sliding_window")
            most = window - 1 + flags.prefill_step if prefilling else window
            return _per_token(text, size) * min(grown, most)
        case Layer.FULL:
            return int(_per_token(text, size) * _quantized(grown, flags))


def _per_token(text: Json, size: int) -> int:
    heads = _whole(text, "num_key_value_heads", _whole(text, "num_attention_heads"))
    return 2 * heads * _head(text) * size


def _quantized(tokens: int, flags: Flags) -> float:
    """As many unquantised tokens would take the same room."""
    if not flags.kv_bits or tokens <= flags.quantized_from:
        return tokens
    share = (flags.kv_bits / 8 + 4 / flags.kv_group) / 2
    return max(flags.quantized_from, tokens * share)  # converted when it has grown so far


def _linear_bytes(text: Json, size: int) -> int:
    """Of a gated delta net: the tail of a convolution, and a state that does not grow."""
    k_heads, v_heads = _whole(text, "linear_num_key_heads"), _whole(text, "linear_num_value_heads")
    k_size, v_size = _whole(text, "linear_key_head_dim"), _whole(text, "linear_value_head_dim")
    kernel = _whole(text, "linear_conv_kernel_dim")
    convolution = (kernel - 1) * (2 * k_heads * k_size + v_heads * v_size) * size
    return convolution + v_heads * v_size * k_size * 4


def _scores(text: Json, context: int, flags: Flags) -> int:
    """Attention over a prompt is not fused where heads are large, nor where the cache is quantised."""
    if _head(text) <= FUSED_UP_TO and not flags.kv_bits:
        return 0
    return _whole(text, "num_attention_heads") * min(flags.prefill_step, context) * context * _dtype_bytes(text)


def _head(text: Json) -> int:
    return _whole(text, "head_dim", 0) or _whole(text, "hidden_size") // _whole(text, "num_attention_heads")


def _text(config: Json) -> Json:
    """Vision models keep what concerns the language model in a mapping of its own."""
    inner = config.get("text_config")
    return {**config, **inner} if isinstance(inner, Mapping) else config


def _dtype_bytes(text: Json) -> int:
    return 4 if str(text.get("torch_dtype") or text.get("dtype") or "") == "float32" else 2


def _whole(text: Json, key: str, default: int | None = None) -> int:
    value = text.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < 0 or (value == 0 and default is None):
        raise ValueError(f"config.json: {key}: expected a whole number, got {value!r}")
    return value

"""Memory that a model needs, estimated before launch from its weights and its config.json.

    weights                 exact, from the headers of the files (``safetensors``)
    KV cache                of one sequence, by kind of layer: full, sliding window, MLA, linear, shared, quantised
    prompt cache            by token; not in the total
    prefill                 what one step of it takes for a moment (``kv_cost``)
    runtime                 Python, mlx and its buffer pool

And how much longer a token takes to read, the more were read before it (``doubled``).

The formulas for the KV cache give the exact bytes on llama, qwen3, gemma3, deepseek_v3 and qwen3_next under mlx-lm
0.32; an unknown kind of layer counts as full attention, which errs high.

Pure.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from backends.memory.kv_cost import CACHE_STEP, KvCost
from backends.mlx_server import PREFILL_STEP, PROMPT_CONCURRENCY

Json = Mapping[str, Any]

TYPICAL_PROMPT = 4096  # tokens of a prompt in the prompt cache
QUANTIZED_KV_START = 5000  # tokens that are not quantised (--quantized-kv-start)
KV_GROUP_SIZE = 64  # of a quantised cache (--kv-group-size)
MAX_FUSED_HEAD_SIZE = 128  # with larger heads, attention over a prompt is not fused
LOAD_FACTOR = 1.08  # memory during a load, relative to the weights
RUNTIME = 512 << 20  # bytes; the lowest figure reported for Macs; 0.1 GiB was measured with a tiny model on Linux
DEFAULT_CONTEXT = 8192  # tokens, where none is configured
NEVER = 1 << 20  # tokens: attention does not grow


class Layer(StrEnum):
    FULL = "full"
    SLIDING = "sliding"
    MLA = "mla"
    LINEAR = "linear"
    SHARED = "shared"  # uses the cache of another layer


@dataclass(frozen=True, slots=True)
class Flags:
    """Flags of mlx_lm.server that change its memory. ``fused``: attention over a prompt is on this machine, where the
    size of the heads allows. ``readers``: prompts that are read together."""

    prefill_step: int = PREFILL_STEP
    kv_bits: int | None = None
    kv_group: int = KV_GROUP_SIZE
    quantized_from: int = QUANTIZED_KV_START
    fused: bool = True
    readers: int = PROMPT_CONCURRENCY


@dataclass(frozen=True, slots=True)
class Estimate:
    """Of one replica, in bytes. ``kv`` is for one sequence of ``context`` tokens. ``batch``: cost of several; None =
    the server does not batch. ``doubled``: tokens after which one takes twice as long to read."""

    weights: int
    context: int
    kv: int
    prefill: int
    per_token: float  # of the prompt cache, with the layers of fixed size that each prompt has
    batch: KvCost | None = None
    doubled: float | None = None

    @property
    def base(self) -> int:
        """Of an idle process with empty caches."""
        return int(self.weights * LOAD_FACTOR) + RUNTIME

    @property
    def total(self) -> int:
        """Without the prompt cache, which has what is left (``share``)."""
        return self.base + self.kv + self.prefill


def estimate(config: Json, weights: int, *, max_context: int | None = None, flags: Flags | None = None) -> Estimate:
    """``config``: config.json. Raises ValueError, naming the key, if it is not that of a language model."""
    flags = flags or Flags()
    text = _text(config)
    longest = text.get("max_position_embeddings")
    context = max_context or min(
        DEFAULT_CONTEXT, longest if isinstance(longest, int) and longest > 0 else DEFAULT_CONTEXT
    )
    kv = kv_bytes(config, context, flags=flags, prefilling=True)
    typical, cost = min(context, TYPICAL_PROMPT), _batch_cost(text, flags)
    return Estimate(
        weights=weights,
        context=context,
        kv=kv,
        prefill=cost.prefill(1, min(flags.prefill_step, context), context),
        per_token=kv_bytes(config, typical, flags=flags) / typical,
        batch=None if flags.kv_bits else cost,
        doubled=doubled(config),
    )


def kv_bytes(config: Json, tokens: int, *, flags: Flags | None = None, prefilling: bool = False) -> int:
    """Of one sequence. ``prefilling``: a sliding-window layer also holds the last prefill step. Raises ValueError."""
    text, flags = _text(config), flags or Flags()
    cost, full = _batch_cost(text, flags), _per_token(text) * layers(text).count(Layer.FULL)
    whole = cost.reading(1, tokens) if prefilling else cost.decoding(1, tokens)
    grown = -(-tokens // CACHE_STEP) * CACHE_STEP
    return whole - int(full * (grown - _quantized(grown, flags)))


def kv_cost(config: Json, flags: Flags) -> KvCost | None:
    """Of a batch. None: the server does not batch requests (a quantised cache). Raises ValueError."""
    return None if flags.kv_bits else _batch_cost(_text(config), flags)


def _batch_cost(text: Json, flags: Flags) -> KvCost:
    """Without quantisation. Raises ValueError."""
    kinds, size = layers(text), _dtype_bytes(text)
    mla = _whole(text, "kv_lora_rank") + _whole(text, "qk_rope_head_dim") if Layer.MLA in kinds else 0
    full, sliding, linear = (kinds.count(kind) for kind in (Layer.FULL, Layer.SLIDING, Layer.LINEAR))
    fused = flags.fused and _head(text) <= MAX_FUSED_HEAD_SIZE and not flags.kv_bits
    return KvCost(
        per_token=_per_token(text) * full + mla * size * kinds.count(Layer.MLA),
        windowed=_per_token(text) * sliding,
        window=_whole(text, "sliding_window") if sliding else 0,
        windows=sliding,
        fixed=_linear_bytes(text, size) * linear if linear else 0,
        linears=linear,
        layers=max(1, len(kinds) - kinds.count(Layer.SHARED)),
        step=flags.prefill_step,
        scores=0 if fused else _whole(text, "num_attention_heads") * size,  # masked and normalised in place
        activations=_activations(text) * size + (_states(text) if linear and not flags.fused else 0),
        readers=flags.readers,
    )


def _activations(text: Json) -> int:
    """Values per token that one layer has at a time, in its attention or in its MLP: queries as projected, turned and
    scaled, and what is attended to, by heads and by tokens; keys and values likewise, until they are stored; the
    residual stream before, in and after it."""
    heads, kv_heads = _whole(text, "num_attention_heads"), _whole(text, "num_key_value_heads", 0)
    attention = (5 * heads + 6 * (kv_heads or heads)) * _head(text)
    experts = _whole(text, "moe_intermediate_size", 0) * _whole(text, "num_experts_per_tok", 0)
    mlp = 3 * max(experts, _whole(text, "intermediate_size", 0))
    return 3 * _whole(text, "hidden_size") + max(attention, mlp)


def _states(text: Json) -> int:
    """Bytes per token of a linear layer, where no kernel goes through the tokens (``gated_delta_update``): each has a
    state of its own until the layer was read."""
    return (
        _whole(text, "linear_num_value_heads")
        * _whole(text, "linear_value_head_dim")
        * _whole(text, "linear_key_head_dim")
        * 4
    )


def doubled(config: Json) -> float:
    """Tokens after which one takes twice as many multiplications to read, or ``NEVER``: those of the weights that it
    meets are the same for each, those of attention grow with the tokens before it. Raises ValueError."""
    text = _text(config)
    kinds, heads = layers(text), _whole(text, "num_attention_heads") * _head(text)
    kv_heads = _whole(text, "num_key_value_heads", _whole(text, "num_attention_heads")) * _head(text)
    wide = _whole(text, "num_experts_per_tok", 0) * _whole(text, "moe_intermediate_size", 0)
    mlp = 3 * (wide or _whole(text, "intermediate_size", 0))
    weights = _whole(text, "hidden_size") * (2 * heads + 2 * kv_heads + mlp) * len(kinds)
    growing = 2 * heads * (len(kinds) - kinds.count(Layer.SLIDING) - kinds.count(Layer.LINEAR))
    return min(NEVER, weights / growing) if growing else NEVER


def layers(config: Json) -> list[Layer]:
    """The kind of each layer. Raises ValueError."""
    text = _text(config)
    count = _whole(text, "num_hidden_layers")
    shared = _whole(text, "num_kv_shared_layers", 0)
    return [*_kinds(text, count)[: count - shared], *[Layer.SHARED] * shared]


def _kinds(text: Json, count: int) -> list[Layer]:
    if text.get("kv_lora_rank"):
        return [Layer.MLA] * count
    names = text.get("layer_types")
    if isinstance(names, Sequence) and len(names) == count:
        return [_kind_named(str(name)) for name in names]
    if interval := _whole(text, "full_attention_interval", 0):  # qwen3_next: the last layer of each interval is full
        return [Layer.FULL if (i + 1) % interval == 0 else Layer.LINEAR for i in range(count)]
    if text.get("sliding_window") and (pattern := _whole(text, "sliding_window_pattern", _pattern(text))):
        return [Layer.FULL if (i + 1) % pattern == 0 else Layer.SLIDING for i in range(count)]
    return [Layer.FULL] * count


def _pattern(text: Json) -> int:
    """The default of mlx_lm for model types that always have sliding windows; else 0."""
    return 6 if str(text.get("model_type", "")).startswith("gemma3") else 0


def _kind_named(name: str) -> Layer:
    if "sliding" in name:
        return Layer.SLIDING
    return Layer.LINEAR if "linear" in name or "recurrent" in name else Layer.FULL


def _per_token(text: Json) -> int:
    heads = _whole(text, "num_key_value_heads", _whole(text, "num_attention_heads"))
    return 2 * heads * _head(text) * _dtype_bytes(text)


def _quantized(tokens: int, flags: Flags) -> float:
    """The number of unquantised tokens that takes the same memory."""
    if not flags.kv_bits or tokens <= flags.quantized_from:
        return tokens
    share = (flags.kv_bits / 8 + 4 / flags.kv_group) / 2
    return max(flags.quantized_from, tokens * share)  # the cache is quantised when it reaches that length


def _linear_bytes(text: Json, size: int) -> int:
    """Of a gated delta net: the tail of the convolution, and a state of fixed size."""
    k_heads, v_heads = _whole(text, "linear_num_key_heads"), _whole(text, "linear_num_value_heads")
    k_size, v_size = _whole(text, "linear_key_head_dim"), _whole(text, "linear_value_head_dim")
    kernel = _whole(text, "linear_conv_kernel_dim")
    convolution = (kernel - 1) * (2 * k_heads * k_size + v_heads * v_size) * size
    return convolution + v_heads * v_size * k_size * 4


def _head(text: Json) -> int:
    return _whole(text, "head_dim", 0) or _whole(text, "hidden_size") // _whole(text, "num_attention_heads")


def _text(config: Json) -> Json:
    """Vision models have the language model's keys in ``text_config``."""
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

"""Estimates of memory: against what mlx itself holds for toy models of each kind, and by hand."""

import gc
import json
import os
from pathlib import Path
from typing import Any

import pytest

from backends.memory import estimate, safetensors
from backends.memory.estimate import NEVER, Flags, Layer, doubled, kv_bytes

BASE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "vocab_size": 512,
    "rope_theta": 10000.0,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
MLA: dict[str, Any] = {
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "attention_bias": False,
    "rope_scaling": None,
}
DELTA: dict[str, Any] = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "decoder_sparse_step": 1,
    "shared_expert_intermediate_size": 32,
    "moe_intermediate_size": 32,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "partial_rotary_factor": 0.25,
    "full_attention_interval": 4,
}
WIDE = {"torch_dtype": "float32"}  # mlx has experts on the CPU in this type only
TOYS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "num_hidden_layers": 4, **BASE},
    "qwen3": {"model_type": "qwen3", "num_hidden_layers": 4, **BASE},
    "gemma3": {
        "model_type": "gemma3_text",
        "num_hidden_layers": 12,
        **BASE,
        "sliding_window": 256,
        "sliding_window_pattern": 6,
        "query_pre_attn_scalar": 16,
        "rope_local_base_freq": 10000.0,
    },
    "deepseek_v3": {
        "model_type": "deepseek_v3",
        "num_hidden_layers": 4,
        **BASE,
        **MLA,
        "num_key_value_heads": 4,
        **WIDE,
    },
    "qwen3_next": {"model_type": "qwen3_next", "num_hidden_layers": 8, **BASE, **DELTA, **WIDE},
}
TOKENS = 1500


@pytest.mark.slow  # loads mlx, five models and their caches
@pytest.mark.parametrize("name", TOYS)
def test_the_estimate_is_what_mlx_holds(name: str, tmp_path: Path) -> None:
    import mlx.core as mx  # noqa: PLC0415 - for this test alone
    from mlx.utils import tree_flatten  # noqa: PLC0415 - for this test alone
    from mlx_lm.models.cache import make_prompt_cache  # noqa: PLC0415 - for this test alone
    from mlx_lm.utils import _get_classes, load_model  # noqa: PLC0415 - for this test alone

    config = TOYS[name]
    model_class, args_class = _get_classes(config)
    made = model_class(args_class.from_dict(config))
    made.set_dtype(mx.float32 if "torch_dtype" in config else mx.bfloat16)
    mx.save_safetensors(str(tmp_path / "model.safetensors"), dict(tree_flatten(made.parameters())))
    (tmp_path / "config.json").write_text(json.dumps(config))
    del made
    gc.collect()
    before = mx.get_active_memory()
    model, _ = load_model(tmp_path)
    mx.eval(model.parameters())
    size = safetensors.size_of(tmp_path)
    assert mx.get_active_memory() - before == pytest.approx(size, rel=0.1)

    cache = make_prompt_cache(model)
    loaded = mx.get_active_memory()
    prompt = mx.arange(TOKENS)[None] % 512
    for start in range(0, TOKENS, 512):
        mx.eval(model(prompt[:, start : start + 512], cache=cache))
    mx.eval([entry.state for entry in cache])
    prefilled = mx.get_active_memory() - loaded
    for token in range(2):
        mx.eval(model(mx.array([[token]]), cache=cache))
    mx.eval([entry.state for entry in cache])
    decoding = mx.get_active_memory() - loaded
    flags = Flags(prefill_step=TOKENS % 512)
    assert prefilled == pytest.approx(kv_bytes(config, TOKENS, flags=flags, prefilling=True), rel=0.1)
    assert decoding == pytest.approx(kv_bytes(config, TOKENS + 2), rel=0.1)
    whole = size + kv_bytes(config, TOKENS + 2)
    assert mx.get_active_memory() - before == pytest.approx(whole, rel=0.1)


# -- by hand -----------------------------------------------------------------------------------------------------------

LLAMA = TOYS["llama"]
PER_TOKEN = 2 * 2 * 16 * 2  # keys and values, heads, size of a head, bytes


def test_a_cache_grows_in_steps() -> None:
    assert [kv_bytes(LLAMA, n) for n in (1, 256, 257)] == [4 * PER_TOKEN * n for n in (256, 256, 512)]


def test_a_window_holds_its_last_chunk_while_the_prompt_is_read() -> None:
    config = {**LLAMA, "layer_types": ["sliding_attention"] * 4, "sliding_window": 256}
    assert kv_bytes(config, 10_000) == 4 * PER_TOKEN * 256
    assert kv_bytes(config, 10_000, prefilling=True) == 4 * PER_TOKEN * (255 + 2048)


def test_layers_that_share_a_cache_have_none() -> None:
    assert kv_bytes({**LLAMA, "num_kv_shared_layers": 3}, 256) == PER_TOKEN * 256


@pytest.mark.parametrize(("bits", "share"), [(4, 0.281), (8, 0.531)])
def test_a_quantised_cache(bits: int, share: float) -> None:
    full = kv_bytes(LLAMA, 64_000)
    assert kv_bytes(LLAMA, 64_000, flags=Flags(kv_bits=bits)) == pytest.approx(share * full, rel=0.002)
    assert kv_bytes(LLAMA, 4096, flags=Flags(kv_bits=bits)) == kv_bytes(LLAMA, 4096), "it is not converted yet"


def test_a_vision_model_keeps_it_in_text_config() -> None:
    assert kv_bytes({"model_type": "x", "text_config": LLAMA}, 256) == kv_bytes(LLAMA, 256)


@pytest.mark.parametrize(
    ("changes", "kinds"),
    [
        ({}, [Layer.FULL] * 4),
        ({"sliding_window": 4096, "use_sliding_window": False}, [Layer.FULL] * 4),
        ({"layer_types": ["full_attention", "sliding_attention", "linear_attention", "new"]}, None),
        ({"full_attention_interval": 2}, [Layer.LINEAR, Layer.FULL] * 2),
        ({"kv_lora_rank": 8}, [Layer.MLA] * 4),
    ],
)
def test_kinds_of_layers(changes: dict[str, Any], kinds: list[Layer] | None) -> None:
    expected = kinds or [Layer.FULL, Layer.SLIDING, Layer.LINEAR, Layer.FULL]
    assert estimate.layers({**LLAMA, **changes}) == expected


def test_the_sum() -> None:
    found = estimate.estimate(LLAMA, 1 << 30)
    assert found.context == 4096, "the model's own, which is shorter than the usual"
    assert found.kv == kv_bytes(LLAMA, 4096)
    assert found.per_token == kv_bytes(LLAMA, 4096) / 4096
    assert found.base == int(1.08 * (1 << 30)) + estimate.RUNTIME
    assert found.batch is not None
    assert found.prefill == found.batch.prefill(1, 2048, 4096)
    assert found.total == found.base + found.kv + found.prefill


def test_scores_of_large_heads_are_written_out() -> None:
    fused, wide = (estimate.estimate({**LLAMA, "head_dim": size}, 0, max_context=4096) for size in (128, 256))
    activations = (5 * 4 + 6 * 2) * 128 * 2
    assert wide.prefill - fused.prefill == 2048 * (4 * 4096 * 2 + activations)
    packed = estimate.estimate({**LLAMA, "head_dim": 128}, 0, max_context=4096, flags=Flags(kv_bits=4))
    assert packed.prefill - fused.prefill == 2048 * 4 * 4096 * 2, "nor is attention over a quantised cache"


def test_the_activations_of_a_step_and_its_mask_count() -> None:
    values = 3 * 64 + (5 * 4 + 6 * 2) * 16
    assert estimate.estimate(LLAMA, 0, max_context=4096).prefill == 2048 * (values * 2 + 4096)
    sliding = {**LLAMA, "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 256}
    assert estimate.estimate(sliding, 0, max_context=4096).prefill == 2048 * (values * 2 + 4096 + 255 + 2048)


@pytest.mark.parametrize("key", ["num_hidden_layers", "num_attention_heads"])
@pytest.mark.parametrize("value", [None, "4", -1, True, 0])
def test_a_config_of_something_else(key: str, value: object) -> None:
    config = {k: v for k, v in LLAMA.items() if k not in ("num_key_value_heads", "head_dim")}
    with pytest.raises(ValueError, match=key):
        kv_bytes({**config, key: value}, 256)


# -- a batch -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TOYS)
def test_a_batch_of_one_costs_what_one_sequence_costs(name: str) -> None:
    config = TOYS[name]
    cost = estimate.kv_cost(config, Flags())
    assert cost is not None
    for tokens in (1, 256, 1500, 40_000):
        assert cost.decoding(1, tokens) == kv_bytes(config, tokens)
        assert cost.reading(1, tokens) == kv_bytes(config, tokens, prefilling=True)
        assert cost.decoding(7, tokens) == 7 * kv_bytes(config, tokens)


def test_scores_count_where_attention_is_not_fused() -> None:
    def scores(config: dict[str, Any], *, fused: bool) -> int:
        cost = estimate.kv_cost(config, Flags(fused=fused))
        return -1 if cost is None else cost.scores

    assert scores(LLAMA, fused=True) == 0
    assert scores(LLAMA, fused=False) == scores({**LLAMA, "head_dim": 256}, fused=True) == 4 * 2


QWEN3_4B = {
    "num_hidden_layers": 36,
    "hidden_size": 2560,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 9728,
}
SPARSE = {"num_experts_per_tok": 8, "moe_intermediate_size": 768}


def test_the_tokens_after_which_reading_takes_twice_as_long() -> None:
    """Weights of Qwen3-4B without embeddings: 3.6 billion; attention: 2 x 32 x 128 multiplications per layer."""
    dense = doubled(QWEN3_4B)
    assert dense == pytest.approx(3.6e9 / (36 * 2 * 32 * 128), rel=0.02)
    assert doubled({"text_config": QWEN3_4B}) == dense
    assert doubled(QWEN3_4B | SPARSE) < dense, "each token meets 8 small experts"
    half = QWEN3_4B | {"layer_types": ["sliding_attention", "full_attention"] * 18, "sliding_window": 512}
    assert doubled(half) == pytest.approx(2 * dense)
    assert doubled(half | {"layer_types": ["sliding_attention"] * 36}) == NEVER


def test_each_token_has_a_state_where_no_kernel_goes_through_them() -> None:
    kernel, none = (estimate.kv_cost(TOYS["qwen3_next"], Flags(fused=fused)) for fused in (True, False))
    assert kernel is not None
    assert none is not None
    assert none.activations - kernel.activations == 4 * 16 * 16 * 4


def test_a_quantised_cache_is_not_batched() -> None:
    assert estimate.kv_cost(LLAMA, Flags(kv_bits=4)) is None


# -- weight files ------------------------------------------------------------------------------------------------------


def tensors(size: int, name: str = "w") -> bytes:
    header = json.dumps({"__metadata__": {"format": "mlx"}, name: {"dtype": "U8", "data_offsets": [0, size]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(size)


def test_the_size_is_that_of_the_tensors_through_links(tmp_path: Path) -> None:
    blobs, folder = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    folder.mkdir()
    for n, size in enumerate((1000, 234)):
        (blobs / str(n)).write_bytes(tensors(size))
        (folder / f"model-{n}.safetensors").symlink_to(blobs / str(n))
    (folder / "adapters.safetensors").write_bytes(tensors(7))
    assert safetensors.size_of(folder) == 1234
    assert safetensors.size_of_adapters(folder) == 7
    assert safetensors.size_of_adapters(blobs) == 0


@pytest.mark.parametrize("cut", [1, 100, 234, 250])
def test_a_file_that_was_cut_short(tmp_path: Path, cut: int) -> None:
    whole = tensors(234)
    (tmp_path / "model.safetensors").write_bytes(whole[:-cut])
    with pytest.raises(safetensors.BadWeights, match=r"model\.safetensors.*download it again"):
        safetensors.size_of(tmp_path)


@pytest.mark.parametrize("contents", [b"", b"1234567", b"\xff" * 100, tensors(9)[:8] + b"x" * 200, b"\2" + bytes(90)])
def test_a_file_that_is_something_else(tmp_path: Path, contents: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(contents)
    with pytest.raises(safetensors.BadWeights, match=r"model\.safetensors"):
        safetensors.size_of(tmp_path)


def test_a_file_that_the_index_names_and_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "model-1.safetensors").write_bytes(tensors(10))
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / safetensors.INDEX).write_text(json.dumps(index))
    with pytest.raises(safetensors.BadWeights, match=r"model-2\.safetensors is missing \(1 of the 2"):
        safetensors.size_of(tmp_path)
    (tmp_path / "model-2.safetensors").symlink_to(tmp_path / "gone")
    with pytest.raises(safetensors.BadWeights, match="is missing"):
        safetensors.size_of(tmp_path)
    (tmp_path / "model-2.safetensors").unlink()
    (tmp_path / "model-2.safetensors").write_bytes(tensors(5))
    assert safetensors.size_of(tmp_path) == 15


@pytest.mark.parametrize("index", [None, "[]", "{", '{"weight_map": 3}'])
def test_nothing_that_could_be_loaded(tmp_path: Path, index: str | None) -> None:
    if index is not None:
        (tmp_path / safetensors.INDEX).write_text(index)
    with pytest.raises(safetensors.BadWeights, match="download"):
        safetensors.size_of(tmp_path)


def test_a_header_is_read_once_as_long_as_its_file_is_the_same(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(tensors(234))
    stat = file.stat()
    assert safetensors.size_of(tmp_path) == 234
    file.write_bytes(bytes(stat.st_size))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert safetensors.size_of(tmp_path) == 234
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    with pytest.raises(safetensors.BadWeights):
        safetensors.size_of(tmp_path)


@pytest.mark.parametrize("index", ["{}", '{"weight_map": {}} x', '{"weight_map": []}'])
def test_an_index_that_is_something_else(tmp_path: Path, index: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(tensors(5))
    (tmp_path / safetensors.INDEX).write_text(index)
    with pytest.raises(safetensors.BadWeights, match="download the model again"):
        safetensors.size_of(tmp_path)

"""Predicted and real peak of random mixes of requests in the engine's own batches:
``uv run python -m benchmarks.batch_memory``.

Drives mlx_lm's BatchGenerator as mlx_lm.server does, on random models of a kind each, on this machine's device (the CPU
where mlx has no other). The prediction is made at each arrival, from what the gateway knows then; compared is the
highest one with the highest peak of mlx, both without the weights. Prints the distribution of the errors.
"""

import argparse
import math
import random
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import mlx.core as mx
from mlx_lm.generate import BatchGenerator
from mlx_lm.models import gemma3_text, llama, qwen3_moe, qwen3_next

from backends.admission.batch import Member, peak
from backends.memory.estimate import Flags, kv_cost
from backends.memory.kv_cost import KvCost

MIB = 1 << 20
STEPS = (256, 512, 2048)  # tokens of a prefill step
BASE: Mapping[str, Any] = MappingProxyType(
    {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 12,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "vocab_size": 256,
        "rms_norm_eps": 1e-5,
        "torch_dtype": "float32",
    }
)
EXPERTS: Mapping[str, Any] = MappingProxyType(
    {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "rope_theta": 10000.0,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    }
)
DELTA: Mapping[str, Any] = MappingProxyType(
    {
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
        "linear_conv_kernel_dim": 4,
        "shared_expert_intermediate_size": 64,
        "partial_rotary_factor": 0.25,
        "full_attention_interval": 2,
    }
)
KINDS: Mapping[str, tuple[Any, Mapping[str, Any]]] = {
    "full": (llama, {"model_type": "llama", "rope_theta": 10000.0, "tie_word_embeddings": True}),
    "sliding": (gemma3_text, {"model_type": "gemma3_text", "sliding_window": 512, "sliding_window_pattern": 6}),
    "experts": (qwen3_moe, {"model_type": "qwen3_moe", **EXPERTS}),
    "linear": (qwen3_next, {"model_type": "qwen3_next", **EXPERTS, **DELTA}),
}


@dataclass(frozen=True, slots=True)
class Arrival:
    """``step``: of the generator, at which it comes; ``prompt`` and ``answer`` in tokens."""

    step: int
    prompt: int
    answer: int


def model(kind: str) -> tuple[Any, dict[str, Any]]:
    module, extra = KINDS[kind]
    config = {**BASE, **extra}
    mx.random.seed(0)
    made = module.Model(module.ModelArgs.from_dict(config))
    made.set_dtype(mx.float32)
    mx.eval(made.parameters())
    return made, config


def mix(chance: random.Random) -> list[Arrival]:
    """Some come together, some while others are read or decoded; sizes over orders of magnitude."""
    return [
        Arrival(
            chance.choice((0, 0, chance.randint(0, 40))),
            int(2 ** chance.uniform(6, 11)),
            int(2 ** chance.uniform(3, 7)),
        )
        for _ in range(chance.randint(2, 8))
    ]


def peaks(made: Any, cost: KvCost, arrivals: Iterable[Arrival]) -> tuple[int, int]:
    """(predicted, real) bytes."""
    generator: Any = BatchGenerator(made, prefill_step_size=cost.step)
    coming, live, steps, predicted = sorted(arrivals, key=lambda one: one.step), dict[int, list[int]](), 0, 0
    mx.clear_cache()
    base = mx.get_active_memory()
    mx.reset_peak_memory()
    while coming or live:
        while coming and (coming[0].step <= steps or not live):
            new = coming.pop(0)
            (uid,) = generator.insert([[1 + (i * 7 + new.prompt) % 200 for i in range(new.prompt)]], [new.answer])
            live[uid] = [new.prompt, new.answer, 0, 0]
            members = [Member(p, a, read, written, decoding=read >= p) for p, a, read, written in live.values()]
            predicted = max(predicted, peak(cost, members))
        _advance(generator, live)
        steps += 1
    generator.close()
    return predicted, mx.get_peak_memory() - base


def _advance(generator: Any, live: dict[int, list[int]]) -> None:
    """One step. What is stored in the prompt cache is evaluated, as the gateway's engine fix does it, and dropped."""
    prompts, tokens = generator.next()
    for response in prompts:
        live[response.uid][2] = response.progress[0]
    for response in tokens:
        live[response.uid][3] += 1
        if response.finish_reason is not None:
            mx.eval([cache.state for cache in response.prompt_cache])
            del live[response.uid]


def errors(kind: str, mixes: int, seed: int) -> list[float]:
    """(predicted - real) / real of each mix."""
    chance, (made, config) = random.Random(seed), model(kind)
    found = []
    for _ in range(mixes):
        cost = kv_cost(config, Flags(prefill_step=chance.choice(STEPS), fused=mx.metal.is_available()))
        if cost is None:
            raise RuntimeError("a model without a quantised cache is batched")
        predicted, real = peaks(made, cost, mix(chance))
        found.append(predicted / real - 1)
        sys.stdout.write(f"{kind} {predicted / MIB:8.1f} MiB predicted {real / MIB:8.1f} real {found[-1]:+7.1%}\n")
        sys.stdout.flush()
    return found


def summary(found: Sequence[float]) -> str:
    sizes = sorted(map(abs, found))
    half, most = (sizes[math.ceil(share * len(sizes)) - 1] for share in (0.5, 0.9))
    return f"{len(found)} mixes: error p50 {half:.1%}, p90 {most:.1%}, from {min(found):+.1%} to {max(found):+.1%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--mixes", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=tuple(KINDS), action="append")
    options = parser.parse_args()
    for kind in options.kind or KINDS:
        sys.stdout.write(f"{kind} {summary(errors(kind, options.mixes, options.seed))}\n")


if __name__ == "__main__":
    main()
